"""What a search leaves to read: the front of size and quality as a table, a plot and a page; the card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnkit.checkpoint.export import written_widths
from ffnkit.io import quickstart
from ffnkit.io.architectures import is_own
from ffnkit.io.files import write_text
from ffnkit.io.markdown import one_line, paragraphs
from ffnkit.recipe.results import plain
from ffnkit.recipe.state import write_json
from ffnkit.report import environment
from ffnkit.report.card import CardInfo, LayerWidth, Metric, model_card
from ffnkit.report.formats import markdown_table
from ffnkit.report.licence import licence_of
from ffnkit.search.halving import fronts
from ffnkit.search.settings import COUNTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnkit.search.job import Run

HEADER = ("", "candidate", "size", "FFN parameters", "kept", "at least", "tokens")  # and latency, where that counts
AXES = {"params": "parameters", "flops": "flops_per_token", "bytes": "bytes_on_disk_compact", "latency": "latency_s"}


def write(run: Run, results: dict[str, Any]) -> None:
    """results.json last: where it is there, all is."""
    out, rows = run.folder.out, front(results)
    notes = said(results)
    head = f"# {one_line(run.recipe.name)}\n\n" + (paragraphs(run.recipe.notes) if run.recipe.notes else "")
    table = markdown_table(header(results), table_rows(results))
    write_text(out / "front.md", f"{head}{table}\n" + "".join(f"- {line}\n" for line in notes))
    if rows:
        _picture(run, results, notes)
    write_json(out / "results.json", plain(results))


def front(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The tuned candidates that no other beats in size and quality, the smallest first."""
    tuned = {row["number"]: row for row in results["candidates"] if "tuned" in row}
    points = {number: (row["size"], -row["tuned"]["kept"]) for number, row in tuned.items()}
    return [tuned[number] for number in (fronts(points)[0] if points else [])]


