"""Statistics of a model on data: accumulators that can be updated, merged, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, checked
from ffnkit.calibration.fingerprints import batch_fingerprint, model_fingerprint
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.errors import FfnkitError
from ffnkit.io.files import SPOOL_FROM, disk_errors, spool
from ffnkit.model.ffn import FFN
from ffnkit.ops.moments import Moments

FORMAT = "ffnkit statistics 1"
PROBE = 64  # tokens that tell which activation an FFN has


class Accumulator(Protocol):
    """What is summed or held of one FFN, one expert or one linear. A fresh one is empty and takes any width."""

    def update(self, given: Any, /) -> None:
        """Add what was seen: of FFNs one call."""

    def merge(self, other: Self, /) -> None:
        """Add what ``other`` saw after this one."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors by name; nothing for one that saw nothing."""

    def load(self, state: dict[str, Tensor], /) -> None:
        """Take the place of what this one saw."""


A = TypeVar("A", bound=Accumulator)


class _Sums:
    """Tensors that start at zero and are added up."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, zeros: Callable[[], Tensor] | None = None) -> None:
        """Add to a sum; ``zeros`` makes its start, else float64 ones on the value's device."""
        if name not in self.sums:
            self.sums[name] = zeros() if zeros is not None else torch.zeros_like(value, dtype=torch.float64)
        self.sums[name] += value.to(self.sums[name].device)

    def merge(self, other: Self) -> None:
        for name, value in other.sums.items():
            if name in self.sums:
                self.sums[name] += value.to(self.sums[name].device)
            else:
                self.sums[name] = value.clone()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)


class NeuronSquares(_Sums):
    """Weighted sums of squares of each hidden neuron, (ff,), and of the weights, float64."""

    stored: ClassVar[str] = "neurons"

    def update(self, acts: Activations) -> None:
        rows = acts.kept()
        squares = rows.hidden.float().square()
        weights = squares.new_ones(len(squares)) if rows.weights is None else rows.weights.float()
        self.add("squares", weights @ squares)
        self.add("count", weights.sum(dtype=torch.float64))

    def rms(self) -> Tensor:
        """(ff,), float64."""
        return (self.sums["squares"] / self.sums["count"].clamp_min(1e-300)).sqrt()


class ColumnSquares(_Sums):
    """Weighted sums of squares of each column of rows (n, columns), float64."""

    def update(self, given: tuple[Tensor, Tensor | None]) -> None:
        """Rows, and how much each counts (n,) or None."""
        x, weights = given
        if weights is not None and not bool((counts := weights > 0).all()):
            x, weights = x[counts], weights[counts]
        square = x.detach().float().square()
        self.add(
            "squares", square.sum(0, dtype=torch.float64) if weights is None else weights.double() @ square.double()
        )

    def norms(self) -> Tensor:
        """(columns,), float64."""
        return self.sums["squares"].sqrt()


class GradientSquares(_Sums):
    """Sums of squares of each entry of gradients, (out, in), float32.

    Args:
        zeros: makes the start of the sum; None makes zeros on the gradients' device.
    """

    def __init__(self, zeros: Callable[[], Tensor] | None = None) -> None:
        super().__init__()
        self._zeros = zeros

    def update(self, gradient: Tensor) -> None:
        square = gradient.float().square()
        self.add("squares", square, self._zeros or (lambda: torch.zeros_like(square)))

    def get(self) -> Tensor:
        """(out, in), float32."""
        return self.sums["squares"]


class RoutingCounts(_Sums):
    """How many tokens that count came to an expert, and the sum of their squared routing weights."""

    def update(self, acts: Activations) -> None:
        weights = torch.ones(len(acts.input)) if acts.weights is None else acts.weights
        self.add("tokens", (weights > 0).sum())
        self.add("weight", weights.sum(dtype=torch.float64))


