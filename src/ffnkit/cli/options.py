"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
