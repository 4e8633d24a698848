"""Whether the files of a compact checkpoint hold what its config describes, told before memory is used for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io.compact import ASKED
from ffnkit.model.config_keys import config_tree
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_linear
from ffnkit.nn.expert_weights import PREFIX
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.surgery.description import IMPOSSIBLE_WIDTH, rows_for

Shapes = dict[str, tuple[int, ...]]
_DO = "Use the config.json that was saved with the weights"


def stored_shapes(files: Iterable[str] | None) -> Shapes:
    """The shape of each tensor in safetensors files; only their heads are read."""
    found: Shapes = {}
    for path in files or ():
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def check_sizes(model: PreTrainedModel, described: dict[str, Any], stored: Shapes) -> None:
    """Raises FfnkitError where a described size is none that the files can hold, or not where the config says.

    Args:
        model: as its plain class builds it.
    """
    largest = max((side for shape in stored.values() for side in shape), default=None)
    tree = dict(config_tree(model.config))
    for name, row in described["ffns"].items():
        sizes = [row["width"], *(special.get("rank") or 0 for special in row["special"].values())]
        if largest is not None and max(sizes) > largest:
            raise FfnkitError(ASKED, f"{name} is said to be {max(sizes)} wide, and no tensor in the file is", _DO)
        if row["key"] is not None:  # a part that is opened alone has its config at another path
            key = row["key"][1]
            found = [getattr(config, key, None) for config in tree.values()]
            if IMPOSSIBLE_WIDTH not in found:
                what = f"{key[:100]} is said to hold the width of {name}, and is {str(found[0])[:50]}"
                raise FfnkitError(ASKED, what, _DO)


def check_contents(model: PreTrainedModel, described: dict[str, Any], stored: Shapes) -> None:
    """Raises FfnkitError where tensors of FFNs and of edited linears are other ones in the files than in the model.

    Names that transformers translates on opening are not looked at.

    Args:
        model: rebuilt as described, without weights.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = _named_as(wanted, stored, getattr(model, "base_model_prefix", ""))
    further = {name for _, names in rows_for(model, described) for name in names[1:]}
    inside: set[str] = set()
    for ffn in ffns(model):
        for owner in ffn.owners:
            paths = tuple(f"{owner}.{ffn.path(site)}" + "." * (not ffn.layout.experts) for site in ffn.sites)
            inside |= {path.rstrip(".") for path in paths}
            own, found = _below(wanted, (f"{owner}.{PREFIX}",)), _below(there, (f"{owner}.{PREFIX}",))
            if owner not in further:
                if _below(there, (f"{owner}.",)):
                    _compare(own, found)
                if found := _below(there, paths):
                    _compare(_below(wanted, paths), found)
            elif found := found or _below(there, paths):
                raise FfnkitError(ASKED, f"{min(found)} is in the file, and its FFN is said to be another one's", _DO)
    for name, module in model.named_modules():
        if name not in inside and (is_linear(module) or isinstance(module, ReparametrizedLinear)):
            own, found = _below(wanted, (f"{name}.",)), _below(there, (f"{name}.",))
            if found and (isinstance(module, ReparametrizedLinear) or found.keys() - own.keys()):
                _compare(own, found)


def _below(shapes: Shapes, starts: tuple[str, ...]) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(starts)}


def _compare(own: Shapes, there: Shapes) -> None:
    if more := sorted(there.keys() - own.keys()):
        raise FfnkitError(ASKED, f"{more[0]} is in the file, and its config describes no such tensor", _DO)
    if less := sorted(own.keys() - there.keys()):
        raise FfnkitError(ASKED, f"{less[0]} is described by its config, and not in the file", _DO)
    for name, shape in own.items():
        if there[name] != shape:
            raise FfnkitError(ASKED, f"{name} is {there[name]} in the file and {shape} by its config", _DO)


def _named_as(wanted: Shapes, stored: Shapes, base: str) -> Shapes:
    """The stored tensors under the names of a model, which may have another head than the one that was saved."""
    modules = {name.rpartition(".")[0] for name in wanted}
    found: Shapes = {}
    for name, shape in stored.items():
        near = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        found[next((each for each in near if each.rpartition(".")[0] in modules), name)] = shape
    return found
