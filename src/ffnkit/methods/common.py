"""What the methods share: which FFNs, which widths, checks, and what data tell about hidden neurons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, check_batches, telling
from ffnkit.calibration.hooks import watch
from ffnkit.calibration.statistics import NeuronSquares, Statistics
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.edits import ClusterNeurons
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.targets import one_a_weight, resolve_width, select
from ffnkit.model.targets import targets as sited
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.ops.clusters import cluster_neurons
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc, WhichLayers, check, told

Width = int | float | Mapping[str, int]
Layers = Annotated[WhichLayers, Doc('which layers, e.g. "all", "last:8", "4-11", [4, 5, 9], "encoder:last:4".')]
COMPRESSED = "what each layer gets once those before it are compressed (sequential=true)"
Sequential = Annotated[
    bool, Doc("calibrate each layer on what the compressed layers before it give, else on the model as it was.")
]


@dataclass(frozen=True)
class Narrowing:
    """What methods have in common that leave each FFN a width, or the parameters of one of that width."""

    width: Annotated[
        Width,
        Doc("neurons left in each FFN: an int counts them, a float is a share (1.0 = all); or one by FFN's name."),
    ]
    layers: Layers = "all"

    by_ffn: ClassVar[bool] = False  # whether what it decides of an FFN from weights hangs on no other FFN

    @property
    def beyond(self) -> str | None:
        """What it needs of data that statistics of hidden neurons do not hold, in words; None where they do."""
        return "the data themselves"

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return told(self)

    def draft(self, model: nn.Module, data: Any, progress: Progress | None) -> Draft:
        """The edits, and what is told of them."""
        raise NotImplementedError

    def chosen(self, model: nn.Module) -> list[tuple[FFN, int]]:
        """The FFNs to narrow and their new widths. Raises FfnkitError where layers or settings do not fit."""
        check(self)
        return targets(model, self.layers, self.width)


def targets(model: nn.Module, layers: WhichLayers, width: Width) -> list[tuple[FFN, int]]:
    """The FFNs to narrow and their new widths.

    Args:
        width: neurons left: an int counts them, a float is a share, a mapping gives each FFN by name its own; FFNs
            that the mapping leaves out stay as they are.

    Raises:
        FfnkitError: layers or width do not fit, or the mapping names an FFN that is not there.
    """
    chosen = select(ffns(model), layers)
    if not isinstance(width, Mapping):
        return [(ffn, resolve_width(width, ffn.width, ffn.name)) for ffn in chosen]
    known = {ffn.name for ffn in chosen}
    unknown = [name for name in width if name not in known]
    if unknown:
        raise FfnkitError(f"width of {unknown[0]}", "no FFN of that name is chosen", f"There are {', '.join(known)}")
    return [(ffn, resolve_width(width[ffn.name], ffn.width, ffn.name)) for ffn in chosen if ffn.name in width]


def plain_linears(model: nn.Module, method: str, targets: str, layers: WhichLayers) -> dict[str, nn.Module]:
    """The linears that updates of a method may stand beside, by name.

    Raises:
        FfnkitError: nothing matches; experts in one 3-D parameter, a linear that is edited already, an embedding.
    """
    names, experts = sited(model, targets, layers)
    asked = f"{method} on {type(model).__name__}"
    if experts:
        what = f"{experts[0]} holds the weights of several experts in one 3-D parameter"
        raise FfnkitError(asked, what, "Name linears with targets, or use lora, which adapts such parameters")
    found = {name: model.get_submodule(name) for name in one_a_weight(model, names)}
    for name, linear in found.items():
        if isinstance(linear, ReparametrizedLinear):
            raise FfnkitError(asked, f"{name} is edited already ({linear.kind})", "Fold the model first")
        if isinstance(linear, nn.Embedding):
            raise FfnkitError(asked, f"{name} is an embedding", "Name linears")
    return found


def each(found: list[tuple[FFN, int]], progress: Progress | None, what: str) -> Iterator[tuple[FFN, int, Neurons]]:
    """FFN, new width and present weights, one after the other, checked; reports progress behind each.

    Raises:
        FfnkitError: an FFN is edited already, empty, quantized or not finite.
    """
    for number, (ffn, width) in enumerate(found):
        ffn.check_plain(f"{what} {ffn.name}")
        neurons = ffn.raw()
        check_weights(neurons, ffn.name)
        yield ffn, width, neurons
        if progress is not None:
            progress(number + 1, len(found), ffn.name)


def clusterings(
    found: list[tuple[FFN, int]], progress: Progress | None, what: str, seed: int, restarts: int, **more: bool
) -> Iterator[tuple[ClusterNeurons, float]]:
    """The edit that leaves each FFN the means of its neurons' clusters, and the variance that they lose."""
    for ffn, width, neurons in each(found, progress, what):
        balanced = neurons.gated and ffn.linear_in_up
        labels, loss = cluster_neurons(neurons, width, seed=seed, restarts=restarts, balanced=balanced)
        yield ClusterNeurons(ffn.name, width=width, labels=labels, balance=balanced, **more), loss


