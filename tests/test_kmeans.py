"""k-means: against slow float64 loops, for every way in which the input can be degenerate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tolerance import assert_close, assert_differs
from torch import Tensor

from ffnkit.errors import FfnkitError
from ffnkit.ops import kmeans as module
from ffnkit.ops.distances import Clusters, DirectDistances, PairDistances
from ffnkit.ops.exchange import Clustering, improve, refill, within
from ffnkit.ops.kmeans import KMeans, distinct, kmeans


def normal(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


def groups(n: int, m: int, k: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    truth = torch.arange(n) % k
    return normal(k, m, 1)[truth] + spread * normal(n, m, 2), truth


def slow(points: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Centroids, counts and inertia by a loop over points in float64."""
    points, k = points.double(), int(labels.max()) + 1
    w = torch.ones(len(points), dtype=torch.float64) if weights is None else weights.double()
    sums, mass, counts = torch.zeros(k, points.shape[1], dtype=torch.float64), torch.zeros(k).double(), [0] * k
    for i, c in enumerate(labels.tolist()):
        sums[c] += w[i] * points[i]
        mass[c] += w[i]
        counts[c] += 1
    means = sums / mass[:, None]
    inertia = sum(float(w[i] * (points[i] - means[c]).square().sum()) for i, c in enumerate(labels.tolist()))
    return means, torch.tensor(counts), inertia


def check(points: Tensor, result: KMeans, k: int, weights: Tensor | None = None) -> None:
    """What holds for every result."""
    means, counts, inertia = slow(points, result.labels, weights)
    assert_close(result.centroids, means, rel=1e-6, what="centroids")
    assert torch.equal(result.counts, counts) and int(counts.min()) >= 1 and len(counts) == k
    assert result.inertia == pytest.approx(inertia, rel=1e-9, abs=1e-12 * float(points.double().square().sum()))
    lowest = [int((result.labels == c).nonzero()[0]) for c in range(k)]
    assert lowest == sorted(lowest), "clusters are numbered by their first member"


def excess(points: Tensor, result: KMeans) -> float:
    """By how much the worst point misses its nearest centroid: difference of squared distances over |x|^2, float64."""
    centred = points.double() - points.double().mean(0)
    means = result.centroids.double() - points.double().mean(0)
    worst = 0.0
    for i, point in enumerate(centred):
        distances = (point - means).square().sum(1)
        worst = max(worst, float((distances[result.labels[i]] - distances.min()) / centred.square().sum(1).mean()))
    return worst


@pytest.mark.parametrize("k", [1, 2, 7, 60, 120, 239])
def test_result_matches_slow_loops(k: int) -> None:
    points = normal(240, 33)
    result = kmeans(points, k)
    check(points, result, k)
    assert excess(points, result) < 1e-5


def test_excess_sees_a_wrong_label() -> None:
    points, _ = groups(60, 20, 6)
    result = kmeans(points, 6)
    labels = result.labels.clone()
    labels[0] = (labels[0] + 1) % 6
    wrong = KMeans(labels, result.centroids, result.counts, result.inertia, 1)
    assert excess(points, result) < 1e-5 < 1e-2 < excess(points, wrong)


def test_finds_groups_and_numbers_them_by_first_member() -> None:
    points, truth = groups(300, 40, 30)
    assert torch.equal(kmeans(points, 30).labels, truth)


@pytest.mark.parametrize("data", ["normal", "groups"])
def test_inertia_is_not_above_scikit_learns(data: str) -> None:
    from sklearn import cluster

    points = normal(384, 97) if data == "normal" else groups(384, 97, 48, spread=1.0)[0]
    ours = [kmeans(points, 96, seed=seed).inertia for seed in range(4)]
    theirs = [
        slow(points, torch.from_numpy(cluster.KMeans(96, n_init=1, random_state=seed).fit(points.numpy()).labels_))[2]
        for seed in range(4)
    ]
    assert sum(ours) <= sum(theirs) and max(ours) <= min(theirs) * 1.01


