"""What stays on a model after tuning since no weight can hold it: bottleneck adapters, and peft's prefixes.

It is saved beside its base, in the folders of ``io.apart``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.io.apart import BOTTLENECK, PREFIX
from ffnkit.io.files import read_json
from ffnkit.io.loading import open_errors
from ffnkit.model.linear import added_to, is_linear, output_width
from ffnkit.nn.bottleneck import Bottleneck, bottlenecks, places
from ffnkit.settings.checked import Checked

_CONFIG = "bottleneck.json"
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class _Described(Checked):
    """What ``bottleneck.json`` says: the linears, and how the adapters behind them are made."""

    size: Annotated[int, Field(gt=0)]
    activation: str
    places: tuple[str, ...]


def base_of(model: Any) -> Any:
    """The model below a prefix of peft, or the model itself."""
    return model.get_base_model() if added_to(model) == "prefix" else model


def insert(model: nn.Module, names: tuple[str, ...], size: int, activation: str) -> None:
    """Put adapters behind the linears of these names, in place; one behind a linear that stands in several places.

    Raises:
        FfnkitError: there is no such linear, or the activation is none that transformers knows.
    """
    from transformers.activations import ACT2FN

    asked = f"bottleneck adapters on {type(model).__name__}"
    if activation not in ACT2FN or any(True for _ in ACT2FN[activation].parameters()):  # they would be in no file
        what = "it has numbers of its own" if activation in ACT2FN else "there is no such one"
        raise FfnkitError(f"{asked}: activation {activation}", what, "Use gelu, relu or silu")
    made: dict[int, Bottleneck] = {}
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if linear is None or not is_linear(linear):
            raise FfnkitError(asked, f"it has no linear {name}", "Give the model that they were trained for")
        made[id(linear)] = Bottleneck(linear, output_width(linear), size, activation)
    for name, adapter in places(model, made).items():
        model.set_submodule(name, adapter)


def remove_added(model: Any) -> Any:
    """The plain model without what a tuner of this kind left on it, which is lost; changed in place.

    Raises:
        FfnkitError: nothing of the kind is on it.
    """
    kind = added_to(model)
    if not kind:
        do = "Updates of weights are taken off by remove_adapter"
        raise FfnkitError(f"taking adapters off {type(model).__name__}", "no bottleneck or prefix is on it", do)
    plain = base_of(model)
    for name, linear in places(plain, {id(each): each.base_layer for each in bottlenecks(plain).values()}).items():
        plain.set_submodule(name, linear)
    return plain


@contextmanager
def without_added(model: Any) -> Iterator[Any]:
    """The plain model while the block runs; what was on it is there again afterwards."""
    from ffnkit.surgery.journal import State

    before = State.of(model)
    try:
        yield remove_added(model)
    finally:
        before.restore()


def write_added(model: Any, folder: Path) -> None:
    """Write bottleneck adapters as a file of tensors and a description, a prefix in peft's form."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    if added_to(model) == "prefix":
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's own card, of nothing that is known here
        return
    found = bottlenecks(model)
    tensors = {f"{n}.{part}": each.get_parameter(part) for n, each in found.items() for part in _PARTS}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / BOTTLENECK)
    first = next(iter(found.values()))
    about = _Described(size=first.down.out_features, activation=first.activation, places=tuple(found))
    (folder / _CONFIG).write_text(json.dumps(about.model_dump(), indent=2) + "\n", encoding="utf-8")


def _with_prefix(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, PeftModelForCausalLM

    from ffnkit.nn.prefix import PrefixModel

    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    config: Any = PeftConfig.from_pretrained(str(folder))
    loaded = (PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PrefixModel)(model, config)
    loaded.load_adapter(str(folder), "default")
    for name, parameter in model.named_parameters():  # peft freezes all of it
        parameter.requires_grad_(flags[name])
    loaded.prompt_encoder.requires_grad_(True)
    return loaded.eval()


def put_added(model: Any, folder: Path) -> Any:
    """The model that was opened as the base, with what lies in the folder on it; it may train on.

    Raises:
        FfnkitError: the files are damaged, or made for another model.
    """
    asked = f"adapter {folder}"
    if (folder / PREFIX).is_file():
        with open_errors(asked):
            return _with_prefix(model, folder)
    from safetensors.torch import load_file

    try:
        about = _Described.model_validate(read_json(folder / _CONFIG) or {})
    except ValidationError as error:
        raise FfnkitError(asked, f"{_CONFIG} is damaged ({error.error_count()} fields)", "Save it anew") from None
    with open_errors(asked):
        tensors = load_file(folder / BOTTLENECK)
    for place in about.places:  # before memory is used for what the description says
        if (down := tensors.get(f"{place}.down.weight")) is None or len(down) != about.size:
            raise FfnkitError(asked, f"its file holds no adapter of size {about.size} for {place}", "Save it anew")
    insert(model, about.places, about.size, about.activation)
    own = {f"{n}.{part}": each.get_parameter(part) for n, each in bottlenecks(model).items() for part in _PARTS}
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if odd := sorted([*(own.keys() ^ tensors.keys()), *other]):
        raise FfnkitError(asked, f"{odd[0]} is not in both the file and the model, in one shape", "Save it anew")
    for name, parameter in own.items():
        parameter.data = tensors[name].to(parameter)
    return model.eval()
