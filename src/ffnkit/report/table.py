"""From rows of results.json (one an arm and seed) to one line an arm, with spread, paired differences and notes.

A row is a dict with ``arm`` and ``seed``; all else is optional: ``metrics`` {name: value} (a metric may also stand at
the top level), ``parameters``, ``ffn_parameters``, ``trainable_parameters``, ``updated_parameters`` (that a step of
the optimizer changes), ``trainable_body`` and ``trainable_share`` (without the task head: how many, and of how many the
model has without it), ``samples_per_second``, ``steps_per_second``, ``flops_per_token``,
``bytes_on_disk_compact``, ``bytes_on_disk_standard``, ``bytes_on_disk_apart``, ``latency_s``, ``latency_ratio`` (to the
first arm, measured in alternation with it) and ``latency_ratio_quartiles``, ``peak_memory_bytes`` (of tensors in
training steps), ``process_memory_bytes``, ``learning_rate`` and ``search`` {trials, metric, rows, ...} (of arms whose
rate was searched), ``zeros`` and ``zeros_merged`` (shares of the weights, of arms that were pruned),
``heads_removed``, ``neurons_removed`` and ``parameters_removed`` (shares of them), ``metrics_before`` (tuning)
{name: value}, ``layers`` (in words, which were merged or dropped), ``neutral_loss`` {before, after}, ``seconds``
{stage: seconds}, ``rows`` {train, dev, report: their number}, ``curve`` {loss, metric: [[step, value], ...]},
``settings`` and ``tuner`` of the arm, ``checkpoints`` and ``predictions`` {name: path in the run's folder}, ``error``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffnkit.errors import FfnkitError

SLOWER = 1 / 0.97
NO_GAIN = 0.97
FEW_SEEDS = 3
VALUES = (
    "parameters",
    "ffn_parameters",
    "trainable_parameters",
    "updated_parameters",
    "trainable_body",
    "trainable_share",
    "samples_per_second",
    "steps_per_second",
    "seconds_per_step",
    "learning_rate",
    "flops_per_token",
    "bytes_on_disk_compact",
    "bytes_on_disk_standard",
    "bytes_on_disk_apart",
    "latency_s",
    "peak_memory_bytes",
    "process_memory_bytes",
    "zeros",
    "zeros_merged",
    "heads_removed",
    "neurons_removed",
    "parameters_removed",
    "forgetting",
    "rows",
)
ALIKE = 0.005  # a share by which figures of one model may differ: the names in a file take bytes too
SAME = ("parameters", "ffn_parameters", "flops_per_token", "bytes_on_disk_compact")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stat:
    """Mean of ``n`` seeds and their standard deviation (n-1); ``std`` is None for one seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        n = len(values)
        mean = math.fsum(values) / n
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None, n)


@dataclass(frozen=True)
class Difference:
    """Mean difference to the first arm over the ``n`` seeds that both have, with a 95% t interval where n > 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the interval leaves out 0; None where the seeds give none: there is one, or all are alike."""
        if self.low is None or self.high is None or self.low == self.high:
            return None
        return self.low > 0 or self.high < 0


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference | None:
    """Ours less theirs over the seeds {seed: value} that both have; None where they share none."""
    deltas = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not deltas:
        return None
    stat = Stat.of(deltas)
    if stat.std is None:
        return Difference(stat.mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, stat.n - 1)) * stat.std / math.sqrt(stat.n)
    return Difference(stat.mean, stat.mean - half, stat.mean + half, stat.n)