def test_no_single_move_lowers_the_inertia() -> None:
    points = normal(48, 9)
    result = kmeans(points, 12)
    for i in range(48):
        if int(result.counts[result.labels[i]]) == 1:
            continue
        for c in range(12):
            labels = result.labels.clone()
            labels[i] = c
            assert slow(points, labels)[2] >= result.inertia * (1 - 1e-6)


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-3, 1.0, 1e3, 1e18, 5e34])
def test_every_duplicated_pair_is_a_cluster(scale: float, offset: float, limit: int | None) -> None:
    half = (normal(150, 65) + offset) * scale
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    points = half.repeat(2, 1)[order]
    memory = {} if limit is None else {"gram_limit_bytes": limit}
    for seed in range(5):
        result = kmeans(points, 150, seed=seed, **memory)
        assert result.inertia == 0 and bool((result.counts == 2).all())
        assert torch.equal(result.centroids[result.labels], points)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_pairs_equal_up_to_rounding_are_clusters_for_every_seed(scale: float, offset: float) -> None:
    half = (normal(150, 257) + offset) * scale
    points = torch.cat([half, half * (1 + 1e-6 * torch.rand(half.shape, generator=torch.Generator().manual_seed(5)))])
    for seed in range(20):
        result = kmeans(points, 150, seed=seed)
        assert torch.equal(result.labels, torch.arange(150).repeat(2))


def test_single_members_are_the_control_of_the_pairs() -> None:
    points = normal(300, 65)
    assert kmeans(points, 150).inertia > 0.1 * float(points.square().sum()) * 0.1


def test_near_pairs_have_their_true_distances() -> None:
    points = normal(64, 300)
    points[32:] = points[:32] + 1e-5 * normal(32, 300, 9)
    true = torch.cdist(points.double(), points.double()).square()
    pairs = PairDistances(points, block=20).pairs
    assert_close(pairs, true, rel=1e-5)
    assert_close(pairs.diagonal(32), true.diagonal(32), rel=1e-4, what="near pairs")
    expanded = points.square().sum(1)[:, None] + points.square().sum(1) - 2 * points @ points.T
    assert_differs(expanded.diagonal(32), true.diagonal(32), rel=1e-2)  # float32 alone gives noise
    assert torch.equal(pairs, pairs.T) and not pairs.diagonal().any()


def test_k_equal_to_n_is_the_identity() -> None:
    points = normal(20, 4)
    points[3] = points[7]
    result = kmeans(points, 20)
    assert torch.equal(result.labels, torch.arange(20)) and torch.equal(result.centroids, points)
    assert result.inertia == 0 and result.iterations == 0 and bool((result.counts == 1).all())


@pytest.mark.parametrize("different", [1, 3, 10])
def test_fewer_different_points_than_clusters(different: int) -> None:
    points = normal(different, 6).repeat(8, 1)
    result = kmeans(points, different + 5)
    check(points, result, different + 5)
    assert result.inertia == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_fewer_points_that_differ_beyond_rounding_than_clusters(limit: int) -> None:
    base = normal(5, 40).repeat(10, 1)
    points = base + 1e-7 * base.abs() * normal(50, 40, 3)
    result = kmeans(points, 20, gram_limit_bytes=limit)
    check(points, result, 20)
    assert result.inertia < 1e-8 and result.iterations < 100, "points within rounding go to and fro"


def test_labels_do_not_depend_on_scale_or_offset() -> None:
    points = normal(200, 31)
    labels = kmeans(points, 50).labels
    assert torch.equal(kmeans(points * 1024, 50).labels, labels)
    assert torch.equal(kmeans(points / 1024, 50).labels, labels)
    assert kmeans(points + 100, 50).inertia == pytest.approx(kmeans(points, 50).inertia, rel=0.01)


