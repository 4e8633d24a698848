"""A plan: what a method would do to a model, as data that can be printed, saved, compared and applied."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffnkit.edits import kinds as edits
from ffnkit.edits.kinds import Adapt, Drop, Edit, Factor, Heads, Mask, Tie, Train
from ffnkit.errors import FfnkitError
from ffnkit.io.files import disk_errors
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.adapted import Adapted
from ffnkit.ops.neurons import Neurons

FORMAT = 1
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Shape:
    """What a plan knows of one FFN that it edits; ``apply`` refuses a model where any of it differs."""

    name: str
    width: int
    d: int
    gated: bool
    experts: int
    parameters: int
    neuron_parameters: int  # of one neuron, over all experts

    @classmethod
    def of(cls, ffn: FFN) -> Shape:
        per_neuron = sum(
            tensor.numel() // ffn.width for name, tensor in ffn.raw().tensors().items() if name != "down_bias"
        )
        own = ffn.num_parameters - _beside(ffn)
        return cls(ffn.name, ffn.width, ffn.d, ffn.gated, ffn.experts, own, per_neuron)

    def __str__(self) -> str:
        experts = f"{self.experts} experts of " if self.experts else ""
        return f"{experts}{self.d} x {self.width}{' gated' if self.gated else ''}"


def _beside(ffn: FFN) -> int:
    """Numbers that train beside the weights of an FFN: a plan fits the model with and without them."""
    linears = [] if ffn.layout.experts else [ffn.linear(site) for site in ffn.sites]
    own = [p for m in linears if isinstance(m, Adapted) for p in m.named_parameters(recurse=False)]
    return sum(p.numel() for name, p in own if name not in ("base", "bias"))


@dataclass(frozen=True, eq=False)
class Plan:
    """A method's decisions about one model.

    Attributes:
        method: the method's name. settings: its settings.
        model: the model's class name.
        edits: what to do, in order. shapes: the FFNs that it was made for, by name.
        parameters: of the whole model before.
        quantities: measured while planning, by FFN: e.g. the relative clustering error.
        report: how the method came to its edits, as plain data: e.g. what a search tried, and the seconds. Neither
            saved nor compared.
    """

    method: str
    settings: dict[str, Any]
    model: str
    edits: tuple[Edit, ...]
    shapes: dict[str, Shape]
    parameters: int
    quantities: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    # --- what changes

    def widths(self) -> dict[str, tuple[int, int]]:
        """Neurons before and after of each FFN that gets another number of them."""
        return {e.ffn: (self.shapes[e.ffn].width, e.width) for e in self.edits if hasattr(e, "width")}

    @property
    def saved_parameters(self) -> int:
        gone = sum(edit.parameters for edit in self.edits if isinstance(edit, Heads))
        return gone + sum(self.saved(name) for name in self.shapes)

    def saved(self, name: str) -> int:
        """Parameters that one FFN loses; its output bias stays. Zeros of a mask are stored, and not counted.

        An FFN that shares another's weights loses all of its own.
        """
        shape = self.shapes[name]
        if name in self._shared():
            return shape.parameters
        if (drop := self._dropped().get(name)) is not None:
            return shape.parameters + drop.parameters
        before, after = self.widths().get(name, (shape.width, shape.width))
        thin = [e for e in self.edits if isinstance(e, Factor) and e.ffn == name]
        factored = sum(len(e.second) * e.first.shape[1] - e.first.numel() - e.second.numel() for e in thin)
        return shape.neuron_parameters * (before - after) + factored

    def _shared(self) -> dict[str, str]:
        """The FFN whose weights it will use, by the name of each FFN that loses its own."""
        return {member: edit.ffn for edit in self.edits if isinstance(edit, Tie) for member in edit.members}

    def _dropped(self) -> dict[str, Drop]:
        return {edit.ffn: edit for edit in self.edits if isinstance(edit, Drop)}

    def _becomes(self, name: str) -> str:
        """In words, what an FFN turns into."""
        if name in self._shared():
            return f"shares {self._shared()[name]}"
        if name in self._dropped():
            return f"gone with {self._dropped()[name].layer}"
        mine = [edit for edit in self.edits if edit.ffn == name]
        ties = [edit for edit in mine if isinstance(edit, Tie)]
        if ties:
            return f"{'the mean of' if ties[0].average else 'shared by'} {1 + len(ties[0].members)} FFNs"
        if name in self.widths():
            return f"{self.widths()[name][1]} neurons"
        if ranks := [len(edit.first) for edit in mine if isinstance(edit, Factor)]:
            return f"rank {', '.join(map(str, dict.fromkeys(ranks)))}"
        kept = [edit for edit in mine if isinstance(edit, Mask)]
        nonzero, total = sum(mask.kept for mask in kept), sum(math.prod(mask.shape) for mask in kept)
        return f"{nonzero:,} of {total:,} weights not zero"

    def _head_lines(self) -> list[str]:
        """A line for each attention that loses heads."""
        found = [edit for edit in self.edits if isinstance(edit, Heads)]
        name_width = max((len(edit.ffn) for edit in found), default=0)
        lines = []
        for edit in found:
            units = f" ({edit.units} -> {len(edit.index)} groups)" if edit.units != edit.heads else ""
            notes = "".join(f", {key} {value:.3g}" for key, value in self.quantities.get(edit.ffn, {}).items())
            lines.append(
                f"  {edit.ffn:<{name_width}}  {edit.heads} heads  ->  {edit.left}{units},"
                f" {edit.parameters:,} parameters fewer{notes}"
            )
        return lines

    def _masked_lines(self) -> list[str]:
        """A line for each linear that gets zeros, and one for all weights that do."""
        masks = [edit for edit in self.edits if isinstance(edit, Mask)]
        linears = [edit for edit in masks if not edit.site]
        if not linears:
            return []
        sizes = {id(edit): (math.prod(edit.shape), edit.kept) for edit in masks}
        name_width = max(len(edit.ffn) for edit in linears)
        lines = []
        for edit in linears:
            total, kept = sizes[id(edit)]
            shape = " x ".join(map(str, edit.shape))
            notes = "".join(f", {key} {value:.3g}" for key, value in self.quantities.get(edit.ffn, {}).items())
            lines.append(f"  {edit.ffn:<{name_width}}  {shape}, {1 - kept / max(total, 1):.1%} zero{notes}")
        total, kept = (sum(size[place] for size in sizes.values()) for place in (0, 1))
        share = f"{total - kept:,} of {total:,} weights zero ({1 - kept / max(total, 1):.1%})"
        return [*lines, f"  masks: {share}; they are stored and multiplied as before: no memory or time is saved"]

    def __str__(self) -> str:
        given = {k: v for k, v in self.settings.items() if v is not None}
        shown = {k: "by layer" if isinstance(v, dict) else repr(v) for k, v in given.items()}
        settings = ", ".join(f"{key}={value}" for key, value in shown.items())
        lines = [f"{self.method}({settings}) for {self.model}"]
        name_width = max((len(name) for name in self.shapes), default=0)
        for name, shape in self.shapes.items():
            left = shape.parameters - self.saved(name)
            notes = "".join(f", {key} {value:.3g}" for key, value in self.quantities.get(name, {}).items())
            lines.append(
                f"  {name:<{name_width}}  {shape}  ->  {self._becomes(name)},"
                f" {shape.parameters:,} -> {left:,} parameters{notes}"
            )
        lines += self._head_lines()
        lines += self._masked_lines()
        if (flops := self.report.get("flops")) is not None:
            part = 1 - flops["after"] / max(flops["before"], 1e-300)
            lines.append(
                f"  body: {flops['before'] / 1e6:.3f} -> {flops['after'] / 1e6:.3f} MFLOPs a token in linears"
                f" ({part:.1%} fewer)"
            )
        adapted = [edit for edit in self.edits if isinstance(edit, Adapt)]
        if adapted:
            name_width = max(len(edit.ffn) for edit in adapted)
            for edit in adapted:
                notes = "".join(f", {key} {value:.3g}" for key, value in self.quantities.get(edit.ffn, {}).items())
                lines.append(f"  {edit.ffn:<{name_width}}  ->  {edit.layer}, {edit.trained:,} numbers train{notes}")
            also = [part for edit in self.edits if isinstance(edit, Train) for part in edit.parts]
            lines.append(f"  beside them train: {', '.join(also) or 'nothing'}")
            return "\n".join(lines)
        after_all = self.parameters - self.saved_parameters
        share = 100 * self.saved_parameters / max(self.parameters, 1)
        lines.append(f"  model: {self.parameters:,} -> {after_all:,} parameters ({share:.1f}% fewer)")
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or self.description() != other.description():
            return False
        pairs = zip(self.edits, other.edits, strict=True)
        return all(torch.equal(v, b.tensors()[k]) for a, b in pairs for k, v in a.tensors().items())

    __hash__ = None  # type: ignore[assignment]

    # --- as a file

    def description(self) -> dict[str, Any]:
        """The plan without its tensors, as plain data."""
        return {
            "format": FORMAT,
            "method": self.method,
            "settings": self.settings,
            "model": self.model,
            "parameters": self.parameters,
            "shapes": [shape.__dict__ for shape in self.shapes.values()],
            "quantities": self.quantities,
            "edits": [{"kind": e.kind, "settings": e.settings(), "tensors": sorted(e.tensors())} for e in self.edits],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan to one safetensors file (tensors, and the rest as JSON in its metadata)."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        stored: dict[tuple[Any, ...], str] = {}  # what several edits share is written once
        same: dict[str, str] = {}
        for number, edit in enumerate(self.edits):
            for name, value in edit.tensors().items():
                key = (value.data_ptr(), value.dtype, value.shape, value.stride())
                if value.numel() and key in stored:
                    same[f"{number}.{name}"] = stored[key]
                else:
                    stored[key] = f"{number}.{name}"
                    tensors[f"{number}.{name}"] = value.detach().contiguous()
        temporary = path.with_name(f".{path.name}.tmp")
        with disk_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            try:
                metadata = {"ffnkit_plan": json.dumps(self.description())}
                save_file(tensors, temporary, metadata=metadata | ({"same": json.dumps(same)} if same else {}))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises FfnkitError where it is missing, damaged or of another format."""
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("ffnkit_plan")
                if text is None:
                    raise FfnkitError(f"plan '{path}'", "a safetensors file without a plan", "Name a saved plan")
                data = json.loads(text)
                if data["format"] != FORMAT:
                    raise FfnkitError(f"plan '{path}'", f"format {data['format']}", "Make the plan again")
                read = _Reader(file, json.loads((file.metadata() or {}).get("same", "{}")))
                found = tuple(
                    edits.build(e["kind"], e["settings"], {n: read(f"{number}.{n}") for n in e["tensors"]})
                    for number, e in enumerate(data["edits"])
                )
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise FfnkitError(f"plan '{path}'", f"it cannot be read ({error})", "Make the plan again") from error
        shapes = {s["name"]: Shape(**s) for s in data["shapes"]}
        return cls(
            data["method"], data["settings"], data["model"], found, shapes, data["parameters"], data["quantities"]
        )


