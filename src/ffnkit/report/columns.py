"""A summary in words: which columns a table has, and each figure in the unit that people read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ffnkit.report.table import Arm, Difference, Stat, Summary

Shown = Callable[[Sequence[float]], list[str]]  # the figures of a column, all in one unit
COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def scaled(units: Sequence[tuple[float, str]]) -> Shown:
    """Four digits or so in the largest unit of which the least figure is a tenth, else in the smallest one."""

    def shown(values: Sequence[float]) -> list[str]:
        least = min((abs(value) for value in values if value), default=0.0)
        size, name = next((unit for unit in units if least >= unit[0] / 10), units[-1])
        if max(map(abs, values), default=0.0) < size:  # all of them are fractions of it
            size, name = next((unit for unit in units if unit[0] < size), (size, name))
        return [f"{_digits(value / size)} {name}" for value in values]

    return shown


def _digits(value: float) -> str:
    return f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def each(text: str, scale: float = 1.0) -> Shown:
    """The same format for every figure."""
    return lambda values: [text.format(value * scale) for value in values]


def durations(values: Sequence[float]) -> list[str]:
    """Seconds, or minutes where they are many."""
    minutes = max(values, default=0.0) >= 600
    return [f"{value / 60:.1f} min" if minutes else f"{value:.1f} s" for value in values]


parameters = scaled(COUNTS)
operations = scaled(((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))
sizes = scaled(((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))
step_times = scaled(((1.0, "s"), (1e-3, "ms")))
milliseconds, rates, whole = each("{:.1f} ms", 1e3), each("{:.3g}"), each("{:,.0f}")
share, small_share, change = each("{:.1%}"), each("{:.2%}"), each("{:+.4f}")


COLUMNS = {
    "parameters": ("parameters", parameters),
    "parameters_removed": ("saved", share),
    "ffn_parameters": ("in FFNs", parameters),
    "trainable_parameters": ("trained", parameters),
    "updated_parameters": ("a step", parameters),
    "trainable_share": ("without head", small_share),
    "samples_per_second": ("samples/s", rates),
    "seconds_per_step": ("a step takes", step_times),
    "peak_memory_bytes": ("peak memory", sizes),
    "learning_rate": ("rate found", rates),
    "flops_per_token": ("FLOPs/token", operations),
    "bytes_on_disk_compact": ("on disk compact", sizes),
    "bytes_on_disk_standard": ("on disk standard", sizes),
    "bytes_on_disk_apart": ("on disk apart", sizes),
    "latency_s": ("latency (ratio)", milliseconds),
    "zeros": ("zeros (merged)", share),
    "heads_removed": ("heads gone", share),
    "neurons_removed": ("neurons gone", share),
    "forgetting": ("forgetting", change),
    "rows": ("rows", whole),
}
LAYERS = "layers"
SETTINGS = {
    "rank": ("rank",),
    "width": ("width", "budget"),
    "share": ("count", "density", "nonzeros", "sparsity"),
}
SIZES, TRAINING = (
    ("parameters", "ffn_parameters", "parameters_removed"),
    (
        *("trainable_parameters", "updated_parameters", "trainable_share"),
        *("samples_per_second", "seconds_per_step", "peak_memory_bytes", "learning_rate"),
    ),
)  # of which tables are made beside that of what the model costs
# of arms with updates, of those that were pruned, of recipes with a neutral text, of rows of older runs
OPTIONAL = (
    *("bytes_on_disk_apart", "zeros", "heads_removed", "neurons_removed", "parameters_removed", "forgetting"),
    "learning_rate",
    *("updated_parameters", "trainable_share", "samples_per_second", "seconds_per_step", "rows"),
)
TOLD = {
    "parameters_removed": "saved: of the parameters of the model that was not compressed",
    "updated_parameters": "a step: numbers that a step of the optimizer changes",
    "trainable_share": "without head: what trains beside the task head, as a share of the model without it",
    "peak_memory_bytes": "peak memory: of tensors, in training steps",
    "rows": "rows: of the split that is reported",
}
SETTINGS_TOLD = {
    "width": "Width: what an FFN keeps of its neurons; above 1 their number.",
    "share": "Share: of a weight's entries, those that an update changes or that are pruned; above 1 their number.",
}


def score(stat: Stat | None) -> str:
    """Mean ± standard deviation, the mean alone for one seed."""
    if stat is None:
        return "not measured"
    return f"{stat.mean:.4f}" if stat.std is None else f"{stat.mean:.4f} ± {stat.std:.4f}"


def difference(delta: Difference | None) -> str:
    if delta is None:
        return "–"
    if delta.low is None:
        return f"{delta.mean:+.4f} (n = 1, no interval)"
    return f"{delta.mean:+.4f} [{delta.low:+.4f}, {delta.high:+.4f}]"


def cells(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Headers and one list of strings an arm; columns that no arm has are left out, and ``unmeasured`` names them."""
    columns = {"arm": [arm.name for arm in summary.arms], "seeds": [str(len(arm.seeds)) for arm in summary.arms]}
    columns |= _beside(summary)
    columns |= {name: [score(arm.metrics.get(name)) for arm in summary.arms] for name in summary.metrics}
    if any(arm.difference for arm in summary.arms):
        columns[compared(summary)] = [difference(arm.difference) for arm in summary.arms]
    told = {head: [setting(arm, names) for arm in summary.arms] for head, names in SETTINGS.items()}
    columns |= {head: column for head, column in told.items() if set(column) != {"–"}}
    for key in COLUMNS:
        if any(_shown(arm, key) for arm in summary.arms):
            columns[COLUMNS[key][0]] = _column(summary.arms, key)
    if any(arm.seconds for arm in summary.arms):
        total = [math.fsum(stat.mean for stat in arm.seconds.values()) if arm.seconds else None for arm in summary.arms]
        columns["time"] = filled(total, durations)
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    for arm, line in zip(summary.arms, lines, strict=True):
        if not arm.run:
            line[2:] = ["not run"] * (len(line) - 2)
    return list(columns), lines


