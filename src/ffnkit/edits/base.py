"""What every kind of edit is: one description that several interpreters read.

An edit says what becomes of one place of a model: an FFN, an attention, a linear, a layer. It names its place
(``target``), says in which order it goes with others (``stage``), what it saves and how it prints, and hands new
tensors to a :class:`Writer`, which alone changes modules. Numbers are pure: new tensors from those that it reads,
never in place. On a writer without numbers (``empty``, on the meta device) the same ``perform`` gives the structure
alone: that is the rehearsal before every ``apply``, and how a compact checkpoint is rebuilt from its config.

Example: of a plan ``(SelectNeurons("layers.0.mlp", width=2, index=[0, 3]),)`` the in-memory writer reads the FFN's
weights, takes neurons 0 and 3 and puts new parameters in their place; the meta writer puts empty ones of that shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from ffnkit.edits import fields
from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from ffnkit.model.attention import Attention
    from ffnkit.model.ffn import FFN
    from ffnkit.nn.reparametrized import ReparametrizedLinear
    from ffnkit.ops.neurons import Neurons

Quantities = Mapping[str, Mapping[str, float]]


class Stage(IntEnum):
    """The order in which edits of one place go: the normal form of a plan."""

    LAYERS = 0
    EXPERTS = 1
    HEADS = 2
    NEURONS = 3
    SCALE = 4
    TIE = 5
    LOW_RANK = 6
    MASK = 7
    UPDATE = 8
    TRAIN = 9


@dataclass(frozen=True)
class Shape:
    """What a plan knows of one FFN that it edits; ``apply`` refuses a model where any of it differs."""

    name: fields.Name
    width: fields.Size
    d: fields.Size
    gated: bool
    experts: fields.Count
    parameters: fields.Count
    neuron_parameters: fields.Count  # of one neuron, over all experts

    @classmethod
    def of(cls, ffn: FFN) -> Shape:
        """The shape of an FFN; a plan fits it with and without updates beside its weights."""
        per_neuron = sum(
            tensor.numel() // ffn.width for name, tensor in ffn.raw().tensors().items() if name != "down_bias"
        )
        return cls(ffn.name, ffn.width, ffn.d, ffn.gated, ffn.experts, ffn.own_parameters, per_neuron)

    def __str__(self) -> str:
        experts = f"{self.experts} experts of " if self.experts else ""
        return f"{experts}{self.d} x {self.width}{' gated' if self.gated else ''}"


class Writer(Protocol):
    """What an edit asks of an interpreter: places by name, and writing without touching what is there.

    Attributes:
        model: what is edited. empty: whether numbers are left out, so that only structure is written.
    """

    model: Any
    empty: bool

    def ffn(self, name: str) -> FFN: ...

    def attention(self, name: str) -> Attention: ...

    def module(self, name: str) -> Any: ...

    def linears_of(self, weight: nn.Parameter) -> list[nn.Module]: ...

    def check_untied(self, parameter: nn.Parameter, within: Iterable[nn.Module], asked: str) -> None: ...

    def put(self, old: nn.Parameter, value: Tensor, within: Iterable[nn.Module]) -> nn.Parameter: ...

    def replace(self, old: nn.Module, new: nn.Module) -> None: ...

    def resize(self, ffn: FFN, neurons: Neurons) -> None: ...

    def attach(self, ffn: FFN, site: str, layer: type[ReparametrizedLinear], *tensors: Tensor) -> None: ...

    def share(self, ffn: FFN, source: str, name: str) -> None: ...

    def drop_layer(self, name: str) -> None: ...

    def bases(self, left: Tensor, right: Tensor, like: Tensor) -> nn.Module: ...

    def before_updates(self) -> None: ...

    def let_train(self, parts: Sequence[str], values: Mapping[str, Tensor]) -> None: ...

    def keep_noted(self, parameter: nn.Parameter, index: Tensor, axis: int) -> None: ...


Own = TypeVar("Own", bound="Edit")


@dataclass(frozen=True, eq=False)
class Edit:
    """One decision about one place of a model, as data.

    Tensors are small decisions (labels, indices) or new weights; large ones are memory-mapped (``files.spooled``).

    Attributes:
        target: the path of what it edits: an FFN's owner, an attention, a linear; "" for the whole model.
        kind: its name in files. formerly: names that it had there before. version: of its fields.
        stage: its place in the order of edits. precedence: which kind names what an FFN becomes, the lowest first.
    """

    target: str

    kind: ClassVar[str] = ""
    formerly: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1
    stage: ClassVar[Stage]
    precedence: ClassVar[int] = 9
    reshapes: ClassVar[bool] = True  # an FFN; else it is about an attention or a linear
    renumbers: ClassVar[bool] = False  # later places have other names once it is carried out
    joins: ClassVar[bool] = False  # several FFNs become one, or go
    trains: ClassVar[bool] = False  # it sets what trains, and lasts until the model is folded
    bears_updates: ClassVar[bool] = False  # the FFN may carry updates and masks, which lose and keep the same neurons
    bears_masks: ClassVar[bool] = False  # it may carry masks, which go with its weights

    # --- what it is about

    @property
    def touched(self) -> tuple[str, ...]:
        """The FFNs whose shape it changes, by name."""
        return (self.target,) if self.reshapes else ()

    @property
    def claimed(self) -> tuple[str, ...]:
        """The places that no other method of one plan may edit too."""
        return self.touched if self.reshapes else (self.target,)

    @property
    def asked(self) -> str:
        """What is asked for by it, as refusals begin."""
        return f"{self.kind} of {self.target}"

    @property
    def new_width(self) -> int | None:
        """Neurons of the FFN afterwards, where it sets that."""
        return None

    @property
    def neurons_kept(self) -> Tensor | None:
        """Numbers of the neurons that stay whole, (width,) or (E, width) with experts; None where others come."""
        return None

    @property
    def repeats(self) -> bool:
        """Whether a plan may do it twice in one place."""
        return False

    @property
    def zeros(self) -> tuple[int, int] | None:
        """(weights that it sets to zero, all of the linear), where it does."""
        return None

    # --- what it saves, and how it prints

    def saved(self, shape: Shape) -> int:
        """Parameters that an FFN of this shape loses by it."""
        return 0

    @property
    def kept_apart(self) -> int:
        """Parameters that an FFN keeps of its own where it comes to share another's weights."""
        return 0

    @property
    def saved_elsewhere(self) -> int:
        """Parameters that go outside of the FFNs that it touches."""
        return 0

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        """In words, what the FFN ``name`` turns into by these edits of this kind."""
        return ""

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        """Lines of the printed plan about places that are no FFNs, for all edits of this kind."""
        return []

    # --- what it does

    def check(self, writer: Writer) -> None:
        """Raises FfnkitError where the model does not bear the edit; reads only."""

    def perform(self, writer: Writer) -> None:
        """Carry it out through a writer."""
        raise NotImplementedError

    def silenced(self, writer: Writer) -> list[Any]:
        """Hooks under which the model, as it is, gives what it gives by the edit; [] where the edit brings numbers."""
        return []

    # --- as data

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}

    def settings(self) -> dict[str, Any]:
        """The rest of it, as plain data."""
        return {k: v for k, v in self.__dict__.items() if not isinstance(v, Tensor)}

    @classmethod
    def settings_of_today(cls, settings: dict[str, Any], version: int) -> dict[str, Any]:
        """Settings of a file with an older ``version``, as they are called now."""
        return settings

    @classmethod
    def build(cls: type[Own], settings: dict[str, Any], tensors: dict[str, Tensor]) -> Own:
        """An edit from its saved parts. Raises FfnkitError where fields are missing or hold what they may not."""
        asked = f"edit '{cls.kind}' of {str(settings.get('target'))[:200]}"
        edit: Own = fields.read(cls, {**settings, **tensors}, asked)
        if odd := edit.check_fields():
            raise FfnkitError(asked, odd, "Make the plan again")
        return edit

    def check_fields(self) -> str:
        """What of its fields does not go together, in words; "" where all do."""
        return ""


def notes(quantities: Quantities, name: str) -> str:
    """What was measured of a place, as it stands at the end of its line."""
    return "".join(f", {key} {value:.3g}" for key, value in quantities.get(name, {}).items())