def shown(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The front, and what was chosen where that lies behind it: the fastest need not have the fewest FLOPs."""
    found, chosen = front(results), results["chosen"]
    if chosen is None:
        return found
    others = [row for row in found if row["number"] != chosen["number"]]
    return sorted([*others, chosen], key=lambda row: float(row["size"]))  # of the chosen more is known


def header(results: dict[str, Any]) -> tuple[str, ...]:
    """The heads of the table's columns."""
    return (*HEADER, "latency") if _by_clock(results) else HEADER


def _by_clock(results: dict[str, Any]) -> bool:
    return bool(results["recipe"]["search"]["objective"] == "latency")


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells of the table: what was tuned, by size; the front has a star, what was chosen an arrow."""
    best, whole = {row["number"] for row in front(results)}, results["original"]["costs"]["ffn_params"]
    chosen = (results["chosen"] or {}).get("number")
    found = []
    for row in sorted((r for r in results["candidates"] if "tuned" in r), key=lambda r: r["size"]):
        tuned = row["tuned"]
        mark = "->" if row["number"] == chosen else "*" if row["number"] in best else ""
        low = "" if tuned["low"] is None else f"{tuned['low']:.2%}"
        ffn = f"{row['costs']['ffn_params'] / whole:.1%}"
        cells = [mark, row["name"], f"{row['size']:.1%}", ffn, f"{tuned['kept']:.2%}", low, f"{tuned['tokens']:,}"]
        if _by_clock(results):
            cells.append(f"{row['latency']:.2f}" if "latency" in row else "")
        found.append(cells)
    return found


def said(results: dict[str, Any]) -> list[str]:
    """What the table means, in sentences; the last one says what was found."""
    settings = results["recipe"]["search"]
    what, metric, floor = COUNTED[settings["objective"]], results["metric"], results["floor"]
    value = results["original"]["value"]
    lines = [
        f"size: {what}, to the original's. kept: {metric} on dev, to the original's ({value:.4g}). at least: the lower"
        " end of a one-sided 90% interval, by paired rows.",
        f"asked for: {floor:.4g} of {metric}, and an interval above {2 * floor - 1:.4g}. ->: chosen on dev, *: no other"
        " is smaller and better.",
        f"{len(results['candidates'])} candidates were measured before tuning,"
        f" {sum('tuned' in row for row in results['candidates'])} of them tuned.",
    ]
    if _by_clock(results):
        lines.append(
            "latency: seconds of a batch, to the original's, all in turn at the end, of the smallest that keep enough;"
            " the fastest is chosen, and timed again."
        )
    if (chosen := results["chosen"]) is None:
        if any(row.get("enough") for row in results["candidates"]):
            return [*lines, "Of the models that keep that none is faster: take another objective, or a larger model."]
        return [*lines, "No smaller model keeps that: ask for less, or tune longer (search.tokens)."]
    report = chosen["report"]
    low = "" if report["low"] is None else f", surely {report['low']:.2%}"
    lines.append(
        f"Chosen: {chosen['name']}, {chosen['size']:.1%} of the {what}. Its {metric} is {report['value']:.4g} on the"
        f" rows that chose nothing, the original's {report['original']:.4g}: {report['kept']:.2%} is kept{low}."
        f" {_speed(chosen, results.get('timing'))}"
    )
    return lines


def _speed(chosen: dict[str, Any], how: dict[str, Any] | None) -> str:
    """The time of the chosen one in words; of results of an earlier version less is known."""
    told = f"A batch takes {chosen['latency']:.2f} of the original's time"
    if how is None or "latency_quartiles" not in chosen:
        return f"{told}."
    low, high = chosen["latency_quartiles"]
    level = ": no difference that can be told" if low <= 1 <= high else ""
    return (
        f"{told}{level} (half of {how['repeats']} rounds in turn, after all else, between {low:.2f} and {high:.2f};"
        f" {how['batch_size']} x {how['length']}, {how['device']}, threads: {how['threads']})."
    )


def _picture(run: Run, results: dict[str, Any], notes: list[str]) -> None:
    """The plot and the page, by what draws those of runs."""
    from ffnkit.report.page import PageInfo, write_page
    from ffnkit.report.plot import drawn, heading, svg
    from ffnkit.report.table import summarize

    metric = results["metric"]
    first = results["original"]
    rows = [_row("original", metric, first["value"], first["costs"])]
    if "latency_s" in first:
        rows[0] |= {"latency_s": first["latency_s"], "latency_ratio": 1.0}
    arms: dict[str, dict[str, Any]] = {"original": {}}
    for each in shown(results):
        name = each["name"]
        rows.append(_row(name, metric, each["tuned"]["value"], each["costs"]) | _time(each))
        arms[name] = {key: value for key, value in each["candidate"].items() if value}
    summary, axis = summarize(rows, metric), AXES[results["recipe"]["search"]["objective"]]
    if not all(axis in row for row in rows):  # only those that keep enough are timed
        axis = AXES["flops"]
    write_text(run.folder.out / "front.svg", svg(drawn(summary, axis), heading(summary, axis), "front"))
    info = PageInfo(
        title=run.recipe.name,
        model=run.recipe.model,
        task=run.ground.where,
        metric=metric,
        split_policy="chosen on dev, whose figures these are; the chosen one is reported once on rows kept for that",
        rows=rows,
        arms=arms,
        settings={name: value for name, value in results["recipe"]["search"].items() if value is not None},
        seeds=(0,),
        versions=environment.versions(),
        machine=environment.machine(),
        notes=notes[:-1],
        told=notes[-1:],
        front=[[f"{cells[1]} {cells[0]}".strip(), *cells[2:]] for cells in (header(results), *table_rows(results))],
        axis=axis,
    )
    write_page(run.folder.out / "report.html", info)


def _row(name: str, metric: str, value: float, costs: dict[str, int]) -> dict[str, Any]:
    return {
        "arm": name,
        "seed": 0,
        "status": "done",
        "metrics": {metric: value},
        "parameters": costs["params"],
        "ffn_parameters": costs["ffn_params"],
        "flops_per_token": costs["flops"],
        "bytes_on_disk_compact": costs["bytes"],
    }


def _time(row: dict[str, Any]) -> dict[str, Any]:
    return {"latency_s": row["latency_s"], "latency_ratio": row["latency"]} if "latency" in row else {}


def card(run: Run, model: PreTrainedModel, chosen: dict[str, Any], form: Any) -> str:
    """The model card of the chosen one."""
    from ffnkit.model.finding import ffns

    widths = {ffn.name: ffn.width for ffn in ffns(model)}
    held = written_widths(model) if form == "standard" else {}
    metric = run.ground.metric
    task = getattr(run.ground, "task", None)
    dataset, config = (task.hub[0], task.hub[1] if len(task.hub) > 1 else None) if task and task.hub else ("text", None)
    report = chosen["report"]
    low = "" if report["low"] is None else f" (at least {report['low']:.2%}, one-sided 90%, paired rows)"
    return model_card(
        CardInfo(
            base_model=quickstart.HUB if run.recipe.model == quickstart.NAME else run.recipe.model,
            form=form,
            method="ffnkit search",
            settings={name: value for name, value in chosen["candidate"].items() if value},
            layers=tuple(
                LayerWidth(ffn.name, ffn.width, widths.get(ffn.name), held.get(ffn.name)) for ffn in ffns(run.original)
            ),
            metrics=[
                Metric(
                    metric,
                    report["value"],
                    dataset=dataset,
                    config=config,
                    split="validation" if config else "report",
                    task=task.pipeline_tag if task else "text-generation",
                    baseline=report["original"],
                )
            ],
            healing={"tokens in the last rung": chosen["tuned"]["tokens"], "rungs": chosen["tuned"]["rung"] + 1},
            figures={"kept": f"{report['kept']:.2%}{low}", "parameters": f"{chosen['costs']['params']:,}"},
            versions=environment.versions(),
            notes=["Chosen on dev among several candidates; reported once on rows that chose nothing."],
            auto_class=task.auto_class(model.config).__name__ if task else "AutoModelForCausalLM",
            own_class=is_own(model),
            pipeline_tag=task.pipeline_tag if task else "text-generation",
            license=licence_of(run.recipe.model),
        )
    )