class HiddenMoments:
    """Means and second moments of the hidden activations (:class:`~ffnkit.ops.moments.Moments`)."""

    moments: Moments

    def update(self, acts: Activations) -> None:
        rows = acts.counted()
        if not hasattr(self, "moments"):
            self.moments = Moments(rows.hidden.shape[-1], rows.hidden.device)
        self.moments.add(rows.hidden, rows.weights)

    def merge(self, other: HiddenMoments) -> None:
        if not hasattr(other, "moments"):
            return
        if not hasattr(self, "moments"):
            own = other.moments.state_dict()
            self.load({name: value.clone() for name, value in own.items()})
        else:
            self.moments.merge(other.moments)

    def state_dict(self) -> dict[str, Tensor]:
        return self.moments.state_dict() if hasattr(self, "moments") else {}

    def load(self, state: dict[str, Tensor]) -> None:
        self.moments = Moments.of(state)


class HeldInputs:
    """The first inputs of an FFN or expert, for a regression; float32.

    Args:
        most: tokens held at most.

    Attributes:
        inputs: (n, d) each. weights: (n,) each, where tokens do not count alike. held: tokens in them.
        missing: (n, d) each, where the FFN is to give more than it gives; not in files.
        offered: tokens that there were.
        probe: a few inputs and hidden activations, which tell the activation function.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held, self.offered = most, 0, 0
        self.inputs: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.missing: list[Tensor] = []
        self.probe: tuple[Tensor, ...] = ()

    def update(self, acts: Activations) -> None:
        rows = acts.counted()
        if not self.probe:
            self.probe = tuple(value[:PROBE].float().clone() for value in (rows.input, rows.hidden))
        self.offered += len(rows.input)
        self._take(rows.input, rows.weights, rows.missing)

    def _take(self, inputs: Tensor, weights: Tensor | None, missing: Tensor | None = None) -> None:
        room = self.most - self.held
        if room > 0:
            self.inputs.append(inputs[:room].float())
            for held, rows in ((self.weights, weights), (self.missing, missing)):
                if rows is not None:
                    held.append(rows[:room].float())
            self.held += len(self.inputs[-1])

    def merge(self, other: HeldInputs) -> None:
        self.probe = self.probe or other.probe
        for number, inputs in enumerate(other.inputs):
            self._take(inputs, other.weights[number] if other.weights else None)
        self.offered += other.offered

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"probe.{number}": value for number, value in enumerate(self.probe)}
        if self.offered:
            state["offered"] = torch.tensor(self.offered)
        if self.inputs:
            state["inputs"] = torch.cat(self.inputs)
        return state | ({"weights": torch.cat(self.weights)} if self.weights else {})

    def load(self, state: dict[str, Tensor]) -> None:
        """Raises FfnkitError where fewer were held than this one would have held of the same tokens."""
        self.probe = tuple(state[name] for name in ("probe.0", "probe.1") if name in state)
        self.inputs, self.weights, self.held = [], [], 0
        self.offered = int(state["offered"]) if "offered" in state else 0
        if "inputs" in state:
            self._take(state["inputs"], state.get("weights"))
        if self.held < min(self.most, self.offered):
            found = f"{self.held:,} of {self.offered:,} tokens were kept, and {self.most:,} are asked for"
            raise FfnkitError("inputs for the regression", found, "Keep more when calibrating, or set tokens lower")


class Rows:
    """The first rows of features (n, columns), float32, on the CPU; memory-mapped where they are large.

    Args:
        most: rows held at most.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self._held: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        rows = rows[: self.most - self.count]
        if self._held is None:
            shape = (self.most, rows.shape[1])
            large = self.most * rows.shape[1] * 4 >= SPOOL_FROM
            self._held = spool(shape, torch.float32) if large else torch.zeros(shape)
        self._held[self.count : self.count + len(rows)] = rows.float().cpu()
        self.count += len(rows)

    def get(self) -> Tensor:
        """(n, columns)."""
        return torch.zeros(0, 0) if self._held is None else self._held[: self.count]

    def merge(self, other: Rows) -> None:
        if other.count:
            self.update(other.get())

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.get()} if self.count else {}

    def load(self, state: dict[str, Tensor]) -> None:
        self._held, self.count = None, 0
        if "rows" in state:
            self.update(state["rows"])


