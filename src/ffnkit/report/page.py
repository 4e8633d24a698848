"""The report: one HTML file without outside assets, for light and dark screens and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ffnkit.io.files import write_text
from ffnkit.report.columns import all_notes, blocks, duration
from ffnkit.report.plot import heading, metric_plot
from ffnkit.report.table import Row, Summary, summarize

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60666d; --line: #d9dde1; --paper: #fff; --tint: #f5f6f8;
  --mark: #b25000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa2ab; --line: #363c43; --paper: #15181b;
  --tint: #1e2226; --mark: #f0a860; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p, li { max-width: 46rem; }
.lead { color: var(--soft); margin-top: 0; }
.scroll { overflow-x: auto; margin-bottom: 1.4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tr > :first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); }
.notrun td { color: var(--soft); font-style: italic; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0; font-size: .9375rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; } details dl { margin: .6rem 0; }
details dd { white-space: pre-wrap; } summary { cursor: pointer; }
.notes { border-left: 3px solid var(--mark); background: var(--tint); padding: .7rem 1rem .7rem 1.9rem; margin: 1rem 0;
  max-width: 50rem; font-size: .9375rem; }
svg { max-width: 100%; height: auto; display: block; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; max-width: 46rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } h2 { break-after: avoid; } }
"""
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
        verdicts, verdict_notes: a table of compared answers, its head first, and what it needs to be read with.
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
    verdicts: Sequence[Sequence[str]] = ()
    verdict_notes: Sequence[str] = ()
    answers: Sequence[Mapping[str, Any]] = ()


def write_page(path: str | Path, info: PageInfo) -> None:
    """Write the report; an interrupted write leaves the old file."""
    write_text(path, page(info))


def page(info: PageInfo) -> str:
    """The report as one HTML document."""
    summary = summarize(info.rows, info.metric, arms=list(info.arms) or None, seeds=info.seeds or None)
    parts = [
        f"<h1>{escape(info.title)}</h1>",
        f'<p class="lead">{escape(info.model)} on {escape(info.task)}, by {escape(info.metric)}</p>',
        _results(summary, info.notes),
        _plot(summary),
        _section("Answers compared", _verdicts(info)),
        _section("Answers side by side", "".join(map(_answers, info.answers))),
        _section("What was run", _run(info)),
        _section("Arms", _pairs({name: _settings(value) or "as it is" for name, value in info.arms.items()})),
        _section("Learning rates tried", _tried(info.rows)),
        _section("Time by stage", _stages(summary)),
        _section("Machine", _pairs(_machine(info.machine))),
        _section("Versions", _pairs(info.versions)),
        "<footer>Written by ffnkit.</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    head = f"<title>{escape(info.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    return f"{HEAD}{head}<body>\n{body}\n</body>\n</html>\n"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _results(summary: Summary, notes: Sequence[str]) -> str:
    classes = ["" if arm.run else "notrun" for arm in summary.arms]
    listed = _listed((*notes, *all_notes(summary)))
    tables = "".join(_table(header, lines, classes) for header, lines in blocks(summary))
    return _section("Results", tables + listed)


def _listed(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _plot(summary: Summary) -> str:
    svg = metric_plot(summary)
    if svg is None:
        return ""
    caption = (
        "Large marks: mean over seeds, with one standard deviation. Small dots: single seeds. "
        "Arms of the same size stand side by side; the dashed line is the first arm."
    )
    return _section(heading(summary), f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")


def _verdicts(info: PageInfo) -> str:
    table = _table(info.verdicts[0], info.verdicts[1:]) if info.verdicts else ""
    return table + _listed(info.verdict_notes)


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
    return _pairs({name: value for name, value in about.items() if value})


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
    return (
        _table(header, [line + [""] * (most - len(line)) for line in lines.values()]) + "<p class='lead'>* chosen.</p>"
    )


def _stages(summary: Summary) -> str:
    stages = list(dict.fromkeys(stage for arm in summary.arms for stage in arm.seconds))
    if not stages:
        return ""
    lines = [
        [arm.name, *(duration(arm.seconds[stage]) if stage in arm.seconds else "–" for stage in stages)]
        for arm in summary.arms
        if arm.run
    ]
    return _table(["arm", *stages], lines) + "<p class='lead'>Mean over seeds.</p>"


def _machine(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Memory in GB and words for the keys."""
    shown = {name.removesuffix("_bytes").replace("_", " "): value for name, value in machine.items()}
    if isinstance(memory := machine.get("memory_bytes"), int | float):
        shown["memory"] = f"{memory / 1e9:.1f} GB"
    return shown


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for index, line in enumerate(lines):
        name = f' class="{classes[index]}"' if index < len(classes) and classes[index] else ""
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        body += f'<tr{name}><th scope="row">{escape(line[0])}</th>{rest}</tr>\n'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


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