def compared(summary: Summary) -> str:
    """The head of the column of differences."""
    return f"{summary.metric} difference [95%]"


def filled(values: Sequence[float | None], shown: Shown, empty: str = "not measured") -> list[str]:
    """The figures of a column, and ``empty`` where there is none."""
    known = iter(shown([value for value in values if value is not None]))
    return [empty if value is None else next(known) for value in values]


def _column(arms: Sequence[Arm], key: str) -> list[str]:
    """The figures of all arms, with what stands in brackets beside them."""
    means = [arm.values[key].mean if key in arm.values else None for arm in arms]
    texts = filled(means, COLUMNS[key][1], "–" if key in OPTIONAL else "not measured")
    for number, arm in enumerate(arms):
        if key == "zeros" and "zeros_merged" in arm.values:
            texts[number] += f" ({share([arm.values['zeros_merged'].mean])[0]})"
        if key == "latency_s" and key in arm.values and arm.latency_ratio:
            texts[number] += f" ({arm.latency_ratio.mean:.2f})"
    return texts


def _beside(summary: Summary) -> dict[str, list[str]]:
    """Columns that stand before the metrics where an arm has such: layers, the metric before tuning."""
    arms, found = summary.arms, dict[str, list[str]]()
    if any(arm.layers for arm in arms):
        found[LAYERS] = [chosen(arm.layers) for arm in arms]
    if any(arm.before for arm in arms):
        found[f"{summary.metric} before"] = ["–" if arm.before is None else score(arm.before) for arm in arms]
    return found


def setting(arm: Arm, names: Sequence[str]) -> str:
    """What an arm's method, else its tuner, has under the first of these names that one of the two has."""
    own, tuner = arm.settings, arm.settings.get("tuner")
    for name in names:
        for each in (own, tuner if isinstance(tuner, Mapping) else {}):
            value = each.get(name)
            if isinstance(value, bool) or value is None:
                continue
            return f"{value:g}" if isinstance(value, int | float) else "by layer"
    return "–"


def chosen(layers: Sequence[str]) -> str:
    """The layers that were merged or dropped; where seeds chose others, how many chose which."""
    counts = Counter(layers)
    return ", ".join(each if len(counts) == 1 else f"{each} ({n})" for each, n in counts.most_common()) or "–"


def _shown(arm: Arm, key: str) -> bool:
    """Whether an arm gives reason for a column; heads and neurons that went leave no zeros."""
    if key == "updated_parameters":  # else it is what trains
        return key in arm.values and arm.values[key] != arm.values["trainable_parameters"]
    return key in arm.values and (key != "zeros" or arm.values[key].mean > 0)


def blocks(summary: Summary) -> list[tuple[list[str], list[list[str]]]]:
    """``cells`` as narrower tables: scores and sizes, scores of each further split, then training, then costs."""
    header, lines = cells(summary)
    training = {COLUMNS[key][0] for key in TRAINING} | {"time"}
    sizes = {COLUMNS[key][0] for key in SIZES}
    costs = {head for head, _ in COLUMNS.values()} - training - sizes
    found = []
    splits = _further(summary.metrics)
    first = set(header) - training - costs - set().union(*splits)
    for number, wanted in enumerate((first, *splits, training, costs)):
        places = [0] + [n for n, head in enumerate(header) if n and head in wanted]
        if number == 0 or len(places) > 1:
            found.append(([header[n] for n in places], [[line[n] for n in places] for line in lines]))
    return found


def _further(metrics: Sequence[str]) -> list[set[str]]:
    """The metrics of each split that is reported beside: "bleu (test)" where "bleu" is there."""
    found: dict[str, set[str]] = {}
    for name in metrics:
        plain, _, split = name.partition(" (")
        if split and plain in metrics:
            found.setdefault(split, set()).add(name)
    return list(found.values())


def unmeasured(summary: Summary) -> list[str]:
    """The columns that no arm has a value for."""
    found = {key for arm in summary.arms for key in arm.values}
    return [head for key, (head, _) in COLUMNS.items() if key not in found and key not in OPTIONAL]


def all_notes(summary: Summary) -> list[str]:
    """The notes of the summary and, as the last, what was not measured."""
    missing = unmeasured(summary) if any(arm.run for arm in summary.arms) else []
    shown = {key for key in TOLD if any(_shown(arm, key) for arm in summary.arms)}
    told = [f"{text[0].upper()}{text[1:]}." for key, text in TOLD.items() if key in shown]
    for head, text in SETTINGS_TOLD.items():
        if any(setting(arm, SETTINGS[head]) != "–" for arm in summary.arms):
            told.append(text)
    return [*summary.notes, *told, *([f"Not measured: {', '.join(missing)}."] if missing else [])]
