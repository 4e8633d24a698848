"""What a reader should conclude from a summary: the best arm, which differences are beyond chance, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ffnkit.report.columns import COLUMNS, difference
from ffnkit.report.table import Arm, Difference, Stat, Summary, paired

COSTS = (
    *("parameters", "flops_per_token", "latency_s", "bytes_on_disk_compact"),
    *("trainable_parameters", "peak_memory_bytes", "seconds_per_step"),
)  # by which arms that are equally good are told apart
MOST = 6  # names in a sentence
WORTH = 0.95  # a share of the greatest cost up to which a smaller one is told of
WORDS = {
    "parameters": "fewest parameters",
    "flops_per_token": "fewest FLOPs a token",
    "latency_s": "least latency",
    "bytes_on_disk_compact": "fewest bytes on disk",
    "trainable_parameters": "fewest trained parameters",
    "peak_memory_bytes": "least peak memory",
    "seconds_per_step": "fastest step",
}


def conclusions(summary: Summary) -> list[str]:
    """Sentences, the most telling first; one that says so where nothing is finished."""
    from ffnkit.tasks.metrics import greater_is_better

    arms = [arm for arm in summary.arms if summary.metric in arm.metrics]
    if not arms:
        return [f"No arm has a value of {summary.metric} yet."]
    more = greater_is_better(summary.metric.partition(" (")[0])
    if len(arms) == 1:
        return [f"One arm has run, {arms[0].name}: {summary.metric} {_score(arms[0].metrics[summary.metric])}."]
    best, told = _best(arms, summary.metric, more)
    others = [arm for arm in arms if arm is not best]
    found = {arm.name: paired(best.by_seed, arm.by_seed) for arm in others}
    beyond, within = "Beyond chance it is better than", "Not beyond chance is its lead over"
    told += _sorted(found, (beyond, within, "Too few seeds, or too alike, to tell it from"))
    first = summary.arms[0]
    if first in arms and best is not first and len(others) > 1:
        to_first = {arm.name: arm.difference for arm in others if arm is not first}
        starts = (
            f"Different from {first.name} beyond chance",
            f"Different from {first.name}, but not beyond chance",
            f"Too few seeds, or too alike, to tell from {first.name}",
        )
        told += _sorted(to_first, starts, more)
    told += _cheaper(best, [arm for arm in others if (delta := found[arm.name]) and delta.beyond_chance is False])
    if sum(delta is not None and delta.beyond_chance is not None for delta in found.values()) > 2:
        told.append("Each interval is for one pair: of twenty such comparisons about one is wrong by chance.")
    return told


def _best(arms: Sequence[Arm], metric: str, more: bool) -> tuple[Arm, list[str]]:
    """The best of the arms with the most seeds, and what is said of it; one with fewer may be ahead by chance."""
    most = max(len(arm.by_seed) for arm in arms)
    sign = 1 if more else -1
    best = max((arm for arm in arms if len(arm.by_seed) == most), key=lambda arm: sign * arm.metrics[metric].mean)
    less = "" if more else ", where less is better"
    level = [
        each.name for each in arms if each is not best and _level(each.metrics[metric].mean - best.metrics[metric].mean)
    ]
    tied = f", level with {', '.join(level)}" if level else ""
    told = [f"Best by {metric}{less}: {best.name}, {_score(best.metrics[metric])}{tied}."]
    ahead = [arm for arm in arms if sign * (arm.metrics[metric].mean - best.metrics[metric].mean) > 0]
    if ahead:
        names = ", ".join(f"{arm.name}, {_score(arm.metrics[metric])}" for arm in ahead)
        told.append(f"Ahead of it with fewer seeds, which may be chance: {names}.")
    return best, told


def _score(stat: Stat) -> str:
    seeds = "one seed" if stat.n == 1 else f"mean of {stat.n} seeds"
    spread = "" if stat.std is None else f" ± {stat.std:.4f}"
    return f"{stat.mean:.4f}{spread} ({seeds})"


def _sorted(found: Mapping[str, Difference | None], words: Sequence[str], more: bool | None = None) -> list[str]:
    """Differences beyond chance, those that are not, and those of which the seeds cannot tell; the nearest come first.

    Args:
        words: what each of the three lists begins with. more: whether greater is better, where it is said of each
            which way it goes.
    """
    kinds: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for name, delta in sorted(found.items(), key=lambda item: abs(item[1].mean) if item[1] else 0.0):
        way = "" if more is None or delta is None else _way(delta.mean, more)
        figures = "no seed in common" if delta is None else difference(delta).replace("n = 1, no interval", "one seed")
        kinds[delta.beyond_chance if delta else None].append(f"{name} ({figures}{way})")
    return [f"{start}: {_listed(names)}." for start, names in zip(words, kinds.values(), strict=True) if names]


def _level(mean: float) -> bool:
    """Whether a difference is none as it is shown: seeds that cancel leave a rounding of their means."""
    return not round(mean, 4)


def _way(mean: float, more: bool) -> str:
    if _level(mean):
        return ", level"
    return ", better" if (mean > 0) == more else ", worse"


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - MOST} more (see the table)" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _cheaper(best: Arm, equals: Sequence[Arm]) -> list[str]:
    """Which of the arms that are not told apart from the best one costs least, by each cost that parts them."""
    least: dict[str, list[str]] = {}
    for key in COSTS:
        arms = [arm for arm in (best, *equals) if key in arm.values]
        values = [arm.values[key].mean for arm in arms]
        if len(arms) < 2 or min(values) > WORTH * max(values):
            continue
        winner = min(arms, key=lambda arm: arm.values[key].mean)
        shown = COLUMNS[key][1]([winner.values[key].mean])[0]
        text = f"{WORDS[key]} ({shown}, {winner.values[key].mean / max(values):.0%} of the most)"
        least.setdefault(winner.name, []).append(text)
    return [
        f"Of {best.name} and those not told apart from it, {name} has the {', the '.join(costs)}."
        for name, costs in least.items()
    ]