def test_deterministic_for_a_seed_and_independent_of_the_global_state() -> None:
    points = normal(200, 31)
    before = torch.get_rng_state()
    first = kmeans(points, 50, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = kmeans(points, 50, seed=4)
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.labels, kmeans(points, 50, seed=5).labels)


def test_same_labels_with_two_threads_and_settings_are_restored() -> None:
    points = normal(300, 65)
    one = kmeans(points, 75, restarts=5).labels
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(kmeans(points, 75, restarts=5).labels, one)
        assert torch.get_num_threads() == 2 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_restarts_never_do_worse_and_begin_with_the_same_start() -> None:
    points = normal(200, 31)
    inertias = [kmeans(points, 50, restarts=r).inertia for r in (1, 2, 8)]
    assert inertias[0] >= inertias[1] >= inertias[2] and inertias[2] < inertias[0]


def test_stopping_early() -> None:
    points = normal(300, 31)
    full = kmeans(points, 75)
    one, loose = kmeans(points, 75, max_iterations=1), kmeans(points, 75, tolerance=0.01)
    assert one.iterations == 1 < loose.iterations < full.iterations
    assert one.inertia > loose.inertia > full.inertia
    check(points, one, 75)


def test_both_ways_of_computing_distances_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffnkit.ops.exchange.CHUNK", 2000)
    points = normal(240, 33) + 2
    fast, direct = kmeans(points, 60), kmeans(points, 60, gram_limit_bytes=0)
    assert fast.inertia == pytest.approx(direct.inertia, rel=2e-3)
    points, truth = groups(240, 33, 60)
    assert torch.equal(kmeans(points, 60).labels, truth)
    assert torch.equal(kmeans(points, 60, gram_limit_bytes=0).labels, truth)


def test_gram_limit_chooses_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(module, "PairDistances", lambda p: used.append("pairs") or PairDistances(p))
    monkeypatch.setattr(module, "DirectDistances", lambda p: used.append("direct") or DirectDistances(p))
    for limit in (4 * 40 * 40, 4 * 40 * 40 - 1):
        kmeans(normal(40, 5), 10, gram_limit_bytes=limit)
    assert used == ["pairs", "direct"]


@pytest.mark.parametrize("way", [PairDistances, DirectDistances])
def test_distances_to_means_match_a_loop(way: type) -> None:
    points, w = normal(60, 12), torch.rand(60, generator=torch.Generator().manual_seed(8)) + 0.1
    labels = torch.arange(60) % 7
    wanted = torch.tensor([1, 4, 6])
    found = way(points).to_means(Clusters.of(labels, wanted, 7), w)
    means = slow(points, labels, w)[0]
    assert_close(found, torch.cdist(means[wanted], points.double()).square(), rel=1e-5)
    assert_close(
        way(points).to_points(wanted), torch.cdist(points[wanted].double(), points.double()).square(), rel=1e-5
    )


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_weights(limit: int) -> None:
    points = normal(150, 21)
    weights = torch.rand(150, generator=torch.Generator().manual_seed(1)) ** 4
    weights[:20] = 0
    result = kmeans(points, 40, weights=weights, gram_limit_bytes=limit)
    means, counts, inertia = slow(points, result.labels, weights)
    heavy = ~means.isnan().any(1)  # a cluster without weight has the plain mean
    assert_close(result.centroids[heavy], means[heavy], rel=1e-6)
    assert torch.equal(result.counts, counts) and int(counts.min()) >= 1
    total = sum(float(weights[i]) * float((points[i].double() - result.centroids[c].double()).square().sum())
                for i, c in enumerate(result.labels.tolist()))  # fmt: skip
    assert result.inertia == pytest.approx(total, rel=1e-6)
    assert result.inertia < slow(points, kmeans(points, 40).labels, weights + 1e-30)[2]
    assert excess(points, result) < 1e-4


