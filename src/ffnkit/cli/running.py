"""``ffnkit run``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app
from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.io.progress import aside

if TYPE_CHECKING:
    from ffnkit.recipe import Results, Table


@app.command(rich_help_panel="The main job")
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A YAML recipe, or a name of `ffnkit recipes`; none: the quickstart.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where results go. \\[default: ffnkit-out/<recipe's name>]")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run of that folder first.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the latency of every arm anew.")] = False,
    small: Annotated[bool, typer.Option("--small", help="The file's small variant, for a first look.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CELL", help="Of a table: these cells, such as 'bert-base/*'. Repeat for more."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Units at once, each in a process with its share of threads.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each unit. \\[default: all cores, or their share]")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="[ADDRESS]", help="Run units on this Ray cluster; no address: the one at hand."),
    ] = None,
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

      ffnkit run sst2_minilm [cyan]--out runs/sst2[/cyan]

      ffnkit run papers/sparsegrad_glue [cyan]--small --out runs/glue[/cyan]

      ffnkit run sst2_minilm [cyan]--jobs 2[/cyan] --out runs/sst2

      ffnkit run sst2_minilm [cyan]--ray[/cyan] --out /shared/runs/sst2
    """
    from ffnkit.cli.searching import carry_out
    from ffnkit.recipe import Table, load_any, quickstart
    from ffnkit.search.settings import read_search

    if recipe is None and small:
        raise FfnkitError("--small", "no recipe is given; the quickstart is small", "Give the path of a recipe")
    if recipe is not None and (wanted := read_search(recipe)) is not None:
        for option, value in (("--restart", restart), ("--small", small), ("--only", only)):
            if value:
                raise FfnkitError(option, f"{recipe} is a search of models", "Leave it out")
        folder = out or Path("ffnkit-out") / wanted.name
        raise typer.Exit(carry_out(wanted, folder, as_json, jobs=jobs, threads=threads, ray=ray))
    loaded = quickstart() if recipe is None else load_any(recipe, any_template=any_template, small=small)
    folder = out if out is not None else Path("ffnkit-out") / loaded.name
    console.quieten()
    how: dict[str, Any] = {"progress": not console.state.quiet, "restart": restart, "remeasure": remeasure}
    how |= {"jobs": jobs, "threads": threads, "ray": ray}
    if isinstance(loaded, Table):
        raise typer.Exit(_run_table(loaded.only(only) if only else loaded, folder, how, as_json))
    if only:
        raise FfnkitError(f"--only {only[0]}", "the recipe is one run, not a table", "Leave it out")
    from ffnkit.recipe import run as run_recipe

    with aside():  # its units show their own progress, each in a process of its own
        results = run_recipe(loaded, folder, **how)
    if as_json:
        console.print_json(console.read_json(folder / "results.json"))
    else:
        from ffnkit.report.formats import to_rich

        console.stdout().print(to_rich(results.summary(), title=loaded.name))
        _print_verdicts(folder)
        console.out(f"results in {folder}: results.json, table.md, report.html")
    raise typer.Exit(results.exit_code)


def _run_table(table: Table, folder: Path, how: dict[str, Any], as_json: bool) -> int:
    """Run every cell and print what came; the exit code of the worst."""
    from ffnkit.recipe import Results, run_table

    with aside():
        found = run_table(table, folder, **how)
    if as_json:
        files = {name: folder / name / "results.json" for name in found}
        console.print_json({name: console.read_json(path) for name, path in files.items() if path.is_file()})
    if not as_json:
        _print_table(table, found, folder)
    return max(each.exit_code if isinstance(each, Results) else 2 for each in found.values())


def _print_table(table: Table, found: dict[str, Results | FfnkitError], folder: Path) -> None:
    """One table over the tasks for each model that has several, one a cell elsewhere, and what could not run."""
    from ffnkit.recipe import Results
    from ffnkit.recipe.many import over_tasks
    from ffnkit.report.formats import to_rich

    told: set[str] = set()
    for model, cells in table.rows.items():
        if (whole := over_tasks(table, found, folder, model)) is not None:
            console.stdout().print(to_rich(whole.summary(), title=f"{table.name}: {model}".rstrip(": ")))
            for note in whole.notes:
                console.out(f" • {note}")
            told |= set(cells)
    for name, each in found.items():
        if not isinstance(each, Results):
            console.say(f"{name}: {each}")
        elif name not in told:
            console.stdout().print(to_rich(each.summary(), title=f"{table.name}: {name}"))
        _print_verdicts(folder / name)
    console.out(f"results in {folder}: table.md, results.csv and report.html of each model, and a folder for each cell")


def _print_verdicts(folder: Path) -> None:
    """The table of compared answers, where a judge was named."""
    from ffnkit.report import judging

    found = (read_json(folder / "results.json") or {}).get("judging")
    if not found:
        return
    if lines := judging.lines(found.get("arms", {})):
        console.table("answers compared", judging.HEADER, lines, right=range(1, len(judging.HEADER)))
    for note in judging.notes(found):
        console.out(f" • {note}")
