"""The report: one HTML file without outside assets or scripts, for screens of any width and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ffnkit.io.files import write_text
from ffnkit.report.columns import all_notes, blocks, durations, filled
from ffnkit.report.conclusions import conclusions
from ffnkit.report.curves import curves
from ffnkit.report.plot import AXES, heading, trade_offs
from ffnkit.report.style import STYLE, choosing
from ffnkit.report.table import Row, Summary, summarize

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""


@dataclass(frozen=True)
class PageInfo:
    """What the report says.

    Attributes:
        title: heading of the page.
        model, task, metric: what was compressed, on which task, by which metric.
        split_policy: which data chose the settings and checkpoints, and which gave the reported figures.
        rows: rows of results.json, as ``ffnkit.report.table`` describes them.
        arms: {arm: its settings}, in order; the first is what the others are compared with.
        settings: settings of the run that all arms share.
        seeds: the seeds that were asked for.
        versions, machine: as ``ffnkit.report.measure`` gives them.
        notes: further lines for the notes.
        command: what makes the run again, as it is typed. recipe: the text of its file.
        links: {what: path} of files and folders, from the folder of the page.
        verdicts, verdict_notes: a table of compared answers, its head first, and what it needs to be read with.
        axis: what the first plot stands against, one of ``report.plot.AXES`` that is measured of some arm.
        told: what to conclude, in place of what the rows tell by their seeds. front: a table of it, its head first.
        answers: prompts with {"prompt", "references", "answers": {arm: text}, "verdicts": {arm: word}}.
    """

    title: str
    model: str
    task: str
    metric: str
    split_policy: str
    rows: Sequence[Row]
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[Any] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""
    recipe: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    verdicts: Sequence[Sequence[str]] = ()
    verdict_notes: Sequence[str] = ()
    axis: str | None = None
    told: Sequence[str] = ()
    front: Sequence[Sequence[str]] = ()
    answers: Sequence[Mapping[str, Any]] = ()


def write_page(path: str | Path, info: PageInfo) -> None:
    """Write the report; an interrupted write leaves the old file."""
    write_text(path, page(info))


def page(info: PageInfo) -> str:
    """The report as one HTML document."""
    summary = summarize(info.rows, info.metric, arms=list(info.arms) or None, seeds=info.seeds or None)
    plots = trade_offs(summary, info.axis)
    told = info.told or conclusions(summary)
    lead = f"{info.model} on {info.task}, by {info.metric}"
    parts = [
        f'<header><h1>{escape(info.title)}</h1>\n<p class="lead">{escape(lead)}</p></header>\n<main>',
        _section("What to conclude", _listed(told, "told") + _listed(info.notes, "notes")),
        _section("Size and quality", _table(info.front[0], info.front[1:], label="front") if info.front else ""),
        _results(summary),
        _plots(summary, plots),
        _curves(summary, info.metric),
        _section("Answers compared", _verdicts(info)),
        _section("Answers side by side", "".join(map(_answers, info.answers))),
        _section("Files", _files(info)),
        _section("What was run", _run(info)),
        _section("Arms", _pairs({name: _settings(value) or "as it is" for name, value in info.arms.items()})),
        _section("Learning rates tried", _tried(info.rows)),
        _section("Time by stage", _stages(summary)),
        _section("Machine", _pairs(_machine(info.machine))),
        _section("Versions", _pairs(info.versions)),
        "</main>\n<footer>Written by ffnkit.</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    style = STYLE + choosing([str(key) for key in plots])
    head = f"<title>{escape(info.title)}</title>\n<style>{style}</style>\n</head>\n"
    return f"{HEAD}{head}<body>\n{body}\n</body>\n</html>\n"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _results(summary: Summary) -> str:
    classes = ["" if arm.run else "notrun" for arm in summary.arms]
    tables = [
        _table(header, lines, classes, f"results, table {number}")
        for number, (header, lines) in enumerate(blocks(summary), 1)
    ]
    return _section("Results", "".join(tables) + _listed(all_notes(summary), "notes"))


def _listed(notes: Sequence[str], name: str) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="{name}">{items}</ul>\n' if items else ""


def _plots(summary: Summary, plots: Mapping[str | None, Sequence[str]]) -> str:
    """The metric against one of several costs, which radio buttons choose; the first is chosen to begin with."""
    if not plots:
        return ""
    buttons = [
        f'<label for="axis-{key}"><input type="radio" name="axis" id="axis-{key}"{" checked" * (not number)}> '
        f"{escape(AXES[key][0])}</label>"
        for number, key in enumerate(plots)
        if key is not None
    ]
    control = f"<fieldset><legend>Against</legend>{''.join(buttons)}</fieldset>\n" if len(buttons) > 1 else ""
    caption = (
        "Marks: mean over seeds, with one standard deviation; ticks: single seeds. All stand where their figure is; "
        "of arms on one spot the later marks are the smaller ones. The dashed line is the first arm."
    )
    figures = [
        f'<figure class="axis-{key}"><div class="plots">{"".join(each)}</div>'
        f"<figcaption>{escape(heading(summary, key))}. {caption}</figcaption></figure>"
        for key, each in plots.items()
    ]
    costs = " against what it costs" if None not in plots else ""
    return _section(f"{summary.metric}{costs}", control + "\n".join(figures))


def _curves(summary: Summary, metric: str) -> str:
    shown = curves(summary, metric)
    caption = "Mean over an arm's seeds. The loss is a mean since the point before."
    figure = f'<figure><div class="plots">{"".join(shown)}</div><figcaption>{caption}</figcaption></figure>'
    return _section("Loss curves", figure if shown else "")


def _files(info: PageInfo) -> str:
    """Links to every checkpoint and file of predictions, unit by unit, and to the files of the run."""
    lines = [
        [str(row["arm"]), str(row["seed"]), _links(row.get("checkpoints") or {}), _links(row.get("predictions") or {})]
        for row in info.rows
        if row.get("checkpoints") or row.get("predictions")
    ]
    heads = ["arm", "seed", "checkpoints", "predictions by split"]
    table = _table(heads, lines, label="files of each unit", name="words", markup=True) if lines else ""
    return table + (f"<p>{_links(info.links)}</p>\n" if info.links else "")


def _links(paths: Mapping[str, str]) -> str:
    return ", ".join(f'<a href="{escape(quote(path))}">{escape(str(name))}</a>' for name, path in paths.items()) or "–"


def _verdicts(info: PageInfo) -> str:
    table = _table(info.verdicts[0], info.verdicts[1:], label="answers compared") if info.verdicts else ""
    return table + _listed(info.verdict_notes, "notes")


def _answers(row: Mapping[str, Any]) -> str:
    """A prompt that opens on what each arm wrote for it."""
    prompt, verdicts = str(row["prompt"]), row.get("verdicts", {})
    words = " ".join(prompt.split())
    told = {f"{arm} ({verdicts[arm]})" if arm in verdicts else arm: text for arm, text in row["answers"].items()}
    right = {"right": row["references"][0]} if row.get("references") else {}
    whole = {"prompt": prompt, **right, **told}
    title = escape(words if len(words) <= 120 else f"{words[:119]}…")
    return f"<details><summary>{title}</summary>\n{_pairs(whole)}</details>\n"


def _run(info: PageInfo) -> str:
    about = {
        "model": info.model,
        "task": info.task,
        "data": info.split_policy,
        "seeds": ", ".join(str(seed) for seed in info.seeds),
        **{name: _value(value) for name, value in info.settings.items()},
    }
    told = _pairs({name: value for name, value in about.items() if value})
    if info.command:
        told += f"<h3>Again</h3>\n<pre><code>{escape(info.command)}</code></pre>\n"
    if info.recipe:
        told += f"<details><summary>The recipe</summary>\n<pre><code>{escape(info.recipe)}</code></pre></details>\n"
    return told


def _tried(rows: Sequence[Row]) -> str:
    """The rates of each arm with their scores, in the order of the trials; the chosen one is marked."""
    lines = {}
    for row in rows:
        if (found := row.get("search")) and row["arm"] not in lines:
            shown = [
                f"{t['learning_rate']:.3g}: {'failed' if t['score'] is None else format(t['score'], '.4f')}"
                + " *" * (t["learning_rate"] == found["learning_rate"])
                for t in found["trials"]
            ]
            lines[row["arm"]] = [str(row["arm"]), *shown]
    if not lines:
        return ""
    most = max(map(len, lines.values()))
    header = ["arm", *(f"trial {number}" for number in range(1, most))]
    whole = [line + [""] * (most - len(line)) for line in lines.values()]
    return _table(header, whole, label="learning rates tried") + "<p class='lead'>* chosen.</p>"


def _stages(summary: Summary) -> str:
    stages = list(dict.fromkeys(stage for arm in summary.arms for stage in arm.seconds))
    if not stages:
        return ""
    arms = [arm for arm in summary.arms if arm.run]
    columns = [
        filled([arm.seconds[stage].mean if stage in arm.seconds else None for arm in arms], durations, "–")
        for stage in stages
    ]
    lines = [[arm.name, *line] for arm, *line in zip(arms, *columns, strict=True)]
    return _table(["arm", *stages], lines, label="time by stage") + "<p class='lead'>Mean over seeds.</p>"


def _machine(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Memory in GB and words for the keys."""
    shown = {name.removesuffix("_bytes").replace("_", " "): value for name, value in machine.items()}
    if isinstance(memory := machine.get("memory_bytes"), int | float):
        shown["memory"] = f"{memory / 1e9:.1f} GB"
    return shown


def _table(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    classes: Sequence[str] = (),
    label: str = "",
    name: str = "",
    markup: bool = False,
) -> str:
    """A table in a region that the keyboard can scroll; with ``markup`` cells but the first two are HTML already."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for index, line in enumerate(lines):
        kind = f' class="{classes[index]}"' if index < len(classes) and classes[index] else ""
        rest = "".join(f"<td>{cell if markup and n > 1 else escape(cell)}</td>" for n, cell in enumerate(line) if n)
        body += f'<tr{kind}><th scope="row">{escape(line[0])}</th>{rest}</tr>\n'
    table = f"<table{f' class={chr(34)}{name}{chr(34)}' if name else ''}><thead><tr>{head}</tr></thead>"
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
    return f"{region}{table}\n<tbody>{body}</tbody></table></div>\n"


def _pairs(values: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_value(value))}</dd>\n" for key, value in values.items())
    return f"<dl>{items}</dl>\n" if items else ""


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _settings(value)
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in settings.items())