def test_whole_weights_equal_repeated_points() -> None:
    points = normal(80, 11)
    times = torch.randint(1, 5, (80,), generator=torch.Generator().manual_seed(2))
    repeated = kmeans(points.repeat_interleave(times, 0), 20)
    weighted = kmeans(points, 20, weights=times.float())
    first = times.cumsum(0) - times
    assert torch.equal(repeated.labels[first], weighted.labels)
    assert repeated.inertia == pytest.approx(weighted.inertia, rel=1e-9)
    assert torch.equal(kmeans(points, 20, weights=torch.full((80,), 7.0)).labels, kmeans(points, 20).labels)
    assert not torch.equal(weighted.labels, kmeans(points, 20).labels)


def test_weights_of_very_different_size() -> None:
    points = normal(120, 9)
    weights = 10.0 ** torch.linspace(-15, 15, 120)
    result = kmeans(points, 30, weights=weights)
    assert int(result.counts.min()) >= 1 and result.iterations < 1000
    assert len(set(result.labels[-20:].tolist())) == 20  # the heavy ones stand alone
    only = torch.zeros(120)
    only[5] = 1
    lonely = kmeans(points, 30, weights=only)
    assert int(lonely.counts.min()) >= 1 and lonely.inertia == pytest.approx(0, abs=1e-9)
    assert bool(lonely.centroids.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    points = normal(120, 17).to(dtype)
    result = kmeans(points, 30)
    check(points, result, 30)
    assert result.centroids.dtype == torch.promote_types(dtype, torch.float32)
    assert kmeans(points[:60].repeat(2, 1), 60).inertia == 0


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 7e37), (torch.float32, 1e-42), (torch.float64, 4e307)])
def test_extreme_scales(dtype: torch.dtype, scale: float) -> None:
    points = normal(90, 12).to(dtype).clamp(-3, 3) * scale
    labels = kmeans(points, 30).labels
    assert int(torch.bincount(labels, minlength=30).min()) >= 1
    if scale > 1:
        assert torch.equal(labels, kmeans(normal(90, 12).to(dtype).clamp(-3, 3), 30).labels)


def test_batch_is_one_problem_each() -> None:
    points, weights = normal(3 * 40, 7).view(3, 40, 7), torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    batch = kmeans(points, 10, weights=weights)
    assert batch.labels.shape == (3, 40) and batch.centroids.shape == (3, 10, 7) and batch.counts.shape == (3, 10)
    each = [kmeans(points[e], 10, weights=weights[e]) for e in range(3)]
    for e, one in enumerate(each):
        assert torch.equal(batch.labels[e], one.labels) and torch.equal(batch.centroids[e], one.centroids)
    assert batch.inertia == pytest.approx(sum(one.inertia for one in each))


def test_requires_grad_and_strides_are_harmless() -> None:
    points = normal(17, 80).T
    assert torch.equal(kmeans(points.clone().requires_grad_(), 20).labels, kmeans(points.contiguous(), 20).labels)
    assert not kmeans(points.clone().requires_grad_(), 20).centroids.requires_grad


@pytest.mark.parametrize(
    ("points", "k", "settings", "says"),
    [
        (torch.zeros(5), 2, {}, "shape"),
        (torch.zeros(0, 3), 1, {}, "shape"),
        (torch.zeros(2, 2, 2, 2), 1, {}, "shape"),
        (torch.zeros(0, 4, 3), 1, {}, "batch"),
        (torch.zeros(5, 3, dtype=torch.int64), 2, {}, "int64"),
        (torch.zeros(5, 3), 0, {}, "k=0"),
        (torch.zeros(5, 3), 6, {}, "k=6"),
        (torch.zeros(5, 3), 2.0, {}, "k=2.0"),
        (torch.full((5, 3), torch.nan), 2, {}, "NaN"),
        (torch.full((5, 3), torch.inf), 2, {}, "infinite"),
        (torch.zeros(5, 3), 2, {"restarts": 0}, "restarts=0"),
        (torch.zeros(5, 3), 2, {"max_iterations": 0}, "max_iterations=0"),
        (torch.zeros(5, 3), 2, {"tolerance": -1.0}, "tolerance=-1.0"),
        (torch.zeros(5, 3), 2, {"weights": torch.ones(4)}, "weights"),
        (torch.zeros(5, 3), 2, {"weights": torch.zeros(5)}, "zero"),
        (torch.zeros(5, 3), 2, {"weights": -torch.ones(5)}, "negative"),
        (torch.zeros(5, 3), 2, {"weights": torch.full((5,), torch.nan)}, "NaN"),
    ],
)
def test_bad_input(points: Tensor, k: int, settings: dict, says: str) -> None:
    with pytest.raises(FfnkitError, match=says):
        kmeans(points, k, **settings)


