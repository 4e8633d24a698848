"""Which entries of a weight train: exactly so many, free of scale, as loops written from the descriptions find them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from ffnkit.ops import support


def weight(rows: int = 40, columns: int = 28, seed: int = 0) -> Tensor:
    """A low-rank part, small noise and a few large entries; float64."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, 3, generator=draw) @ torch.randn(3, columns, generator=draw)
    noise = torch.randn(rows, columns, generator=draw)
    spikes = torch.zeros(rows * columns)
    spikes[torch.randperm(rows * columns, generator=draw)[:30]] = 8 * torch.randn(30, generator=draw)
    return (0.03 * (low + 0.3 * noise) + 0.01 * spikes.view(rows, columns)).double()


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "svd": lambda w, count: support.svd(w, 4, count),
    "grebsmo": lambda w, count: support.grebsmo(w, count, rounds=12),
    "magnitude": support.magnitude,
    "random": lambda w, count: support.drawn(w.numel(), count, torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("count", [1, 17, 300, 1119])
@pytest.mark.parametrize("way", WAYS)
def test_the_support_of_a_scaled_weight_is_that_of_the_weight(way: str, count: int) -> None:
    w = weight()
    found = WAYS[way](w, count)
    assert len(found) == count == len(found.unique()) and torch.equal(found, found.sort().values)
    assert int(found[0]) >= 0 and int(found[-1]) < w.numel()
    for scale in (1e-3, 0.37, 1e3):
        assert torch.equal(WAYS[way](w * scale, count), found), f"times {scale}"
    if way not in ("random", "grebsmo"):  # in float32 too, where the product is rounded
        for scale in (1e-3, 1e3):
            assert torch.equal(WAYS[way](w.float() * scale, count), WAYS[way](w.float(), count))


@pytest.mark.parametrize("name", ["zeros", "constant", "one row"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_without_anything_to_choose_from_still_have_so_many(way: str, name: str) -> None:
    w = {"zeros": torch.zeros(9, 6), "constant": torch.full((9, 6), 0.3), "one row": torch.randn(1, 54)}[name]
    assert len(WAYS[way](w, 7).unique()) == 7


def test_an_absolute_threshold_depends_on_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the released code's 0.01 a small weight has no sparse part, and the filling does it all."""
    w = weight()
    found = support.grebsmo(w, 40, rounds=12)
    monkeypatch.setattr(support, "_scaled", lambda weight: weight.float())
    monkeypatch.setattr(support, "THRESHOLD", 0.01 / float((1e-3 * w).std()))
    assert not torch.equal(support.grebsmo(1e-3 * w, 40, rounds=12), found)


def loop(w: Tensor, v: Tensor, rounds: int, threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """GreBsmo line by line, with R of the whole decomposition; S and the residual W - U V."""
    for number in range(rounds):
        s = torch.zeros_like(w)
        for _ in range(2):
            u, _ = torch.linalg.qr((w - s) @ v.T)
            v = u.T @ (w - s)
            left = w - u @ v
            s = left.clone()
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    if abs(float(s[i, j])) < threshold:
                        s[i, j] = 0.0
        e = w - u @ v - s
        if number + 1 == rounds or len(v) + 5 > limit:
            break
        v = torch.cat([v, torch.linalg.qr(e)[1][:5]])
    return s, left


@pytest.mark.parametrize("shape", [(30, 24), (24, 30)])
@pytest.mark.parametrize("count", [12, 500])
def test_grebsmo_is_the_loop_of_its_description(shape: tuple[int, int], count: int) -> None:
    w = weight(*shape)
    scaled = (w / w.std()).float().double()
    v = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, left = loop(scaled, v, 4, 0.24 * float(scaled.std()), 15)
    kept = int((s != 0).sum())
    sizes = torch.where(s != 0, s.abs(), 0) if count <= kept else torch.where(s != 0, 1e9, left.abs())
    assert (count > kept) == (count == 500)  # both cases: enough in S, and filled up
    wanted = sizes.flatten().sort(descending=True).indices[:count].sort().values
    assert torch.equal(support.grebsmo(w, count, rounds=4), wanted)
    assert not torch.equal(support.grebsmo(w, count, rounds=1), wanted)  # the control


def test_the_rows_that_are_appended_are_the_first_of_r() -> None:
    left = weight()
    assert_close(support.appended(left), torch.linalg.qr(left)[1][:5], rel=1e-12)


def test_the_rank_is_confined() -> None:
    w = weight(24, 30)
    assert torch.equal(support.svd(w, 12, 20), support.svd(w, 500, 20))
    assert torch.equal(support.grebsmo(w, 20, rank=16), support.grebsmo(w, 20))
    assert torch.equal(support.svd(w, 0, 20), support.magnitude(w, 20))


def test_the_svd_leaves_what_the_svd_leaves() -> None:
    w = weight()
    u, s, vh = torch.linalg.svd(w)
    wanted = w - u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert_close(support.residual(w, 4), wanted, rel=1e-9)
    assert_close(support.residual(w.T, 4), wanted.T, rel=1e-9)
    assert torch.equal(support.svd(w, 4, 25), support.largest(wanted.abs(), 25))


def test_randomized_vectors_leave_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(120, 90)
    exact = support.residual(w, 5)
    monkeypatch.setattr(support, "EXACT", 10)
    assert_close(support.residual(w, 5), exact, rel=1e-2)
    assert float(support.residual(w, 5).norm()) <= 1.00001 * float(exact.norm())
    monkeypatch.setattr(support, "ITERATIONS", 0)
    monkeypatch.setattr(support, "OVERSAMPLED", 0)
    assert float(support.residual(w, 5).norm()) > 1.01 * float(exact.norm())  # the control
    assert torch.equal(support.residual(w, 5), support.residual(w, 5))


def test_ties_go_to_the_first_ones() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 1.0]])
    assert support.largest(scores, 4).tolist() == [0, 1, 2, 4]
    assert support.largest(scores, 0).tolist() == [] and support.largest(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="7 of 6"):
        support.largest(scores, 7)
    with pytest.raises(ValueError, match="not a number"):
        support.largest(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="not finite"):
        support.svd(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), 1, 1)


def test_draws_from_large_weights_repeat_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    few = support.drawn(1 << 40, 5000, draw)
    assert len(few.unique()) == 5000 and int(few.max()) > 1 << 39
    assert not torch.equal(few, support.drawn(1 << 40, 5000, draw))
    again = support.drawn(1 << 40, 5000, torch.Generator().manual_seed(0))
    assert torch.equal(few, again)
