"""Statistics of one pass over calibration data as a file, read one FFN at a time: for any width, method and budget."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.fingerprints import model_fingerprint
from ffnkit.calibration.statistics import Accumulator, Statistics
from ffnkit.errors import FfnkitError
from ffnkit.io.files import replacing
from ffnkit.io.tensors import TensorWriter, metadata
from ffnkit.model.ffn import FFN

FORMAT = "ffnkit calibration 1"
PROBE = "probe"  # begins the names of the batches that lie in the file
PROBED = 4096  # tokens that these hold, where there are so many: for metrics of errors, and for the model's end
KEYS = 16  # tensors of one FFN or expert, at most
NARROW = (torch.bfloat16, torch.float16)  # dtypes in which what a model of theirs gave is stored, where that is exact


def is_statistics(path: Path) -> bool:
    """Whether a file says that it holds statistics, of this version or another."""
    return metadata(path).get("format", "").startswith("ffnkit calibration ")


class Stored(Accumulator, Protocol):
    """An accumulator that such files hold."""

    stored: ClassVar[str]  # its name in them


class StatisticsFile:
    """What the FFNs of a model did on calibration data, in a file; takes the place of ``data`` where methods take it.

    Nothing is held in memory but what is asked for. :func:`ffnkit.calibrate` makes one.

    Attributes:
        path: the file. layers: how many experts each FFN has (1 where there are none), by name.
        held: inputs kept of each FFN, at most, for regressions.
        model: fingerprint of the model. data: fingerprints of the batches. dtype: of the weights.
        tokens: of the data, padding too.

    Example:
        >>> statistics = fk.calibrate(model, batches)
        >>> statistics.save("statistics.safetensors")
        >>> fk.plan(model, fk.CalibratedFusion(width=0.5), data=statistics)
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FfnkitError where there is no such file, or one of another form."""
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        asked = f"statistics {self.path}"
        try:
            with safe_open(self.path, "pt") as file:
                given = file.metadata() or {}
                self._keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            found = f"cannot be read ({str(error)[:200]})"
            raise FfnkitError(asked, found, "Name a file of ffnkit calibrate") from None
        if given.get("format") != FORMAT:
            found = "it holds no statistics of this version"
            raise FfnkitError(asked, found, "Make it with ffnkit calibrate MODEL --out FILE")
        self.model, self.dtype, self.data = given["model"], given["dtype"], json.loads(given["data"])
        self.layers, self.held = json.loads(given["layers"]), int(given["held"])
        self.tokens = int(given["tokens"])

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> StatisticsFile:
        """Open a file.

        Args:
            model: whose statistics they have to be.

        Raises:
            FfnkitError: no such file, one of another form, or of another model.
        """
        opened = cls(path)
        if model is not None:
            opened.check(model)
        return opened

    def check(self, model: nn.Module) -> None:
        """Raises FfnkitError where they are not of this model with these weights."""
        if self.model != model_fingerprint(model):
            found = f"they are of other weights, or another dtype, than this {type(model).__name__}"
            raise FfnkitError(f"statistics {self.path}", found, "Calibrate this model anew")

    def save(self, path: str | Path) -> StatisticsFile:
        """Copy the file to a place of its own, in one step, and give what is there."""
        with replacing(path) as new:
            shutil.copyfile(self.path, new)
        return StatisticsFile(path)

    def state(self, name: str, expert: int, kind: str | None = None) -> dict[str, Tensor]:
        """What one accumulator of one FFN or expert saw, or all of them; nothing where no token came."""
        return self._read(f"{name}:{expert}:" + ("" if kind is None else f"{kind}."), torch.float32)

    @cached_property
    def probe(self) -> list[dict[str, Tensor]]:
        """The first batches, with ``PROBED`` tokens at least where there are so many."""
        numbers = sorted({int(key.split(":")[1]) for key in self._keys if key.startswith(f"{PROBE}:")})
        return [self._read(f"{PROBE}:{number}:") for number in numbers]

    def _read(self, start: str, least: torch.dtype | None = None) -> dict[str, Tensor]:
        from safetensors import safe_open

        names = [key for key in self._keys if key.startswith(start)]
        with safe_open(self.path, "pt") as file:  # opened each time: what was read is not kept mapped
            found = {key[len(start) :]: file.get_tensor(key).clone() for key in names}
        return {key: v.to(least) if least is not None and v.dtype in NARROW else v for key, v in found.items()}

    def fill(self, group: list[FFN], seen: Statistics[Any]) -> None:
        """Put into ``seen`` what it would have collected of these FFNs.

        Raises:
            FfnkitError: an FFN is not among ``layers``, or more inputs are asked for than were kept.
        """
        for ffn in group:
            self._check_layer(ffn.name)
            kind = seen.kind(ffn.name)
            for number in range(max(ffn.experts, 1)):
                if state := self.state(ffn.name, number, kind):
                    device = ffn.raw().up.device
                    seen.put(ffn.name, number, {key: value.to(device) for key, value in state.items()})

    def _check_layer(self, name: str) -> None:
        if name not in self.layers:
            found = f"they hold nothing of {name}"
            raise FfnkitError(f"statistics {self.path}", found, "Calibrate with all layers that are to change")


class Together:
    """Several accumulators of the same calls, by their names in files."""

    def __init__(self, *parts: Stored) -> None:
        self.parts = {part.stored: part for part in parts}

    def update(self, given: Any) -> None:
        for part in self.parts.values():
            part.update(given)

    def merge(self, other: Together) -> None:
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{n}.{key}": value for n, part in self.parts.items() for key, value in part.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            part.load({key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")})


Make = Callable[[str], Together]


class StatisticsWriter:
    """Writes such a file FFN by FFN; whole at :meth:`close` or not there.

    Args:
        path: of the file to write.
        given: "model", "data", "tokens", "layers", "held" and "dtype" of :class:`StatisticsFile`;
            numbers are stored in this dtype where that is exact. probe: the first batches.
    """

    def __init__(self, path: Path, given: dict[str, Any], probe: list[Batch]) -> None:
        parts = [name for name, experts in given["layers"].items() for _ in range(experts)]
        names = sum(len(name.encode()) + 40 for name in parts) * KEYS + 100 * sum(map(len, probe))
        told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
        count = len(parts) * KEYS + sum(map(len, probe))
        dtype = getattr(torch, given["dtype"])
        self._dtype = dtype if dtype in NARROW else None
        self._writer = TensorWriter(path, {"format": FORMAT, **told}, count=count, length=names)
        for number, batch in enumerate(probe):
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    self._writer.add(f"{PROBE}:{number}:{key}", value)

    def add(self, name: str, expert: int, part: Accumulator) -> None:
        """Write what one FFN or expert did."""
        for key, value in part.state_dict().items():
            self._writer.add(f"{name}:{expert}:{key}", self._narrowed(value))

    def _narrowed(self, value: Tensor) -> Tensor:
        if self._dtype is None or value.dtype != torch.float32:
            return value
        narrow = value.to(self._dtype)
        return narrow if torch.equal(narrow.float(), value) else value

    def close(self) -> None:
        self._writer.close()

    def drop(self) -> None:
        self._writer.drop()


@contextmanager
def writing(
    path: str | Path | None, given: dict[str, Any], probe: list[Batch]
) -> Iterator[tuple[StatisticsWriter, list[StatisticsFile]]]:
    """A writer, and a list into which the written file comes when the block ends well.

    Args:
        path: None writes a temporary file, which goes with what stands for it.
    """
    done: list[StatisticsFile] = []
    own = Path(tempfile.mkdtemp(prefix="ffnkit-")) if path is None else None
    target = own / "statistics.safetensors" if own is not None else Path(str(path))
    try:
        with replacing(target) as new:
            writer = StatisticsWriter(new, given, probe)
            try:
                yield writer, done
            except BaseException:
                writer.drop()
                raise
            writer.close()
        done.append(StatisticsFile(target))
    except BaseException:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise
    if own is not None:
        weakref.finalize(done[0], shutil.rmtree, own, ignore_errors=True)


def first_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The first batches that hold ``PROBED`` tokens in every stack, whatever each makes of them; else all."""
    taken: list[Batch] = []
    tokens = 0
    for batch in batches:
        taken.append(batch)
        tokens += _least(batch)
        if tokens >= PROBED:
            break
    return taken


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch, padding too; its rows where it has none."""
    names = ("input_ids", "decoder_input_ids")
    ids = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
    return int(ids.numel()) if ids is not None else next(len(v) for v in batch.values() if isinstance(v, Tensor))


def _least(batch: Batch) -> int:
    """Tokens that a stack gets of a batch, at least."""
    counts = []
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            mask = batch.get("attention_mask") if name == "input_ids" else None
            kept = value.ne(-100) if "labels" in name else value.ne(0) if "mask" in name else mask
            counts.append(value.numel() if kept is None else int(kept.ne(0).sum()))
    return min(counts) if counts else next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)
