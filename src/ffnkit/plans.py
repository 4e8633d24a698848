"""A plan: what a method would do to a model, as data that can be printed, saved, compared and applied."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffnkit.edits import Edit, Shape, build, fields, known
from ffnkit.edits.base import notes
from ffnkit.edits.fields import adapter, checked
from ffnkit.edits.order import check_normal
from ffnkit.edits.slicing import check_cuttable
from ffnkit.errors import FfnkitError
from ffnkit.io.files import replacing
from ffnkit.io.progress import phase
from ffnkit.io.tensors import metadata
from ffnkit.model.digests import Digests, digests, other_weights
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import check_untouched
from ffnkit.nn.masked import Masked
from ffnkit.ops.neurons import Neurons

FORMAT = 1
Progress = Callable[[int, int, str], None]


def is_plan(path: Path) -> bool:
    """Whether a file says that it is a saved plan, of this format or another."""
    return "ffnkit_plan" in metadata(path)


@dataclass(frozen=True, eq=False)
class Plan:
    """A method's decisions about one model.

    Attributes:
        method: the method's name. settings: its settings.
        model: the model's class name.
        edits: what to do, in order. shapes: the FFNs that it was made for, by name.
        parameters: of the whole model before.
        quantities: measured while planning, by FFN: e.g. the relative clustering error.
        weights: digests of what it holds weights of or was measured on, by place (``model.digests``); empty where any
            model of this shape will do, as in plans of older files.
        report: how the method came to its edits, as plain data: e.g. what a search tried, and the seconds. Neither
            saved nor compared.
        rehearsed: structures of models (``surgery.meta.structure``) that bear its edits; neither saved nor compared.
    """

    method: str
    settings: dict[str, Any]
    model: str
    edits: tuple[Edit, ...]
    shapes: dict[str, Shape]
    parameters: int
    quantities: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    weights: Digests = field(default_factory=dict)
    rehearsed: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    # --- what changes

    def widths(self) -> dict[str, tuple[int, int]]:
        """Neurons before and after of each FFN that gets another number of them."""
        return {e.target: (self.shapes[e.target].width, e.new_width) for e in self.edits if e.new_width is not None}

    @property
    def saved_parameters(self) -> int:
        """Parameters that the model loses."""
        return sum(edit.saved_elsewhere for edit in self.edits) + sum(self.saved(name) for name in self.shapes)

    def saved(self, name: str) -> int:
        """Parameters that one FFN loses; its output bias stays. Zeros of a mask are stored, and not counted.

        An FFN that shares another's weights loses all of its own but what it keeps beside them.
        """
        shape, mine = self.shapes[name], self._of(name)
        sizes = {type(edit) if edit.new_width is not None else id(edit): edit.saved(shape) for edit in mine}
        whole = [edit.saved(shape) for edit in mine if edit.joins and edit.saved(shape)]
        return whole[-1] - sum(edit.kept_apart for edit in mine) if whole else sum(sizes.values())

    def _of(self, name: str) -> list[Edit]:
        """The edits that change an FFN."""
        return [edit for edit in self.edits if name in edit.touched]

    def _becomes(self, name: str) -> str:
        """In words, what an FFN turns into."""
        mine = self._of(name)
        kind = type(min(mine, key=lambda edit: edit.precedence))
        return kind.becomes([edit for edit in mine if edit.precedence == kind.precedence], name)

    @property
    def trains(self) -> bool:
        """Whether it sets what trains."""
        return any(edit.trains for edit in self.edits)

    def __str__(self) -> str:
        given = {k: v for k, v in self.settings.items() if v is not None}
        shown = {k: "by layer" if isinstance(v, dict) else repr(v) for k, v in given.items()}
        settings = ", ".join(f"{key}={value}" for key, value in shown.items())
        lines = [f"{self.method}({settings}) for {self.model}"]
        name_width = max((len(name) for name in self.shapes), default=0)
        for name, shape in self.shapes.items():
            left = shape.parameters - self.saved(name)
            lines.append(
                f"  {name:<{name_width}}  {shape}  ->  {self._becomes(name)},"
                f" {shape.parameters:,} -> {left:,} parameters{notes(self.quantities, name)}"
            )
        by_kind = [(kind, [edit for edit in self.edits if type(edit) is kind]) for kind in known()]
        lines += [line for kind, mine in by_kind for line in kind.lines(mine, self.quantities) if not kind.trains]
        if (flops := self.report.get("flops")) is not None:
            part = 1 - flops["after"] / max(flops["before"], 1e-300)
            lines.append(
                f"  body: {flops['before'] / 1e6:.3f} -> {flops['after'] / 1e6:.3f} MFLOPs a token in linears"
                f" ({part:.1%} fewer)"
            )
        if self.trains:
            lines += [line for kind, mine in by_kind for line in kind.lines(mine, self.quantities) if kind.trains]
            return "\n".join(lines)
        after_all = self.parameters - self.saved_parameters
        share = 100 * self.saved_parameters / max(self.parameters, 1)
        lines.append(f"  model: {self.parameters:,} -> {after_all:,} parameters ({share:.1f}% fewer)")
        return "\n".join(lines)

    # --- with others

    def then(self, later: Plan) -> Plan:
        """This plan and one that was made for the model that it leaves, as one plan for the model as it is.

        Edits of one place go by ``edits.base.Stage``: layers, experts, heads, neurons, scales, ties, thin pairs, masks,
        updates; each once (``edits.order``).

        Raises:
            FfnkitError: it was made for another model, edits a place twice or in another order, or comes after layers
                went: apply this plan first then, and that one to what it leaves.
        """
        asked = f"{later.method} after {self.method}"
        if later.model != self.model or later.parameters != self.parameters - self.saved_parameters:
            what = f"it was made for {later.model} of {later.parameters:,} parameters"
            left = self.parameters - self.saved_parameters
            raise FfnkitError(asked, what, f"Plan it for what this plan leaves, {self.model} of {left:,}")
        if any(edit.renumbers for edit in self.edits):
            raise FfnkitError(asked, "the layers have other numbers by then", "Apply the first, then plan the second")
        edits = (*self.edits, *later.edits)
        check_normal(edits)
        return Plan(
            method=f"{self.method}+{later.method}",
            settings={"methods": [{"method": p.method, **p.settings} for p in (self, later)]},
            model=self.model,
            edits=edits,
            shapes={**later.shapes, **self.shapes},
            parameters=self.parameters,
            quantities={**self.quantities, **later.quantities},
            weights={p: d for p, d in later.weights.items() if not self._changes(p)} | self.weights,
            report={p.method: p.report for p in (self, later) if p.report},
        )

    def _changes(self, place: str) -> bool:
        """Whether it edits a place, or something in it or around it."""
        mine = (f"{name}." for edit in self.edits for name in (*edit.touched, *edit.claimed))
        return any(name.startswith(f"{place}.") or f"{place}.".startswith(name) for name in mine)

    # --- whether it fits

    def check_fits(self, found: dict[str, FFN], model: str) -> None:
        """Raises FfnkitError where the FFNs of a model, by name, are not those that the plan was made for."""
        asked = f"applying a plan for {self.model} to {model}"
        for name, shape in self.shapes.items():
            if name not in found:
                raise FfnkitError(asked, f"it has no FFN {name}", "Make the plan for this model")
            here = Shape.of(found[name])
            if here != shape:
                what = f"{name} is {here} where the plan was made for {shape}"
                raise FfnkitError(asked, what, "Make the plan for this model")
            mine = self._of(name)
            if all(edit.bears_updates for edit in mine):  # weights, masks and updates lose the same neurons
                check_cuttable(found[name], f"applying a plan to {model}")
            else:
                masks = (Masked.kind,) if all(edit.bears_masks for edit in mine) else ()
                found[name].check_plain(f"applying a plan to {model}", but=masks)

    def check_weights(self, model: nn.Module) -> None:
        """Raises FfnkitError where a model of the right shape has other weights than the plan was made for."""
        place = other_weights(model, self.weights)
        if place is not None:
            what = f"{place} has other weights than the plan was made for"
            asked = f"applying a plan for {self.model} to {type(model).__name__}"
            raise FfnkitError(asked, what, "Make the plan for this model")

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
            **({"weights": self.weights} if self.weights else {}),
            "edits": [
                {"kind": e.kind, "version": e.version, "settings": e.settings(), "tensors": sorted(e.tensors())}
                for e in self.edits
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan to one safetensors file (tensors, and the rest as JSON in its metadata), in one step."""
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
        told = {"ffnkit_plan": json.dumps(self.description())} | ({"same": json.dumps(same)} if same else {})
        with replacing(path) as new:
            save_file(tensors, new, metadata=told)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises FfnkitError where it is missing, damaged or of another format."""
        asked = f"plan '{path}'"
        if os.path.exists(path) and not os.path.isfile(path):
            raise FfnkitError(asked, "it cannot be read (it is no regular file)", "Name a saved plan")
        try:
            with safe_open(path, framework="pt") as file:
                head = file.metadata() or {}
                if "ffnkit_plan" not in head:
                    raise FfnkitError(asked, "a safetensors file without a plan", "Name a saved plan")
                data = json.loads(head["ffnkit_plan"])
                if isinstance(data, dict) and data.get("format") != FORMAT:
                    raise FfnkitError(asked, f"format {str(data.get('format'))[:50]}", "Make the plan again")
                told = checked(adapter(_Told), data, asked)
                read = _Reader(file, checked(adapter(dict[str, str]), json.loads(head.get("same", "{}")), asked))
                found = tuple(
                    build(e.kind, e.settings, {n: read(f"{number}.{n}") for n in e.tensors}, e.version)
                    for number, e in enumerate(told.edits)
                )
        except (OSError, SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise FfnkitError(asked, f"it cannot be read ({str(error)[:300]})", "Make the plan again") from error
        shapes = {shape.name: shape for shape in (fields.read(Shape, each, asked) for each in told.shapes)}
        touched = {name for edit in found for name in edit.touched}
        if odd := sorted(touched ^ set(shapes)):
            what = f"it edits {odd[0]}, whose shape it does not tell, or the other way round"
            raise FfnkitError(asked, what, "Make the plan again")
        own = {
            key: getattr(told, key) for key in ("method", "settings", "model", "parameters", "quantities", "weights")
        }
        return cls(**own, edits=found, shapes=shapes)


_Dtype = Annotated[str, Field(pattern="^(float64|float32|bfloat16|float16)$")]


class _ToldEdit(BaseModel):
    """An edit as it lies in a file."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    kind: fields.Name
    version: fields.Count = 1
    settings: dict[str, Any]
    tensors: list[fields.Name]