def test_distinct() -> None:
    points = normal(40, 300)
    points[30], points[35], points[11] = points[2], points[2], points[10]
    points[20] = points[21]
    points[20, 5] += 1e-3  # nearly equal is not equal
    points[0, 7], points[1] = 0.0, points[0]
    points[1, 7] = -0.0
    first, same = distinct(points)
    assert torch.equal(points[first[same]], points) and len(first) == 36
    assert same[1] == same[0] and same[35] == same[30] == same[2] and same[20] != same[21]


@pytest.mark.parametrize("quota", [1, 3])
def test_moves_of_a_round_stay_within_quotas_and_include_the_best(quota: int) -> None:
    source = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(0))
    target = (source + torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(1))) % 30
    chosen = within(source, target, torch.full((30,), quota))
    uses = torch.bincount(torch.cat([source[chosen], target[chosen]]), minlength=30)
    assert int(uses.max()) == quota and chosen[0] == 0 and bool((chosen.diff() > 0).all())
    everything = torch.bincount(torch.cat([source, target]), minlength=30)
    assert int(everything.max()) > quota, "the quota has something to refuse"


def test_refill_takes_the_farthest_and_empties_nothing() -> None:
    labels = torch.tensor([0, 0, 0, 3, 3, 4])
    refill(labels, torch.tensor([1.0, 5.0, 0.0, 2.0, 0.0, 9.0]), 5)
    assert labels.tolist() == [0, 1, 0, 2, 3, 4]


def test_every_round_lowers_the_inertia_and_a_bad_one_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(200, 15)
    seen: list[float] = []
    clustering = Clustering(PairDistances(points), torch.arange(200) % 20, torch.ones(200), 20)
    original = clustering.gains

    def gains() -> tuple[Tensor, Tensor]:
        seen.append(float(clustering.inertia))
        return original()

    monkeypatch.setattr(clustering, "gains", gains)
    assert improve(clustering, 1000, 0.0) > 5 and all(a >= b for a, b in pairwise(seen)) and seen[0] > seen[-1]
    assert clustering.inertia == pytest.approx(slow(points, clustering.labels)[2], rel=1e-5)

    before = clustering.labels.clone()
    everyone = torch.ones(200), torch.ones(200, dtype=torch.bool)  # moves that do not pay
    monkeypatch.setattr(clustering, "gains", lambda: everyone)
    improve(clustering, 1000, 0.0)
    assert torch.equal(clustering.labels, before)


def test_neurons_of_a_real_model(models_dir: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(models_dir / "stories260K" / "model.safetensors")
    up = next(value for name, value in tensors.items() if name.endswith("up_proj.weight"))
    result = kmeans(up, len(up) // 4)
    check(up, result, len(up) // 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_cuda(limit: int) -> None:
    points, truth = groups(600, 65, 150)
    result = kmeans(points.cuda(), 150, gram_limit_bytes=limit)
    assert result.labels.is_cuda and torch.equal(result.labels.cpu(), truth)
    points = normal(600, 129)
    first, second = (kmeans(points.cuda(), 150, restarts=2, gram_limit_bytes=limit) for _ in range(2))
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centroids, second.centroids)
    assert first.inertia == pytest.approx(kmeans(points, 150, restarts=2).inertia, rel=5e-3)
    assert kmeans(points[:300].repeat(2, 1).cuda(), 300).inertia == 0
