"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ffnkit.errors import FfnkitError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name on the hub, a folder with config.json, or quickstart.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write. Whole or not there: never half.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write to a folder that holds something else than an output of ffnkit.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto: an accelerator if any.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="Lay the model over devices: auto, balanced, sequential, a device, or a JSON file of modules and devices.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_dtype(name: str) -> str:
    """``name`` when it is a dtype of a model. Raises FfnkitError otherwise."""
    if name not in DTYPES:
        raise FfnkitError(f"--dtype {name}", "no such dtype", f"Choose among {', '.join(DTYPES)}")
    return name


def pick_device(name: str) -> Any:
    """The torch device called ``name``. Raises FfnkitError when this machine has none such."""
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FfnkitError(f"--device {name}", reason, "Choose cpu, or auto") from error
    return device


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are made of options: their fields stand in their place."""
    own, hints = inspect.signature(command).parameters, get_type_hints(command, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    made: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name not in groups:
            made.append(parameter.replace(annotation=hints[name], kind=kind))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        made += [
            inspect.Parameter(each.name, kind, default=each.default, annotation=types[each.name])
            for each in fields(groups[name])
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        parts = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        command(**parts, **given)

    run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    del run.__wrapped__
    return run
