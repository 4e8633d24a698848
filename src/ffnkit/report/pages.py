"""A table over runs as files."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from ffnkit.io.files import disk_errors, write_text
from ffnkit.io.markdown import one_line, paragraphs
from ffnkit.report import formats
from ffnkit.report.across import Across
from ffnkit.report.page import PageInfo, write_page
from ffnkit.report.table import Row


def _seen_from(out: Path, row: Row) -> Row:
    """A row whose paths lead from the folder of the page."""
    found = {key: row[key] for key in ("checkpoints", "predictions") if key in row}
    return {**row, **{k: {n: os.path.relpath(path, out) for n, path in each.items()} for k, each in found.items()}}


def write(out: str | Path, found: Across) -> None:
    """results.json, table.md, results.csv and report.html in a folder, which is made."""
    out = Path(out)
    title = " + ".join(found.tasks)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        content = {"metric": found.metric, "tasks": found.tasks, "notes": found.notes, "rows": found.rows}
        write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
        summary = found.summary()
        opening = f"# {one_line(title)}\n\n" + "".join(map(paragraphs, found.notes))
        write_text(out / "table.md", opening + formats.to_markdown(summary))
        write_text(out / "results.csv", formats.to_csv(summary))
        info = PageInfo(
            title=title,
            model=", ".join(found.models),
            task=", ".join(found.tasks),
            metric=found.metric,
            split_policy="as the runs say, each for its task",
            rows=[_seen_from(out, row) for row in found.rows],
            arms={arm.name: arm.settings for arm in summary.arms},
            notes=found.notes,
            command=shlex.join(["ffnkit", "report", *found.folders, "--out", str(out)]),
            links={
                **{name: name for name in ("results.json", "results.csv", "table.md")},
                **{f"report of {each}": f"{os.path.relpath(each, out)}/report.html" for each in found.folders},
            },
        )
        write_page(out / "report.html", info)