class _Reader:
    """Tensors of a file by name; those under several names are one object again."""

    def __init__(self, file: Any, same: dict[str, str]) -> None:
        self.file, self.same = file, same
        self.held: dict[str, Tensor] = {}
        self.several = set(same.values())

    def __call__(self, name: str) -> Tensor:
        name = self.same.get(name, name)
        if name not in self.several:
            return self.file.get_tensor(name)
        if name not in self.held:
            self.held[name] = self.file.get_tensor(name)
        return self.held[name]


@dataclass(frozen=True)
class Draft:
    """What a method returns: its edits, what it measured for each FFN, and how it came to them."""

    edits: tuple[Edit, ...]
    quantities: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A method: a frozen dataclass of settings that drafts edits and changes nothing."""

    name: str

    def settings(self) -> dict[str, Any]: ...

    def draft(self, model: nn.Module, data: Iterable[dict[str, Tensor]] | None, progress: Progress | None) -> Draft: ...


def plan(
    model: nn.Module,
    method: Method,
    data: Iterable[dict[str, Tensor]] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What ``method`` would do to ``model``; changes nothing.

    Args:
        model: a transformers model.
        method: settings such as ``Fusion(width=0.25, layers="last:8")``.
        data: batches for ``model(**batch)``, for methods that ask for them.
        progress: called with (done, total, FFN name) after each FFN.

    Raises:
        FfnkitError: naming model and method, where the settings do not fit the model.
    """
    try:
        shapes = {ffn.name: Shape.of(ffn) for ffn in ffns(model)}
        with torch.no_grad():
            draft = method.draft(model, data, progress)
    except FfnkitError as error:
        asked = f"{method.name} on {type(model).__name__}"
        if any(hasattr(module, "base_layer") for module in model.modules()):  # linears that nobody recognizes
            what = f"it carries an adapter of peft ({error.asked}: {error.found})"
            raise FfnkitError(asked, what, "Merge the adapter first") from error
        raise error.within(asked) from error
    return Plan(
        method=method.name,
        settings=method.settings(),
        model=type(model).__name__,
        edits=draft.edits,
        shapes={name: shapes[name] for edit in draft.edits for name in edit.touched},
        parameters=sum(p.numel() for p in model.parameters()),
        quantities=draft.quantities,
        report=draft.report,
    )


def check_weights(neurons: Neurons, name: str) -> None:
    """Raises FfnkitError where the weights cannot be computed with: on the meta device, quantized, NaN or infinite."""
    for key, value in neurons.tensors().items():
        if value.device.type == "meta":
            raise FfnkitError(f"weights of {name}", "the model is empty (meta device)", "Load the weights first")
        if not value.is_floating_point() or type(value) not in (Tensor, nn.Parameter):
            do = "Compress the model in float, save it, and load that with quantization_config"
            raise FfnkitError(f"weights of {name}", f"{key} is quantized ({type(value).__name__} {value.dtype})", do)
        # A sum is finite only if all terms are, and costs no further memory.
        if not bool(torch.isfinite(value.detach().sum())) and not bool(torch.isfinite(value).all()):
            raise FfnkitError(f"weights of {name}", f"{key} holds NaN or infinity", "Repair the model's weights first")
