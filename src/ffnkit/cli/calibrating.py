"""``ffnkit calibrate``: statistics of one pass over data, for every method, width and budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app
from ffnkit.cli.calibration import Calibration
from ffnkit.cli.data_options import DATA, CalibrationData, check_there
from ffnkit.cli.outputs import check_output_file
from ffnkit.errors import FfnkitError

PLAIN = CalibrationData()


@app.command(rich_help_panel="Models")
@options.grouped
def calibrate(
    model: options.Model,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILES]", help="With --merge: files of ffnkit calibrate.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write. Whole or not there: never half.")],
    merged: Annotated[bool, typer.Option("--merge", help="Put FILES together: as one pass over all of them.")] = False,
    layers: Annotated[str, typer.Option("--layers", "-l", help="Which FFNs: all, last:8, 4-11, 4,5,9.")] = "all",
    held: Annotated[
        int | None,
        typer.Option(
            "--held",
            min=0,
            help="Inputs of each FFN that are kept for regressions; 0: none. \\[default: what calibrated-fusion takes]",
            rich_help_panel=DATA,
        ),
    ] = None,
    data: CalibrationData,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure once what every later compress needs: --statistics FILE takes the place of its data.

    [bold]Examples[/bold]

      ffnkit calibrate roberta-base --text notes.txt [cyan]--out notes.safetensors[/cyan]

      ffnkit calibrate roberta-base --text notes.txt=0.7 --text chats.jsonl --out mixed.safetensors

      ffnkit compress roberta-base [cyan]--statistics notes.safetensors[/cyan] --set width=0.5 --out small

      ffnkit calibrate roberta-base --merge notes.safetensors more.safetensors --out all.safetensors

    The file serves calibrated-fusion, importance and structured (neurons), at any width and any --budget, with the very
    results that the data themselves give where each layer is fitted on its own (sequential=false). It holds sums over
    pairs of neurons and some inputs of each FFN, and the tokens of its first batches. Layers go to the disk one after
    the other.
    """
    options.check_dtype(dtype)
    job = Calibration(**vars(data), seed=seed)
    named = files or []
    if merged:
        _check_merge(named, job)
    elif named:
        do = "Name texts with --text, or add --merge to put files of ffnkit calibrate together"
        raise FfnkitError(f"ffnkit calibrate {named[0]}", "a second argument is for --merge only", do)
    job.check_data()
    console.quieten()
    from ffnkit.calibration.stored import is_statistics

    check_output_file("--out", out, "file of ffnkit calibrate", is_statistics, [*named, *job.texts])
    report = _merge(model, named, out, dtype) if merged else _calibrate(model, job, out, layers, held, dtype, device)
    if as_json:
        console.print_json(report)
    else:
        size = console.megabytes(report["bytes"])
        console.out(f"{out}: {report['layers']} FFNs, {report['batches']} batches, {size}")


def _check_merge(named: list[Path], job: Calibration) -> None:
    from dataclasses import replace

    if len(named) < 2:
        raise FfnkitError("--merge", f"{len(named)} files are named", "Name two or more: --merge A B --out C")
    for file in named:
        check_there(f"--merge {file}", file, "Name files of ffnkit calibrate")
    if vars(replace(PLAIN, data_dir=job.data_dir)) != {name: getattr(job, name) for name in vars(PLAIN)}:
        raise FfnkitError("--merge", "data are named too", "Leave them out: the files hold what is put together")


def _calibrate(
    source: str, job: Calibration, out: Path, layers: str, held: int | None, dtype: str, device: str
) -> dict[str, Any]:
    import ffnkit
    from ffnkit.io.architectures import empty_model, load_any
    from ffnkit.methods.calibrating import HELD, expected_bytes
    from ffnkit.model.finding import ffns
    from ffnkit.model.targets import select

    held = HELD if held is None else held
    empty = empty_model(source)
    found = select(ffns(empty), layers)
    job.check_reads(empty, "ffnkit calibrate: it measures activations")
    place = options.pick_device(device)
    console.say(f"loading {source}")
    model = load_any(source, dtype=dtype).to(place)
    batches = job.batches(model, source)
    found = select(ffns(model), layers)
    expected = expected_bytes(found, job.settings.tokens, held)
    sums, inputs = (console.megabytes(expected[name]) for name in ("sums", "inputs"))
    console.say(f"writing about {console.megabytes(sum(expected.values()))}: {sums} of sums, {inputs} of inputs")
    with console.progress("calibrating") as step:
        made = ffnkit.calibrate(model, batches, out, layers=layers, held=held, progress=step)
    return _told(made)


def _merge(source: str, named: list[Path], out: Path, dtype: str) -> dict[str, Any]:
    from ffnkit.calibration.stored import StatisticsFile
    from ffnkit.io.architectures import load_any
    from ffnkit.methods.calibrating import merge

    files = [StatisticsFile(file) for file in named]
    model = load_any(source, dtype=dtype)
    for file in files:
        file.check(model)
    with console.progress("merging") as step:
        return _told(merge(files, out, progress=step))


def _told(made: Any) -> dict[str, Any]:
    return {
        "statistics": str(made.path),
        "layers": len(made.layers),
        "batches": len(made.data),
        "held": made.held,
        "bytes": made.path.stat().st_size,
    }
