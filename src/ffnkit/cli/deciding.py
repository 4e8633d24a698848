"""``compress --decide`` and ``--draws``: settings decided on held-out text, and what other draws of the text give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ffnkit.cli import console
from ffnkit.cli.calibration import Calibration
from ffnkit.cli.data_options import DATA
from ffnkit.errors import FfnkitError


@dataclass(frozen=True)
class Deciding:
    """What the options ask for; its fields are the options."""

    decide: Annotated[
        bool,
        typer.Option(
            "--decide",
            help="Decide choice, ridge, steps and tokens on text of kinds held out; effort=best does.",
            rich_help_panel=DATA,
        ),
    ] = False
    draws: Annotated[
        int,
        typer.Option(
            "--draws", min=0, help="Plan so often on other draws of the text; tell the spread.", rich_help_panel=DATA
        ),
    ] = 0

    def check(self, method: Any, calibration: Calibration) -> None:
        """Raises FfnkitError where there is nothing to decide, or no data to draw from."""
        option = "--decide" if self.decide else f"--draws {self.draws}" if self.draws else None
        if option is None:
            return
        if not getattr(method, "needs_data", False):
            name = getattr(method, "name", "the saved plan")
            raise FfnkitError(option, f"{name} uses no data", "Leave it out, or choose calibrated-fusion")
        if calibration.statistics is not None:
            found = "statistics hold one draw, and no text apart from it"
            raise FfnkitError(option, found, "Give --text or --task in place of --statistics")

    def settled(self, model: Any, method: Any, calibration: Calibration, source: str) -> tuple[Any, dict[str, Any]]:
        """The method with the settings that were decided, if any are, and what --json prints of it."""
        best = getattr(method, "effort", None) == "best" and calibration.statistics is None
        if not (self.decide or best):
            return method, {}
        from ffnkit.methods.deciding import decide

        fit, held = calibration.deciding(model, source)
        with console.progress("deciding") as step:
            decision = decide(model, fit, held, method, progress=step)
        console.say(f"decided {decision}")
        return decision.method, {"decided": {"layers": decision.layers, "tried": decision.tried}}

    def spread(self, model: Any, method: Any, calibration: Calibration, source: str) -> dict[str, Any]:
        """What plans of several draws lose on text that none of them holds, if draws are asked for."""
        if not self.draws:
            return {}
        import ffnkit
        from ffnkit.calibration.drift import Drift
        from ffnkit.methods.deciding import JUDGED, moved

        rows: list[dict[str, Any]] = []
        _, held = calibration.deciding(model, source)
        judge = Drift(model, held, JUDGED)
        with console.progress("drawing") as step:
            for number in range(self.draws):
                drawn = dataclasses.replace(calibration, seed=calibration.seed + number)
                fit, _ = drawn.deciding(model, source)
                plan = ffnkit.plan(model, method, data=fit, progress=_within(step, number, self.draws))
                rows.append({"seed": drawn.seed, **moved(model, plan.edits, judge)})
        return {"draws": {"before": judge.measure(), "after": rows}}


def _within(step: Callable[[int, int, str], None], number: int, count: int) -> Callable[[int, int, str], None]:
    def inner(done: int, total: int, what: str) -> None:
        step(number * total + done, count * total, f"draw {number + 1}, {what}")

    return inner


def spread_lines(told: dict[str, Any]) -> list[str]:
    """The figures on held-out text: of the model as it is, and their mean, least and most over the draws, if any."""
    found = told.get("draws", {"before": {}})
    lines = []
    for name, before in found["before"].items():
        values = [row[name] for row in found["after"]]
        middle, least, most = sum(values) / len(values), min(values), max(values)
        spread = f"{before:.4g} -> {middle:.4g} ({least:.4g} to {most:.4g})"
        lines.append(f"  {name} on held-out text, {len(values)} draws: {spread}")
    return lines