@dataclass(frozen=True)
class Arm:
    """What was measured of one arm; an arm without rows was not run.

    Attributes:
        before: the compared metric before tuning. layers: which were merged or dropped, of each seed.
        settings: of its method and tuner, with those of the tuner that are not given.
        curves: of each seed, what "loss" and "metric" (on dev) were at which step.
    """

    name: str
    seeds: tuple[Any, ...] = ()
    metrics: dict[str, Stat] = field(default_factory=dict)
    by_seed: dict[Any, float] = field(default_factory=dict)
    before: Stat | None = None
    before_by_seed: dict[Any, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    difference: Difference | None = None
    values: dict[str, Stat] = field(default_factory=dict)
    latency_ratio: Stat | None = None
    ratio_range: tuple[float, float] | None = None
    seconds: dict[str, Stat] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: tuple[Mapping[str, Sequence[Sequence[float]]], ...] = ()

    @property
    def run(self) -> bool:
        return bool(self.seeds)


@dataclass(frozen=True)
class Summary:
    """The arms in order, the first being what the others are compared with, and the notes that belong under them."""

    arms: tuple[Arm, ...]
    metric: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]


def summarize(
    rows: Sequence[Row], metric: str, *, arms: Sequence[str] | None = None, seeds: Sequence[Any] | None = None
) -> Summary:
    """One ``Arm`` for each arm: means, standard deviations, and differences to the first arm paired by seed.

    Args:
        rows: rows of results.json. A row with ``error`` or without any value counts as not run.
        metric: the metric that is compared.
        arms: the arms that were asked for, in order; without it, those of the rows in order of appearance.
        seeds: the seeds that were asked for; arms that lack some are named in the notes.

    Raises:
        FfnkitError: a row without arm or seed, two rows of the same arm and seed, no arm at all.
    """
    by_arm = _group(rows, arms)
    first = next(iter(by_arm.values()))
    built = tuple(_arm(name, mine, first, metric) for name, mine in by_arm.items())
    metrics = tuple(dict.fromkeys([metric, *(name for arm in built for name in arm.metrics)]))
    return Summary(built, metric, metrics, tuple(_notes(built, metric, seeds, rows)))


def _group(rows: Sequence[Row], arms: Sequence[str] | None) -> dict[str, dict[Any, Row]]:
    """{arm: {seed: row}} without the rows that failed."""
    by_arm: dict[str, dict[Any, Row]] = {name: {} for name in arms or ()}
    for row in rows:
        if "arm" not in row or "seed" not in row:
            found = f"a row without arm or seed: {sorted(row)}"
            raise FfnkitError("a table of results", found, "Give both in each row")
        mine = by_arm.setdefault(row["arm"], {})
        if row["seed"] in mine:
            found = f"two rows of arm '{row['arm']}' and seed {row['seed']}"
            raise FfnkitError("a table of results", found, "Keep one row an arm and seed")
        if not row.get("error") and len(row) > 2:
            mine[row["seed"]] = row
    if not by_arm:
        raise FfnkitError("a table of results", "there is no arm", "Give rows or the names of the arms")
    return by_arm


def _arm(name: str, rows: Mapping[Any, Row], first: Mapping[Any, Row], metric: str) -> Arm:
    metrics = dict.fromkeys(key for row in rows.values() for key in (metric, *row.get("metrics", {})))
    stages = dict.fromkeys(key for row in rows.values() for key in row.get("seconds", {}))
    before = {seed: _number((row.get("metrics_before") or {}).get(metric)) for seed, row in rows.items()}
    untuned = {seed: value for seed, value in before.items() if value is not None}
    ratio = Stat(1.0, None, len(rows)) if rows is first and rows else _latency_ratio(rows, first)
    mine, base = _by_seed(rows, metric), _by_seed(first, metric)
    last: Row = list(rows.values())[-1] if rows else {}
    return Arm(
        name=name,
        seeds=tuple(rows),
        metrics=_stats({key: [_metric(row, key) for row in rows.values()] for key in metrics}),
        by_seed=mine,
        before=Stat.of(list(untuned.values())) if untuned else None,
        before_by_seed=untuned,
        layers=tuple(row["layers"] for row in rows.values() if row.get("layers")),
        difference=None if rows is first else paired(mine, base),
        values=_stats({key: [_number(_value(row, key)) for row in rows.values()] for key in VALUES}),
        latency_ratio=ratio,
        ratio_range=None if ratio is None else _ratio_range(rows, ratio),
        seconds=_stats({key: [_number(row.get("seconds", {}).get(key)) for row in rows.values()] for key in stages}),
        settings={**(last.get("settings") or {}), **({"tuner": last["tuner"]} if last.get("tuner") else {})},
        curves=tuple(row["curve"] for row in rows.values() if row.get("curve")),
    )