def lifted(neurons: Neurons) -> Neurons:
    """The neurons in float32 at least: sums and decompositions in bf16 would lose the small differences."""
    exact = torch.promote_types(neurons.up.dtype, torch.float32)
    return neurons.map(lambda value: value.detach()).to(exact)


def singles(neurons: Neurons) -> list[Neurons]:
    """The FFN itself, or each of its experts."""
    return [neurons.expert(e) for e in range(neurons.experts)] if neurons.experts else [neurons]


def generator(seed: int, *places: int) -> torch.Generator:
    """A CPU generator for one place (FFN, expert), so that no draw depends on what else is planned."""
    mixed = seed
    for place in places:
        mixed = (mixed * 1_000_003 + place + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def need_data(
    data: Iterable[Batch] | StatisticsFile | None, name: str, *, beyond: str | None = "the data themselves"
) -> Any:
    """The data.

    Args:
        beyond: what the method needs that statistics of hidden neurons (:func:`ffnkit.calibrate`) do not hold, in
            words; None where it needs no more than these.

    Raises:
        FfnkitError: there are none, or statistics where they do not do.
    """
    if data is None:
        do = "Give batches for model(**batch): fk.plan(model, method, data=batches), or --task / --text"
        raise FfnkitError(f"method {name}", "it measures activations, and no data are given", do)
    if not isinstance(data, StatisticsFile):
        check_batches(data)
    elif beyond is not None:
        raise lacking(name, beyond)
    return data


def check_statistics(method: Any) -> None:
    """Raises FfnkitError where a method needs more of data than statistics of hidden neurons hold."""
    for each in getattr(method, "methods", (method,)):
        beyond = getattr(each, "beyond", "the data themselves")
        if getattr(each, "needs_data", False) and beyond is not None:
            raise lacking(each.name, beyond)


def lacking(name: str, beyond: str) -> FfnkitError:
    """The error of a method that statistics do not do for."""
    found = f"it needs {beyond}, and statistics hold sums over hidden neurons"
    return FfnkitError(f"method {name}", found, "Give batches, or --task / --text, in their place")


def activity(
    model: nn.Module, data: Iterable[Batch] | StatisticsFile, found: list[FFN], progress: Progress | None = None
) -> dict[str, Tensor]:
    """rms of each hidden neuron over the tokens that count: (ff,), or (E, ff) with experts, float64; one pass.

    Experts that no token reached have zeros. Experts' tokens weigh by their squared routing weight.

    Args:
        data: batches, or statistics of a pass over them, which are read.
        progress: called behind each batch.
    """
    seen = Statistics(lambda _: NeuronSquares())
    if isinstance(data, StatisticsFile):
        data.check(model)
        data.fill(found, seen)
    else:
        watch(model, telling(data, progress), found, seen.update)

    def rms(ffn: FFN, expert: int = 0) -> Tensor:
        part = seen.get(ffn.name, expert)
        device = ffn.raw().up.device
        return torch.zeros(ffn.width, dtype=torch.float64, device=device) if part is None else part.rms().to(device)

    return {
        ffn.name: torch.stack([rms(ffn, e) for e in range(ffn.experts)]) if ffn.experts else rms(ffn) for ffn in found
    }


def norms(neurons: Neurons) -> Tensor:
    """||up_i|| ||down_i||, with a gate ||gate_i|| ||up_i|| ||down_i||: (ff,), or (E, ff) with experts."""
    product = neurons.up.norm(dim=-1) * neurons.down.norm(dim=-2)
    return product if neurons.gate is None else product * neurons.gate.norm(dim=-1)


def largest(scores: Tensor, width: int) -> Tensor:
    """int32 numbers, ascending, of the ``width`` largest scores along the last axis; ties go to the first."""
    order = torch.sort(scores.cpu(), dim=-1, descending=True, stable=True).indices[..., :width]
    return order.sort(dim=-1).values.to(torch.int32)
