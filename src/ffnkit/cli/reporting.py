"""``ffnkit report``: one table over several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app


@app.command(rich_help_panel="The main job")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for results.json, table.md, results.csv, report.html."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """One table over several runs: the metric of each task, and the average over the tasks.

    Runs of one task (seeds that ran apart) are put together.

    [bold]Example[/bold]

      ffnkit report runs/sst2 runs/mrpc runs/rte [cyan]--out runs/glue[/cyan]
    """
    from ffnkit.report.across import across

    found = across(runs)
    if out is not None:
        from ffnkit.report.pages import write

        write(out, found)
    if as_json:
        console.print_json({"metric": found.metric, "notes": found.notes, "rows": found.rows})
        return
    from ffnkit.report.formats import to_rich

    console.stdout().print(to_rich(found.summary(), title=" + ".join(found.tasks)))
    for note in found.notes:
        console.out(f" • {note}")
    if out is not None:
        console.out(f"results in {out}: results.json, table.md, results.csv, report.html")