def _by_seed(rows: Mapping[Any, Row], metric: str) -> dict[Any, float]:
    return {seed: value for seed, row in rows.items() if (value := _metric(row, metric)) is not None}


def _value(row: Row, key: str) -> Any:
    """A value of a row; forgetting is by how much the loss on neutral text grew, rows are those of the report."""
    if key == "rows":
        return (row.get("rows") or {}).get("report")
    if key == "seconds_per_step" and (speed := _number(row.get("steps_per_second"))):
        return 1 / speed
    if key != "forgetting":
        return row.get(key)
    losses = [_number((row.get("neutral_loss") or {}).get(when)) for when in ("before", "after")]
    return None if losses[0] is None or losses[1] is None else losses[1] - losses[0]


def _number(value: Any) -> float | None:
    """A finite number, or None for what was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _metric(row: Row, metric: str) -> float | None:
    return _number(row.get("metrics", {}).get(metric, row.get(metric)))


def _stats(values: Mapping[str, Sequence[float | None]]) -> dict[str, Stat]:
    measured = {key: [v for v in column if v is not None] for key, column in values.items()}
    return {key: Stat.of(column) for key, column in measured.items() if column}


def _latency_ratio(rows: Mapping[Any, Row], first: Mapping[Any, Row]) -> Stat | None:
    """Ratios taken in alternation where the rows have them, else of the seconds of the same seeds."""
    ratios = [r for row in rows.values() if (r := _number(row.get("latency_ratio"))) is not None]
    if not ratios:
        pairs = [(row, first[seed]) for seed, row in rows.items() if seed in first]
        seconds = [(_number(row.get("latency_s")), _number(base.get("latency_s"))) for row, base in pairs]
        ratios = [a / b for a, b in seconds if a is not None and b]
    return Stat.of(ratios) if ratios else None


def _ratio_range(rows: Mapping[Any, Row], ratio: Stat) -> tuple[float, float]:
    """Between which ratios the noise lies: the quartiles where the rows have them, else one deviation over seeds."""
    quartiles = [found for row in rows.values() if (found := row.get("latency_ratio_quartiles"))]
    if quartiles:
        return min(float(low) for low, _ in quartiles), max(float(high) for _, high in quartiles)
    return ratio.mean - (ratio.std or 0), ratio.mean + (ratio.std or 0)


# --------------------------------------------------------------------------------------------------- notes
def _notes(arms: Sequence[Arm], metric: str, seeds: Sequence[Any] | None, rows: Sequence[Row]) -> list[str]:
    absent = ", ".join(arm.name for arm in arms if not arm.run)
    notes = [f"Not run: {absent}."] if absent else []
    notes += [f"{row['arm']}, seed {row['seed']}: failed ({row['error']})." for row in rows if row.get("error")]
    lacking: dict[str, list[str]] = {}
    for arm in arms:
        missing = ", ".join(str(seed) for seed in seeds or () if arm.run and seed not in arm.seeds)
        if missing:
            lacking.setdefault(missing, []).append(arm.name)
    notes += [f"Not run for seed {missing}: {', '.join(names)}." for missing, names in lacking.items()]
    unheard = dict.fromkeys((row.get("neutral_loss") or {}).get("note") for row in rows)
    notes += [f"Forgetting was not measured: {note}." for note in unheard if note]
    notes += _search_notes(rows)
    run = [arm for arm in arms if arm.run]
    if not run:
        return notes
    if run[0] is arms[0] and len(run) > 1:
        notes.append(f"Differences of {metric} are to {arms[0].name}, paired by seed; the interval is 95% (t, n-1).")
    fewest = min(len(arm.by_seed) for arm in run)
    if fewest == 1:
        notes.append("One seed for some arms: no spread and no interval can be given for them.")
    if fewest < FEW_SEEDS:
        notes.append(f"Fewer than {FEW_SEEDS} seeds: small differences of {metric} may be chance.")
    notes.append(f"The spread is over seeds; it does not hold the chance in which {_counted(run)} the split has.")
    notes += _direction_notes([metric, *(name for arm in run for name in arm.metrics)])
    return notes + _latency_notes(run, rows)


def _counted(arms: Sequence[Arm]) -> str:
    """The rows that the metric was measured on, where their number is known and the same."""
    counts = {arm.values["rows"].mean for arm in arms if "rows" in arm.values}
    return f"{counts.pop():,.0f} examples" if len(counts) == 1 else "examples"


def alike(arm: Arm, other: Arm) -> bool:
    """Whether two arms are models of one form, so that their speeds differ by chance alone."""
    known = [key for key in SAME if key in arm.values or key in other.values]
    masked = ["zeros"] if "zeros" in arm.values or "zeros" in other.values else []
    return bool(known) and all(_same(arm.values.get(key), other.values.get(key)) for key in known + masked)


def _same(one: Stat | None, other: Stat | None) -> bool:
    if one is None or other is None:
        return False
    return abs(one.mean - other.mean) <= ALIKE * max(abs(one.mean), abs(other.mean))


def _search_notes(rows: Sequence[Row]) -> list[str]:
    """How rates were searched, and which were found at the end of what was tried."""
    found = {str(row["arm"]): row["search"] for row in rows if row.get("search")}
    notes = []
    for each in {(len(each["trials"]), each["metric"], each["rows"]): None for each in found.values()}:
        notes.append("Learning rates: the best of {} an arm, by {} on {} rows kept apart from train.".format(*each))
    for arm, each in found.items():
        tried = [trial["learning_rate"] for trial in each["trials"]]
        for end, which in ((min(tried), "smallest"), (max(tried), "largest")):
            if len(tried) > 1 and each["learning_rate"] == end:
                notes.append(
                    f"{arm}: the best rate is the {which} that was tried, {end:.3g}; beyond it may be better ones."
                )
    return notes


def _direction_notes(metrics: Sequence[str]) -> list[str]:
    """Which metrics are better low; a further split stands behind a metric's name in brackets."""
    from ffnkit.tasks.metrics import greater_is_better

    low = dict.fromkeys(name for name in (each.partition(" (")[0] for each in metrics) if not greater_is_better(name))
    return [f"Less is better: {', '.join(low)}."] if low else []


def _latency_notes(arms: Sequence[Arm], rows: Sequence[Row]) -> list[str]:
    notes = []
    for arm in arms[1:]:
        ratio = arm.latency_ratio
        if ratio is None or arm.ratio_range is None or alike(arm, arms[0]):
            continue
        low, high = arm.ratio_range
        if ratio.mean > SLOWER and low > 1:
            notes.append(f"{arm.name} is slower: {ratio.mean:.2f} times the latency of {arms[0].name}.")
        elif ratio.mean > NO_GAIN or low <= 1 <= high:
            noise = f" (noise: {low:.2f} to {high:.2f})" if low < high else ""
            notes.append(
                f"{arm.name} brings no speed: its latency is {ratio.mean:.2f} of that of {arms[0].name}{noise}."
            )
    compared = any(arm.latency_ratio is not None for arm in arms[1:])
    if compared and not any(_number(row.get("latency_ratio")) is not None for row in rows):
        notes.append("Latencies were taken in separate runs, not in alternation: drift of the machine is in them.")
    return notes
