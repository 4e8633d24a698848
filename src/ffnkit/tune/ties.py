"""What is tied in a model before adapters of peft come, which know modules and not parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ffnkit.edits import Tie
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.surgery.writer import ModelWriter


def share_modules(model: nn.Module) -> None:
    """Let FFNs that hold the same parameters be the same modules, in place: an adapter on one is on all of them.

    peft would put one on each, and merge several updates into the one weight.
    """
    shared = [ffn for ffn in ffns(model) if ffn.tied and not ffn.layout.experts] if has_ffns(model) else []
    apart = [f for f in shared if any(len(f.linears(site)) > 1 for site in f.sites)]
    if apart:
        writer = ModelWriter(model, empty=True)
        for ffn in apart:
            Tie.blank(ffn.name, list(ffn.tied)).perform(writer)


def check_untied(model: nn.Module, names: Iterable[str], asked: str, apart: Iterable[str] = ()) -> None:
    """Raises FfnkitError where the weight of a linear is something else's too, an embedding's above all.

    Args:
        apart: linears that have adapters of their own over one weight on purpose.
    """
    modules = {name: model.get_submodule(name) for name in names}
    writer = ModelWriter(model)
    separate = [model.get_submodule(name) for name in apart]
    for module in modules.values():
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, nn.Embedding):
            writer.check_untied(weight, [module, *separate], asked)


def own_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of these modules those that hold nothing which stands elsewhere too; else what of them does so.

    A copy that is trained in the place of a module has no part in its ties: a language-model head over the embeddings
    would train apart, and be gone once the file is opened.
    """
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(path)

    def whole(name: str, module: Any) -> Iterator[str]:
        own = [paths for p in module.parameters() for paths in (holders[id(p)],)]
        if all(path.startswith(f"{name}.") for paths in own for path in paths):
            yield name
            return
        for child, inner in module.named_children():
            if next(inner.parameters(), None) is not None:
                yield from whole(f"{name}.{child}", inner)

    return [found for name in names for found in whole(name, model.get_submodule(name))]