class _Told(BaseModel):
    """A plan as it lies in a file, without its tensors."""

    model_config = ConfigDict(strict=True, extra="ignore")
    method: str
    settings: dict[str, Any]
    model: str
    parameters: fields.Count
    shapes: list[dict[str, Any]]
    quantities: dict[str, dict[str, float]]
    weights: dict[str, Annotated[dict[_Dtype, str], Field(min_length=1)]] = {}
    edits: list[_ToldEdit]


class _Reader:
    """Tensors of a file by name; those under several names are one object again."""

    def __init__(self, file: Any, same: dict[str, str]) -> None:
        self.file, self.same, self.there = file, same, set(file.keys())
        self.held: dict[str, Tensor] = {}
        self.several = set(same.values())

    def __call__(self, name: str) -> Tensor:
        name = self.same.get(name, name)
        if name not in self.there:
            raise FfnkitError("reading a plan", f"its tensor {name[:100]} is missing", "Make the plan again")
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
    """A method: a frozen dataclass of settings that drafts edits and changes nothing.

    One whose edits have nothing to do with the numbers in the model says ``reads_weights = False``: its plans fit every
    model of the shape.
    """

    name: ClassVar[str]

    def settings(self) -> dict[str, Any]: ...

    def draft(self, model: nn.Module, data: Iterable[dict[str, Tensor]] | None, progress: Progress | None) -> Draft: ...


