"""Whether the files of a compact checkpoint hold what its config describes, told before memory is used for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io.compact import ASKED
from ffnkit.io.sizes import Shapes
from ffnkit.model.config_values import Place, config_tree, held
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_linear
from ffnkit.nn.expert_weights import PREFIX
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.surgery.description import IMPOSSIBLE_WIDTH, rows_for

_DO = "Use the config.json that was saved with the weights"


def _wider(place: Place, said: Any, width: int) -> bool:
    """Whether a ratio stands for more than an FFN's width, as it does where ffnkit alone is to open the file."""
    return isinstance(said, int | float) and said * place.times > width


def check_sizes(model: PreTrainedModel, described: dict[str, Any], stored: Shapes) -> None:
    """Raises FfnkitError where a described size is none that the files can hold, or not where the config says.

    Config keys are named in ``described`` as this model has them.

    Args:
        model: as its plain class builds it.
    """
    largest = max((side for shape in stored.values() for side in shape), default=None)
    tree = dict(config_tree(model.config))
    for name, row in described["ffns"].items():
        sizes = [row["width"], *(special.get("rank") or 0 for special in row["special"].values())]
        if largest is not None and max(sizes) > largest:
            raise FfnkitError(ASKED, f"{name} is said to be {max(sizes)} wide, and no tensor in the file is", _DO)
        if row["key"] is not None:
            path, key = row["key"]
            path = path if path in tree else ""  # a part that is opened alone: its config is the whole
            place = Place.of(key)
            found = held(tree[path], ("", str(replace(place, times=1))))
            if found != IMPOSSIBLE_WIDTH if place.times == 1 else not _wider(place, found, row["width"]):
                what = f"{key[:100]} is said to hold the width of {name}, and is {str(found)[:50]}"
                raise FfnkitError(ASKED, what, _DO)
            row["key"] = [path, key]


def check_contents(model: PreTrainedModel, described: dict[str, Any], stored: Shapes) -> None:
    """Raises FfnkitError where tensors of FFNs and of edited linears are other ones in the files than in the model.

    Names that transformers translates on opening are not looked at.

    Args:
        model: rebuilt as described, without weights.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = _named_as(wanted, stored, getattr(model, "base_model_prefix", ""))
    marks = Counter(name.rpartition(".")[2] for name in stored if name.rpartition(".")[2].startswith(PREFIX))
    further = {name for _, names in rows_for(model, described) for name in names[1:]}
    base = getattr(model, "base_model_prefix", "")
    body = f"{base}." if base and hasattr(model, base) else ""
    for name in [name for name in wanted if name in there and name.startswith(body)]:
        _compare({name: wanted[name]}, {name: there[name]})
    first = [name for name in wanted if not name.startswith(tuple(f"{owner}." for owner in further))]
    here = Counter(name.rpartition(".")[2] for name in first if name.rpartition(".")[2].startswith(PREFIX))
    if odd := sorted((marks - here) + (here - marks)):
        found_ = f"{marks[odd[0]]} of {odd[0]} are in the file, and its config describes {here[odd[0]]}"
        raise FfnkitError(ASKED, found_, _DO)
    inside: set[str] = set()
    for ffn in ffns(model):
        for owner in ffn.owners:
            below = ffn.tensor_names if ffn.layout.experts else [f"{ffn.path(site)}." for site in ffn.sites]
            paths = tuple(f"{owner}.{name}" for name in below)
            inside |= {path.rstrip(".") for path in paths}
            own, found = _below(wanted, (f"{owner}.{PREFIX}",)), _below(there, (f"{owner}.{PREFIX}",))
            if owner not in further:
                if _below(there, (f"{owner}.",)):
                    _compare(own, found)
                if found := _below(there, paths):
                    _compare(_below(wanted, paths), found)
                continue
            found = found or _below(there, paths)
            apart = {name for name in {**found, **_below(wanted, paths)} if ffn.is_own(name.removeprefix(f"{owner}."))}
            if others := found.keys() - apart:
                raise FfnkitError(ASKED, f"{min(others)} is in the file, and its FFN is said to be another one's", _DO)
            _compare({name: wanted[name] for name in apart if name in wanted}, found)
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
    for name, shape in own.items():  # what is missing is told once all of the model is looked at
        if there.get(name, shape) != shape:
            raise FfnkitError(ASKED, f"{name} is {there[name]} in the file and {shape} by its config", _DO)


def _named_as(wanted: Shapes, stored: Shapes, base: str) -> Shapes:
    """The stored tensors under the names of a model, which may have another head than the one that was saved."""
    modules = {name.rpartition(".")[0] for name in wanted}
    found: Shapes = {}
    for name, shape in stored.items():
        near = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        found[next((each for each in near if each.rpartition(".")[0] in modules), name)] = shape
    return found
