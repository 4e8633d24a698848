"""A training step and k-means' rounds do not make the host wait for the device, but where that is told here."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffnkit.nn.dsee import SparseLowRank
from ffnkit.nn.sparsegrad import Bases, SparseGradLinear
from ffnkit.ops import entries
from ffnkit.ops.kmeans import kmeans
from ffnkit.tune.meprop import _Cut

SIZED = {f"aten::{n}" for n in ("nonzero", "_unique2", "unique_dim", "masked_select", "_to_sparse", "bincount")}


class Waits(TorchDispatchMode):
    """Counts what a host waits for on a GPU: single numbers, copies to the host, and results of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        masked = name.startswith("aten::index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        filled = name.startswith("aten::index_put") and masked and args[2].numel() == 1  # becomes masked_fill
        if name == "aten::_local_scalar_dense" or name in SIZED or (masked and not filled):
            self.seen[name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is waited for inside the block; lists and arrays of tensors too, which no dispatch sees on a CPU."""
    with Waits() as mode, monkeypatch.context() as patch:
        plain = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}
        for name in plain:

            def told(tensor: Any, *given: Any, _name: str = name, _own: Any = plain[name]) -> Any:
                mode.seen[_name] += 1
                return _own(tensor, *given)

            patch.setattr(torch.Tensor, name, told)
        yield mode.seen


def sparsegrad(selection: str, bases: bool = True, every: int = 0) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        linear, draw = nn.Linear(24, 40), torch.Generator().manual_seed(1)
        index = torch.randperm(960, generator=draw)[:60].sort().values
        own = Bases(*(torch.linalg.qr(torch.randn(side, side, generator=draw)).Q for side in (40, 24)))
        given: dict[str, Any] = {"selection": selection, "count": 60, "bases": own if bases else None, "every": every}
        return SparseGradLinear(linear, **given, index=index if selection in ("fixed", "refresh") else None)

    return made


def dsee(**given: Any) -> Callable[[], nn.Module]:
    index = torch.randperm(960, generator=torch.Generator().manual_seed(1))
    return lambda: SparseLowRank(nn.Linear(24, 40), rank=2, index=index[:60].sort().values, **given)


def with_coefficients() -> nn.Module:
    layer: Any = dsee()()
    layer.use_coefficients(torch.ones(24), 0.1)
    return layer  # type: ignore[no-any-return]


class Cut(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cut: torch.Tensor = _Cut.apply(super().forward(x), 5)
        return cut


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "sparsegrad": sparsegrad("fixed"),
    "refresh": sparsegrad("refresh", every=9),
    "masked-gradient": sparsegrad("masked-gradient"),
    "step": sparsegrad("step"),
    "mask": sparsegrad("fixed", bases=False),
    "meprop": sparsegrad("masked-gradient", bases=False),
    "meprop-outputs": lambda: Cut(24, 40),
    "dsee": dsee(),
    "dsee-coefficients": with_coefficients,
}
TOLD = {"step": {"_to_sparse": 1}}  # of entries that are chosen anew the sparse optimizer asks how many fall on a layer


def steps(layer: nn.Module, count: int) -> None:
    place = next(layer.parameters()).device
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    x = torch.randn(30, 24, device=place, requires_grad=True)
    for _ in range(count):
        for part in (0.5, 0.5):  # the gradient of a step in two parts
            layer(x).square().mean().mul(part).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sampled", [True, False], ids=["cpu", "as on a GPU"])
def test_a_step_waits_for_nothing(
    name: str, sampled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "BLOCK", 16)
    if not sampled:
        monkeypatch.setattr(entries.Entries, "_by_sampling", lambda *_: False)
    layer = LAYERS[name]().to(device)
    steps(layer, 1)  # the first asks for what stays known
    with counted(monkeypatch) as seen:
        steps(layer, 1)
    assert dict(seen) == TOLD.get(name, {})


class Between(nn.Module):
    """Without a loop over its layers, of which a cut would leave nothing compiled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(24, 24), layer, nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.layer(self.first(x)))


CUT = {"sparsegrad", "refresh", "masked-gradient", "step", "mask", "meprop", "dsee", "dsee-coefficients"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_model_is_cut_where_that_is_told(name: str, device: torch.device) -> None:
    """Once at each layer whose backward is its own; nowhere at others."""
    torch.compiler.reset()
    model = Between(LAYERS[name]()).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch._dynamo.explain(model)(torch.randn(5, 24, device=device))
    assert found.graph_break_count == (name in CUT), [str(reason.reason) for reason in found.break_reasons]


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6.0).view(2, 3)
    with counted(monkeypatch) as seen:
        bool(x.any()), x.sum().item(), x.tolist(), x.cpu(), x[x > 2], (x > 2).nonzero(), x.unique(), x.to_sparse()
        x[x > 2] = 0.0  # fills under a mask: no wait
    assert seen["_local_scalar_dense"] == 2 and seen["tolist"] == seen["cpu"] == 1
    assert seen["index"] == seen["nonzero"] == seen["_unique2"] == seen["_to_sparse"] == 1
    assert not seen["index_put_"]


def test_entries_that_moved_are_asked_for_again() -> None:
    index, weight, tokens = torch.arange(0, 960, 16), torch.zeros(40, 24), torch.eye(24)
    values = torch.ones(60)
    for step in range(2):
        index += step
        found = entries.Entries(index, values, (40, 24)).product(tokens, weight)
        assert torch.equal(found.T.flatten().nonzero()[:, 0], index)
    other = entries.Entries(index, values, (24, 40)).product(torch.eye(40), weight.view(24, 40))
    assert torch.equal(other.T.flatten(), found.T.flatten())


def waits_of_kmeans(rows: int, clusters: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    points = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    with counted(monkeypatch) as seen:
        found = kmeans(points, clusters)
    return seen, found.iterations


@pytest.mark.parametrize("clusters", [8, 40])
def test_rounds_of_kmeans_wait_for_a_few_decisions(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who moves, how many may, whether it was worth it: of each round, however many points and clusters move."""
    seen, rounds = waits_of_kmeans(400, clusters, monkeypatch)
    before, _ = waits_of_kmeans(clusters + 1, clusters, monkeypatch)  # hardly a move
    assert rounds > 5 and seen["tolist"] == seen["cpu"] == seen["numpy"] == 0
    assert sum(seen.values()) - sum(before.values()) <= 14 * rounds, (seen, before, rounds)
