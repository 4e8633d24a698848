"""The task head of a model: what stands outside its body, and the poolers inside it."""

from __future__ import annotations

from torch import nn


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the head by name: children beside ``model.base_model``, and modules called ``pooler``.

    Classifiers, scores, language-model heads and pooling layers count. A head that shares its weights with the
    embeddings does not, nor do norms at the end of a body. A model that is its own body (no task head around it) has
    its poolers and its output embeddings.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        own = [p for p in module.parameters() if id(p) not in embeddings]
        if own and (_beside_body(model, name, module) or name.rpartition(".")[2] == "pooler"):
            found[name] = module
    return found


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of :func:`head_modules`, and those that hang on the model itself; each once."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found = {id(p): p for module in head_modules(model).values() for p in module.parameters()}
    if body(model) is not model:
        found |= {id(p): p for p in model.parameters(recurse=False)}
    return [p for key, p in found.items() if key not in embeddings]


def body(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where it has none around it."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _beside_body(model: nn.Module, name: str, module: nn.Module) -> bool:
    base = body(model)
    if base is model:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return module is output
    return bool(name) and "." not in name and module is not base and not _holds(module, base)


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())
