"""``ffnkit methods``, ``tuners``, ``tasks`` and ``recipes``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ffnkit.cli import console, describe
from ffnkit.cli.application import app
from ffnkit.cli.options import Json

PANEL = "What there is"


@app.command(rich_help_panel=PANEL)
def methods(as_json: Json = False) -> None:
    """Every compression method, with its settings.

    [bold]Example[/bold]

      ffnkit methods

      ffnkit compress MODEL --method fusion [cyan]--set width=0.25 --set seed=1[/cyan] --dry-run
    """
    show(method_rows(), as_json)


@app.command(rich_help_panel=PANEL)
def tuners(as_json: Json = False) -> None:
    """Every tuner (what is trained), with its settings.

    [bold]Example[/bold]

      ffnkit tuners

      ffnkit tune MODEL --task sst2 [cyan]--tuner lora[/cyan] --out DIR
    """
    show(tuner_rows(), as_json)


@app.command(rich_help_panel=PANEL)
def tasks(as_json: Json = False) -> None:
    """Every task that is known by name; your own files need none (see ffnkit tune --help).

    [bold]Example[/bold]

      ffnkit tasks

      ffnkit tune MODEL [cyan]--task sst2 --data-dir DATA[/cyan] --out DIR
    """
    rows = task_rows()
    if as_json:
        console.print_json(rows)
        return
    cells = [(r["name"], r["kind"], ", ".join(r["text"]), r["label"], ", ".join(r["metrics"])) for r in rows]
    console.table("Tasks", ("name", "kind", "text", "label", "metrics (the first decides)"), cells)


@app.command(rich_help_panel=PANEL)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Print this one, to start one of your own from.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Every recipe that comes with ffnkit; with a name, the file itself.

    [bold]Examples[/bold]

      ffnkit recipes

      ffnkit recipes sst2_minilm > mine.yaml

      ffnkit run sst2_minilm [cyan]--out runs/sst2[/cyan]
    """
    from ffnkit.recipe import shipped

    if name is not None:
        console.out(shipped.path(name).read_text(encoding="utf-8").rstrip())
        return
    rows = [{"name": each, "about": shipped.about(each)} for each in shipped.names()]
    if as_json:
        console.print_json(rows)
        return
    console.table("Recipes: ffnkit run NAME", ("name", "what it compares"), [(r["name"], r["about"]) for r in rows])


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print things with their settings, as tables or as JSON."""
    if as_json:
        console.print_json(rows)
        return
    for row in rows:
        console.out(f"{row['name']}: {row['description']}")
        settings = row["settings"]
        if settings:
            cells = [(name, describe.default(info), info.get("help", "")) for name, info in settings.items()]
            console.table("", ("setting", "default", ""), cells)
        else:
            console.out("")


def method_rows() -> list[dict[str, Any]]:
    """Name, description and settings of each method."""
    from ffnkit.methods import known

    rows = [described(method.name, method) for method in known()]
    for row, method in zip(rows, known(), strict=True):
        if getattr(method, "trains", False):
            row["description"] += f" (as the tuner {method.name})"
    return rows


def tuner_rows() -> list[dict[str, Any]]:
    """Name, description and settings of each tuner."""
    from ffnkit.tune import TUNERS

    return [described(named(tuner), tuner) for tuner in TUNERS]


def task_rows() -> list[dict[str, Any]]:
    """Name, kind, columns, metrics and source of each task."""
    from ffnkit import tasks as known

    rows = []
    for name in known.names():
        task = known.get(name)
        metrics = [task.main_metric, *(metric for metric in task.metrics if metric != task.main_metric)]
        rows.append(
            {
                "name": task.name,
                "kind": task.kind,
                "text": list(task.text),
                "label": task.label,
                "metrics": metrics,
                "source": task.source,
                "notes": task.notes,
            }
        )
    return rows


def named(thing: Any) -> str:
    """The name that a user types for a method or tuner."""
    name = getattr(thing, "name", None)
    return name if isinstance(name, str) else getattr(thing, "__name__", str(thing)).lower()


def described(name: str, thing: Any) -> dict[str, Any]:
    """One row: name, description, settings."""
    return {"name": name, "description": describe.summary(thing), "settings": describe.fields(thing)}