class Statistics(Generic[A]):
    """Accumulators of the FFNs of a model, one for each FFN or for each of its experts that tokens reached.

    Args:
        make: an empty accumulator for an FFN.

    Attributes:
        parts: by the FFN's name and the expert's number (0 where there are no experts).
        model, data: fingerprints of the model and of each batch, where :meth:`collect` took them.

    Example:
        >>> first = Statistics.collect(model, half, ffns(model), lambda _: HiddenMoments())
        >>> first.merge(Statistics.collect(model, other_half, ffns(model), lambda _: HiddenMoments()))
        >>> first.save("statistics.safetensors")
    """

    def __init__(self, make: Callable[[str], A]) -> None:
        self._make = make
        self.parts: dict[tuple[str, int], A] = {}
        self.model: str | None = None
        self.data: list[str] = []

    @classmethod
    def collect(
        cls, model: nn.Module, batches: Iterable[Batch], found: list[FFN], make: Callable[[str], A]
    ) -> Statistics[A]:
        """From one pass of the model over the data, with the fingerprints of both."""
        statistics = cls(make)
        statistics.model = model_fingerprint(model)
        watch(model, statistics._noted(batches), found, statistics.update)
        return statistics

    def _noted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in checked(batches):
            self.data.append(batch_fingerprint(batch))
            yield batch

    def update(self, ffn: FFN, acts: Activations) -> None:
        """One call of an FFN; calls without a token that counts are left out."""
        if not len(acts.input) or (acts.weights is not None and not bool((acts.weights > 0).any())):
            return
        key = ffn.name, acts.expert or 0
        if key not in self.parts:
            self.parts[key] = self._make(ffn.name)
        self.parts[key].update(acts)

    def kind(self, name: str) -> str:
        """What the accumulators of an FFN are called in files. Raises FfnkitError where they are none that are kept."""
        kind = getattr(self._make(name), "stored", None)
        if kind is None:
            do = "Give the data themselves: batches, or --text or --task"
            raise FfnkitError("statistics in a file", "they do not hold what is measured here", do)
        return str(kind)

    def put(self, name: str, expert: int, state: dict[str, Tensor]) -> None:
        """Let an accumulator have seen what another one had."""
        self.parts[name, expert] = self._make(name)
        self.parts[name, expert].load(state)

    def get(self, name: str, expert: int = 0) -> A | None:
        """The accumulator; None where no token came."""
        return self.parts.get((name, expert))

    def merge(self, other: Statistics[A]) -> None:
        """Add what ``other`` saw after this one. Raises FfnkitError where it saw another model."""
        if self.model != other.model:
            raise FfnkitError("merging statistics", "they are of two models", "Merge those of one model")
        for key, part in other.parts.items():
            if key not in self.parts:
                self.parts[key] = self._make(key[0])
            self.parts[key].merge(part)
        self.data += other.data

    def save(self, path: str | Path) -> None:
        """One safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}:{expert}:{key}": value.detach().cpu().contiguous()
            for (name, expert), part in self.parts.items()
            for key, value in part.state_dict().items()
        }
        given = {"format": FORMAT, "model": self.model or "", "data": json.dumps(self.data)}
        with disk_errors(path):
            save_file(tensors, path, metadata=given)

    @classmethod
    def load(cls, path: str | Path, make: Callable[[str], A], model: nn.Module | None = None) -> Statistics[A]:
        """What was saved.

        Args:
            model: whose statistics they have to be.

        Raises:
            FfnkitError: no such file, one of another form, or of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                given = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FfnkitError(f"statistics {path}", f"cannot be read ({error})", "Name a file that was saved") from None
        if given.get("format") != FORMAT:
            raise FfnkitError(f"statistics {path}", "it holds no statistics of this version", "Collect them anew")
        statistics = cls(make)
        statistics.model, statistics.data = given["model"] or None, json.loads(given["data"])
        if model is not None and statistics.model != model_fingerprint(model):
            raise FfnkitError(f"statistics {path}", "they are of other weights than the model's", "Collect them anew")
        states: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, expert, rest = key.split(":")
            states.setdefault((name, int(expert)), {})[rest] = value
        for (name, expert), state in states.items():
            statistics.put(name, expert, state)
        return statistics