class Measured(Protocol):
    """What data did in a model, in a file: :class:`ffnkit.StatisticsFile`."""

    path: Path

    def check(self, model: nn.Module) -> None:
        """Raises FfnkitError where it is of another model."""
        ...


def plan(
    model: nn.Module,
    method: Method,
    data: Iterable[dict[str, Tensor]] | Measured | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan of a method's draft, untried; arguments and errors as of ``surgery.planning.plan``, which tries it."""
    check_untouched(model, f"{method.name} on {type(model).__name__}")
    try:
        shapes = {ffn.name: Shape.of(ffn) for ffn in ffns(model)}
        with torch.no_grad(), phase(f"planning {method.name}") as step:
            draft = method.draft(model, cast(Any, data), progress or step)
    except FfnkitError as error:
        asked = f"{method.name} on {type(model).__name__}"
        raise error.within(asked) from error
    places = [name for e in draft.edits for name in (*e.touched, *e.claimed) or (e.target,) if name]
    return Plan(
        method=method.name,
        settings=method.settings(),
        model=type(model).__name__,
        edits=draft.edits,
        shapes={name: shapes[name] for edit in draft.edits for name in edit.touched},
        parameters=sum(p.numel() for p in model.parameters()),
        quantities=draft.quantities,
        report=draft.report,
        weights=digests(model, places) if getattr(method, "reads_weights", True) else {},
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
