"""``ffnkit run``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app


@app.command(rich_help_panel="The main job")
def run(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A YAML recipe; none: the quickstart.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where results go. \\[default: ffnkit-out/<recipe's name>]")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run of that folder first.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the latency of every arm anew.")] = False,
    any_template: Annotated[
        bool, typer.Option("--any-template", help="Let the recipe name a chat template anywhere on this machine.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compress, tune and compare: every arm and seed of a recipe, with one table at the end.

    Kill it anywhere and run it again: it goes on where it stopped, with the same figures in the end. The folder
    gets results.json, a table with mean and spread, and the models.

    [bold]Examples[/bold]

      ffnkit run                          [dim]# the quickstart[/dim]

      ffnkit run recipes/minilm-sst2.yaml [cyan]--out runs/sst2[/cyan]
    """
    from ffnkit.recipe import load_recipe, quickstart

    loaded = quickstart() if recipe is None else load_recipe(recipe, any_template=any_template)
    folder = out if out is not None else Path("ffnkit-out") / loaded.name
    console.quieten()
    from ffnkit.recipe import run as run_recipe

    results = run_recipe(loaded, folder, progress=not console.state.quiet, restart=restart, remeasure=remeasure)
    if as_json:
        console.print_json(console.read_json(folder / "results.json"))
    else:
        from ffnkit.report.formats import to_rich

        console.stdout().print(to_rich(results.summary(), title=loaded.name))
        console.out(f"results in {folder}: results.json, table.md, report.html")
    raise typer.Exit(results.exit_code)
