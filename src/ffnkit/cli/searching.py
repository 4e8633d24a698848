"""``ffnkit search``: the smallest or fastest model that keeps a share of the metric."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffnkit.cli import console, describe, options
from ffnkit.cli.application import app
from ffnkit.cli.calibration import Calibration
from ffnkit.cli.data_options import CalibrationData
from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from ffnkit.search import SearchRecipe

PANEL = "The search"
TUNED = {"learning_rate": 2e-4, "steps": 300, "batch_size": 32, "max_length": 64, "eval_every": 100}


@app.command(rich_help_panel="The main job")
@options.grouped
def search(
    model: options.Model,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the search; an earlier one goes on.")],
    data: CalibrationData,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="The share of the metric that stays. \\[default: 0.99]", rich_help_panel=PANEL),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option("--within", help="Or how much worse it may be: 0.15, of perplexity.", rich_help_panel=PANEL),
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="params, flops, bytes or latency.", rich_help_panel=PANEL)
    ] = "params",
    candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Measured before tuning.", rich_help_panel=PANEL)
    ] = 24,
    tuned: Annotated[int, typer.Option("--tuned", min=1, help="Of them, tuned.", rich_help_panel=PANEL)] = 9,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            help="A further one: methods, rungs, factor, tokens, least.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="With --task: of tuning the original, if it needs it. \\[300]"),
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Its learning rate. \\[2e-4]")] = None,
    dev: Annotated[int, typer.Option("--dev", min=1, help="With --task: rows of train to choose by.")] = 2000,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each process. \\[default: all cores, or their share]")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="[ADDRESS]", help="Work on this Ray cluster; no address: the one at hand."),
    ] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Find the smallest or fastest model that keeps a share of the metric.

    Widths, layers, FFNs, sharing, heads and mixtures of these are proposed and measured before tuning; the best heal
    with growing budgets; one is chosen on dev by paired rows and reported once on the split kept for that. The folder
    gets it (model/compact, model/standard) with the front of size and quality as a table, a plot and a page.

    Kill it anywhere and run it again: it goes on. Run it twice at once: both work on it.

    [bold]Examples[/bold]

      ffnkit search quickstart --task sst2 [cyan]--keep 0.99 --objective latency[/cyan] --out runs/small

      ffnkit search ./llama --text notes.txt [cyan]--within 0.15[/cyan] --out runs/small

      ffnkit search ./llama --text notes.txt [cyan]--ray[/cyan] --out /shared/runs/small
    """
    given = Calibration(**vars(data), seed=seed)
    given.check_data()
    own = {"keep": keep, "within": within, "objective": objective, "candidates": candidates, "tuned": tuned}
    tune = {"steps": steps, "learning_rate": lr}
    found = recipe_of(model, given, describe.parse_settings(settings or []), own | {"seed": seed}, tune, dev)
    raise typer.Exit(carry_out(found, out, as_json, jobs=jobs, threads=threads, ray=ray))


def recipe_of(
    model: str, data: Calibration, more: dict[str, Any], own: dict[str, Any], tune: dict[str, Any], dev: int
) -> SearchRecipe:
    """The options as a recipe. Raises FfnkitError where one is wrong."""
    from ffnkit.search.settings import search_from

    given = {name: value for name, value in own.items() if value is not None}
    if twice := next((name for name in more if name in given), None):
        raise FfnkitError(f"--set {twice}={more[twice]}", f"--{twice} has a value too", "Give one of the two")
    calibration: dict[str, Any] = {"tokens": data.tokens} if data.tokens is not None else {}
    calibration |= {"text": dict(data.texts)} if data.texts else {}
    calibration |= {"mix": data.mix} if data.mix is not None else {}
    calibration |= {"text_column": data.text_column} if data.text_column is not None else {}
    plain: dict[str, Any] = {
        "name": f"search of {model}",
        "model": model,
        "calibration": calibration,
        "search": {**given, **more},
    }
    plain |= {"tokenizer": data.tokenizer} if data.tokenizer else {}
    plain |= {"data_dir": str(data.data_dir)} if data.data_dir else {}
    if data.task is not None:
        plain |= {"task": data.task, "limits": {"dev": dev}}
        plain["tune"] = TUNED | {name: value for name, value in tune.items() if value is not None}
    return search_from(plain, "ffnkit search")


def carry_out(recipe: SearchRecipe, out: Path, as_json: bool, **how: Any) -> int:
    """Run a search and print what it found; the exit code.

    Args:
        how: ``jobs``, ``threads`` and ``ray`` of :func:`ffnkit.search.search`.
    """
    from ffnkit.search import search as run_search
    from ffnkit.search.pages import header, said, table_rows

    console.quieten()
    found = run_search(recipe, out, console.say, **how)
    if as_json:
        console.print_json(found.results)
    else:
        heads = header(found.results)
        console.table(recipe.name, heads, table_rows(found.results), right=range(2, len(heads)))
        for note in said(found.results):
            console.out(f" • {note}")
        shown = "model, " if found.results["chosen"] else ""
        console.out(f"results in {out}: {shown}front.md, report.html, results.json")
    return found.exit_code
