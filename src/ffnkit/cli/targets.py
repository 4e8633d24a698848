"""``--target``: what the model may cost, in place of a method and its width."""

from __future__ import annotations

from typing import Any

from ffnkit.cli import describe
from ffnkit.errors import FfnkitError


def only(given: list[str] | None) -> str | None:
    """The one target. Raises FfnkitError for several."""
    if given and len(given) > 1:
        found = f"--target {given[1]} is given too, and one is met at a time"
        raise FfnkitError(f"--target {given[0]}", found, "Give one; compress its result for the other")
    return given[0] if given else None


def fitting(
    target: str,
    context: int | None,
    method: str | None,
    pairs: list[str],
    layers: str | None,
    multiple: int | None,
    form: str,
) -> Any:
    """The method that ``--target`` stands for. Raises FfnkitError where options do not go together, or are wrong."""
    from ffnkit.budget.fitting import FitTo
    from ffnkit.budget.targets import KINDS

    asked = f"--target {target}"
    if method not in (None, FitTo.name):
        do = f"Leave --method out, or narrow by {method} with --budget"
        raise FfnkitError(asked, f"--method {method} is given too, and all that can go competes", do)
    named = describe.parse_settings([target], "--target")
    [(kind, _)] = named.items()
    if kind not in KINDS:
        raise FfnkitError(asked, f"there is no target {kind}", f"Choose among {', '.join(KINDS)}")
    if context is not None and kind != "kv":
        raise FfnkitError(
            f"--context {context}", f"--target {target} does not hang on it", "Give it with --target kv=0.8"
        )
    settings = named | describe.parse_settings(pairs)
    given = {
        "layers": layers,
        "multiple": multiple,
        "context": context,
        "uniform": form in ("standard", "both") or None,
    }
    for key, value in given.items():
        if value is not None:
            if key in settings:
                raise FfnkitError(f"--set {key}=...", f"--{key} says it too", "Give one of the two")
            settings[key] = value
    made = describe.build(FitTo, settings, f"--target {target}")
    _ = made.target
    return made


def told(report: dict[str, Any]) -> list[str]:
    """What became of a target, in lines: what is left of it, the loss, and what was tried."""
    found = report.get("target")
    if found is None:
        return []
    left, before = found["left"], found["before"]
    unit = {"params": "parameters", "flops": "FLOPs a token", "kv": "bytes of keys and values"}.get(
        found["kind"], found["kind"]
    )
    lines = []
    if seconds := found.get("seconds of a batch"):
        unit = "FLOPs a token"
        lines.append(
            f"  seconds of a batch: {seconds['before']:.4g} -> {seconds['after']:.4g} ({seconds['ratio']:.1%})"
        )
    lines.append(
        f"  {unit}: {before:,} -> {left:,} ({left / before:.1%}), loss {found['measured']:.4g} measured on rows apart"
    )
    for each in sorted(found["tried"], key=lambda one: one["measured"]):
        goes = ", ".join(f"{count} {what}" for what, count in each["goes"].items())
        share = each["left"] / before
        lines.append(
            f"    {each['how']}: loss {each['measured']:.4g} (foreseen {each['foreseen']:.4g}), {share:.1%} left;"
            f" {goes or 'nothing goes'}"
        )
    return [*lines, f"  found in {found['seconds']:.0f} s"]
