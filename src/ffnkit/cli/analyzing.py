"""``ffnkit analyze``: its options. The work is in :mod:`ffnkit.cli.analyze_job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app
from ffnkit.cli.data_options import DATA, DataDir, Mix, TaskName, TextColumn, Tokenizer
from ffnkit.cli.outputs import check_output
from ffnkit.errors import FfnkitError
from ffnkit.io import quickstart
from ffnkit.settings.calibration import ROW_LENGTH, TEXT_COLUMN, TEXT_LENGTH, TOKENS

NTK = "The kernel (NTK)"
ENERGY = "Gradients (--energy)"
ROWS, PIECES = 512, 128  # pieces are longer


@app.command(rich_help_panel="Models")
def analyze(
    model: options.Model,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Names of 'ffnkit methods' parted by commas, or all; fusion:folded too."),
    ] = None,
    width: Annotated[
        str | None, typer.Option("--width", help="Of all methods: a share such as 0.25, or a number of neurons.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A setting, for the methods that have it; repeatable."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "-l", help="Which FFNs are compressed. \\[default: all]")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="A compressed checkpoint of MODEL, tuned or not; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of methods, data and a head that is drawn.")] = 0,
    task: TaskName = None,
    data_dir: DataDir = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="txt, jsonl, csv ..., messages too. Its first half calibrates (see --mix), the other measures.",
            rich_help_panel=DATA,
        ),
    ] = None,
    text_column: TextColumn = None,
    mix: Mix = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            min=1,
            help=f"Most rows that are measured on. \\[default: {ROWS}; {PIECES} pieces of --text]",
            rich_help_panel=DATA,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=1, help="For methods that use data.", rich_help_panel=DATA)
    ] = TOKENS,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=2,
            help=f"Longer texts are cut, in tokens. \\[default: {TEXT_LENGTH} of --text, {ROW_LENGTH} of rows]",
            rich_help_panel=DATA,
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Compare the layers of MODEL with one another instead.")
    ] = False,
    rbf: Annotated[bool, typer.Option("--rbf", help="With --similarity: CKA under an RBF kernel too.")] = False,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure in which entries the energy of MODEL's gradients lies instead.")
    ] = False,
    errors: Annotated[bool, typer.Option("--errors/--no-errors", help="FFN outputs and hidden states.")] = True,
    ntk: Annotated[
        bool | None,
        typer.Option(
            "--ntk/--no-ntk", help="The kernels. \\[default: where the model gives logits]", rich_help_panel=NTK
        ),
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=2, help="A gradient each.", rich_help_panel=NTK)] = 48,
    ntk_layers: Annotated[
        str, typer.Option("--ntk-layers", help="Whose FFNs the gradients are of.", rich_help_panel=NTK)
    ] = "last:2",
    output: Annotated[
        Literal["probability", "logit"], typer.Option("--ntk-output", help="The scalar f.", rich_help_panel=NTK)
    ] = "probability",
    memory: Annotated[
        int, typer.Option("--memory", min=1, help="MiB of gradients or sums held at a time.", rich_help_panel=NTK)
    ] = 512,
    targets: Annotated[
        str,
        typer.Option("--targets", help="ffn, attention, all, or a pattern over names.", rich_help_panel=ENERGY),
    ] = "ffn",
    shares: Annotated[
        str, typer.Option("--shares", help="Of the entries, parted by commas.", rich_help_panel=ENERGY)
    ] = "0.001,0.003,0.01,0.03,0.1",
    steps: Annotated[
        str, typer.Option("--steps", help="After which steps of training, such as 0,50,100.", rich_help_panel=ENERGY)
    ] = "0",
    rate: Annotated[float, typer.Option("--lr", min=0, help="Of these steps, AdamW.", rich_help_panel=ENERGY)] = 5e-5,
    batches: Annotated[
        int, typer.Option("--batches", min=1, help="For bases and choices.", rich_help_panel=ENERGY)
    ] = 30,
    fresh: Annotated[int, typer.Option("--fresh", min=1, help="Batches to measure on.", rich_help_panel=ENERGY)] = 8,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Examples of a gradient.", rich_help_panel=ENERGY)
    ] = 32,
    reach: Annotated[
        float,
        typer.Option("--reach", help="Of the energy, for leading rows of bases; faster.", rich_help_panel=ENERGY),
    ] = 1.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for JSON and pictures.")] = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods before any tuning: FFN outputs, hidden states and the NTK against the uncompressed model.

    [bold]Examples[/bold]

      ffnkit analyze roberta-base --methods fusion,calibrated-fusion,svd [cyan]--width 0.25 --task sst2[/cyan]

      ffnkit analyze ./llama --methods all --width 0.5 [cyan]--text notes.txt --ntk-layers last:1[/cyan]

      ffnkit analyze roberta-base [cyan]--against small --against tuned --task sst2[/cyan] --out analysis

      ffnkit analyze roberta-base [cyan]--similarity[/cyan] --text notes.txt --out similarity

      ffnkit analyze roberta-base [cyan]--energy --task sst2[/cyan] --out energy

      ffnkit analyze quickstart           [dim]# the model, the task and the method of ffnkit run[/dim]

    Methods that measure activations see the task's train split or the first half of the text; everything is measured
    on the validation split or the second half. Of a model without a trained head one is drawn with --seed.
    """
    from ffnkit.recipe import quickstart as packaged

    if out is not None:
        kind = "similarity" if similarity else "energy" if energy else "analysis"
        check_output(out, overwrite=overwrite, source=model, kind=kind)
    if model == quickstart.NAME:  # what is not given is as in its recipe
        recipe = packaged()
        task = task or (None if text else recipe.task.name)
        if methods is None and not (against or similarity or energy):
            arm = next(arm for arm in recipe.arms.values() if arm.compressed)
            methods, width = arm.method, width or str(arm.settings["width"])
    if similarity and energy:
        raise FfnkitError("ffnkit analyze --energy", "--similarity is given too", "Leave one of them out")
    if (similarity or energy) and (methods is not None or against):
        found = f"{'--methods' if methods is not None else '--against'} is given too"
        asked = f"ffnkit analyze {'--similarity' if similarity else '--energy'}"
        raise FfnkitError(asked, found, "Leave it out: one model is looked at as it is")
    if rbf and not similarity:
        raise FfnkitError("ffnkit analyze --rbf", "it is a kernel of --similarity", "Add --similarity")
    if methods is None and not against and not similarity and not energy:
        do = "Add --methods fusion,svd, --similarity or --energy"
        raise FfnkitError("ffnkit analyze", "neither --methods nor --against is given", do)
    if (task is None) == (text is None):
        found = "both --task and --text are given" if task else "neither --task nor --text is given"
        raise FfnkitError("ffnkit analyze", found, "Name the one thing that is measured on")
    if not errors and ntk is False:
        raise FfnkitError("ffnkit analyze", "--no-errors and --no-ntk leave nothing to do", "Leave out one of them")
    if mix is not None and (text is None or similarity or energy):
        found = "nothing is calibrated on a text here"
        raise FfnkitError(f"--mix {mix:g}", found, "Leave it out, or give --methods and --text")
    if text_column is not None and text is None:
        raise FfnkitError(f"--text-column {text_column}", "there is no --text to read it from", "Add --text FILE")
    rows = rows or (ROWS if text is None else PIECES)
    share = 0.0 if similarity else mix
    texts = (task, data_dir, text, rows, tokens, max_length, tokenizer, seed, share, text_column or TEXT_COLUMN)
    if similarity:
        from ffnkit.cli.similarity_job import compare

        compare(model, texts, layers or "all", rbf, options.pick_device(device), out, as_json)
        return
    from ffnkit.cli.analyze_job import AnalyzeJob, Texts, chosen_methods, hand_over

    if energy:
        from ffnkit.cli.energy_job import EnergyJob

        EnergyJob(
            model=model,
            texts=Texts(*texts),
            targets=targets,
            layers=layers or "all",
            shares=shares,
            steps=steps,
            batches=batches,
            fresh=fresh,
            batch_size=batch_size,
            learning_rate=rate,
            reach=reach,
            memory=memory << 20,
            device=options.pick_device(device),
        ).run(out, as_json)
        return
    candidates = chosen_methods(methods, width, layers, seed, settings or [])
    console.quieten()
    job = AnalyzeJob(
        model=model,
        candidates=candidates,
        against=tuple(against or ()),
        texts=Texts(*texts),
        errors=errors,
        ntk=ntk,
        ntk_settings={"examples": examples, "layers": ntk_layers, "output": output, "memory": memory << 20},
        device=options.pick_device(device),
    )
    found, report = job.run()
    hand_over("analysis", found, report, out, as_json, {"md": found.to_markdown()})
