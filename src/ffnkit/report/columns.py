"""A summary in words: which columns a table has, and each figure in the unit that people read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ffnkit.report.table import Arm, Difference, Stat, Summary


def parameters(stat: Stat) -> str:
    return _scaled(stat.mean, ((1e9, "B"), (1e6, "M"), (1e3, "k")))


def operations(stat: Stat) -> str:
    return _scaled(stat.mean, ((1e9, "G"), (1e6, "M"), (1e3, "k")))


def size(stat: Stat) -> str:
    return _scaled(stat.mean, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Four digits at most, in the largest unit that the value reaches, else in the smallest one."""
    unit, name = next((pair for pair in units if value >= pair[0]), units[-1])
    value /= unit
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f} {name}"


def milliseconds(stat: Stat) -> str:
    return f"{stat.mean * 1e3:.1f} ms"


def duration(stat: Stat) -> str:
    return f"{stat.mean:.1f} s" if stat.mean < 600 else f"{stat.mean / 60:.1f} min"


def share(stat: Stat) -> str:
    return f"{stat.mean:.1%}"


def small_share(stat: Stat) -> str:
    return f"{stat.mean:.2%}"


def rate(stat: Stat) -> str:
    return f"{stat.mean:.3g}"


def change(stat: Stat) -> str:
    return f"{stat.mean:+.4f}"


COLUMNS = {
    "parameters": ("parameters", parameters),
    "parameters_removed": ("saved", share),
    "ffn_parameters": ("in FFNs", parameters),
    "trainable_parameters": ("trained", parameters),
    "updated_parameters": ("a step", parameters),
    "trainable_share": ("without head", small_share),
    "samples_per_second": ("samples/s", rate),
    "steps_per_second": ("steps/s", rate),
    "peak_memory_bytes": ("peak memory", size),
    "learning_rate": ("rate found", rate),
    "flops_per_token": ("FLOPs/token", operations),
    "bytes_on_disk_compact": ("on disk compact", size),
    "bytes_on_disk_standard": ("on disk standard", size),
    "bytes_on_disk_apart": ("on disk apart", size),
    "latency_s": ("latency (ratio)", milliseconds),
    "zeros": ("zeros (merged)", share),
    "heads_removed": ("heads gone", share),
    "neurons_removed": ("neurons gone", share),
    "forgetting": ("forgetting", change),
}
LAYERS = "layers"
SIZES, TRAINING = (
    ("parameters", "ffn_parameters", "parameters_removed"),
    (
        *("trainable_parameters", "updated_parameters", "trainable_share"),
        *("samples_per_second", "steps_per_second", "peak_memory_bytes", "learning_rate"),
    ),
)  # of which tables are made beside that of what the model costs
# of arms with updates, of those that were pruned, of recipes with a neutral text, of rows of older runs
OPTIONAL = (
    *("bytes_on_disk_apart", "zeros", "heads_removed", "neurons_removed", "parameters_removed", "forgetting"),
    "learning_rate",
    *("updated_parameters", "trainable_share", "samples_per_second", "steps_per_second"),
)
TOLD = {
    "parameters_removed": "saved: of the parameters of the model that was not compressed",
    "updated_parameters": "a step: numbers that a step of the optimizer changes",
    "trainable_share": "without head: what trains beside the task head, as a share of the model without it",
    "peak_memory_bytes": "peak memory: of tensors, in training steps",
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
    columns = [key for key in COLUMNS if any(_shown(arm, key) for arm in summary.arms)]
    compared = any(arm.difference for arm in summary.arms)
    timed = any(arm.seconds for arm in summary.arms)
    header = ["arm", "seeds", *_beside(summary), *summary.metrics, *(["difference [95%]"] if compared else [])]
    header += [COLUMNS[key][0] for key in columns] + (["time"] if timed else [])
    return header, [_line(arm, summary, columns, compared, timed, len(header)) for arm in summary.arms]


def _beside(summary: Summary) -> list[str]:
    """The heads of columns that stand before the metrics, where an arm has such: layers, the metric before tuning."""
    layers = [LAYERS] if any(arm.layers for arm in summary.arms) else []
    return layers + ([f"{summary.metric} before"] if any(arm.before for arm in summary.arms) else [])


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


def _line(arm: Arm, summary: Summary, columns: list[str], compared: bool, timed: bool, width: int) -> list[str]:
    if not arm.run:
        return [arm.name, "0"] + ["not run"] * (width - 2)
    beside = {LAYERS: chosen(arm.layers), f"{summary.metric} before": "–" if arm.before is None else score(arm.before)}
    line = [
        arm.name,
        str(len(arm.seeds)),
        *(beside[head] for head in _beside(summary)),
        *(score(arm.metrics.get(name)) for name in summary.metrics),
    ]
    line += [difference(arm.difference)] if compared else []
    line += [_value(arm, key) for key in columns]
    if timed:
        total = math.fsum(stat.mean for stat in arm.seconds.values())
        line.append(duration(Stat(total, None, 1)) if arm.seconds else "not measured")
    return line


def _value(arm: Arm, key: str) -> str:
    if key not in arm.values:
        return "–" if key in OPTIONAL else "not measured"
    text = COLUMNS[key][1](arm.values[key])
    if key == "zeros" and "zeros_merged" in arm.values:
        return f"{text} ({share(arm.values['zeros_merged'])})"
    return f"{text} ({arm.latency_ratio.mean:.2f})" if key == "latency_s" and arm.latency_ratio else text


def unmeasured(summary: Summary) -> list[str]:
    """The columns that no arm has a value for."""
    found = {key for arm in summary.arms for key in arm.values}
    return [head for key, (head, _) in COLUMNS.items() if key not in found and key not in OPTIONAL]


def all_notes(summary: Summary) -> list[str]:
    """The notes of the summary and, as the last, what was not measured."""
    missing = unmeasured(summary) if any(arm.run for arm in summary.arms) else []
    shown = {key for key in TOLD if any(_shown(arm, key) for arm in summary.arms)}
    told = [f"{text[0].upper()}{text[1:]}." for key, text in TOLD.items() if key in shown]
    return [*summary.notes, *told, *([f"Not measured: {', '.join(missing)}."] if missing else [])]
