"""Where the routers of mixtures of experts are: the modules that choose the experts of each token."""

from __future__ import annotations

from torch import nn

from ffnkit.model.families.keys import EXPERTS, ROUTER


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by name; none in a model without experts.

    A router is a module with parameters called ``router`` or ``gate`` that hangs beside experts, or in a module whose
    class is named after them: a linear (Llama 4's router, DBRX's), a module of its own with a ``weight`` (Mixtral,
    OLMoE, Qwen, DeepSeek with its correction bias) or with a ``classifier`` (Switch, NLLB). The gate of a *shared*
    expert chooses no expert, it weighs one that sees every token, and is none.
    """
    found: dict[str, nn.Module] = {}
    for owner_name, owner in model.named_modules():
        for name, child in owner.named_children():
            path = f"{owner_name}.{name}" if owner_name else name
            if any(path.startswith(f"{outer}.") for outer in found):
                continue
            if ROUTER.fullmatch(name) and next(child.parameters(), None) is not None and _has_experts(owner, child):
                found[path] = child
    return found


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of :func:`routers` by name, each once."""
    named = {f"{path}.{name}": p for path, module in routers(model).items() for name, p in module.named_parameters()}
    return dict({id(p): (name, p) for name, p in reversed(named.items())}.values())


def _has_experts(owner: nn.Module, router: nn.Module) -> bool:
    siblings = [(name, child) for name, child in owner.named_children() if child is not router]
    named = [text for name, child in siblings for text in (name, type(child).__name__)]
    return any(EXPERTS.search(text) for text in (*named, type(owner).__name__))
