"""``ffnkit tune`` and ``eval``: a task by name, or tables of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ffnkit.cli import console, describe, harness_job, options
from ffnkit.cli.application import app
from ffnkit.cli.data_options import DATA, OPTIONS, Data
from ffnkit.cli.outputs import check_output, check_output_file
from ffnkit.cli.training_options import FLAGS, TRAINING, Told, Training
from ffnkit.errors import FfnkitError
from ffnkit.io.placing import mapped

RESULT = "Result"
HARNESS = "lm-evaluation-harness"


def setting(flag: str, text: str, **kwargs: Any) -> Any:
    """A further option of the panel Training, without a default that is told."""
    return typer.Option(flag, help=text, rich_help_panel=TRAINING, show_default=False, **kwargs)


@app.command(cls=Told, rich_help_panel="Models")
@options.grouped
def tune(
    model: options.Model,
    out: options.Out,
    data: Data,
    *,
    tuner: Annotated[str, typer.Option("--tuner", help="One of 'ffnkit tuners'.", rich_help_panel=TRAINING)] = "full",
    routers: Annotated[
        Literal["trained", "frozen"] | None, setting("--routers", "Routers of a mixture of experts.")
    ] = None,
    tied: Annotated[
        Literal["shared", "each"] | None, setting("--tied", "LoRA on shared FFNs: one adapter, or each layer its own.")
    ] = None,
    quantize: Annotated[
        Literal["none", "nf4", "int8"] | None, setting("--quantize", "LoRA over frozen linears quantized.")
    ] = None,
    training: Training,
    more: Annotated[
        list[str] | None, setting("--set", "A further setting of the training; repeatable.", metavar="NAME=VALUE")
    ] = None,
    tuner_set: Annotated[
        list[str] | None, setting("--tuner-set", "A setting of the tuner; repeatable.", metavar="NAME=VALUE")
    ] = None,
    distil_from: Annotated[
        str | None, setting("--distil-from", "First match this uncompressed or tuned model.", metavar="TEACHER")
    ] = None,
    distil_text: Annotated[
        Path | None, setting("--distil-text", "Match on this file of text, without labels.", metavar="FILE")
    ] = None,
    distil_set: Annotated[
        list[str] | None, setting("--distil-set", "A setting of the distillation; repeatable.", metavar="NAME=VALUE")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data, head, order.", rich_help_panel=TRAINING)] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows of train.", rich_help_panel=DATA)] = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold what was kept apart for tuning.", rich_help_panel=RESULT)
    ] = True,
    form: Annotated[
        Literal["auto", "compact", "standard", "apart"],
        typer.Option(
            "--form",
            help="As of compress; apart: updates beside the weights below them, whose zeros stay.",
            rich_help_panel=RESULT,
        ),
    ] = "auto",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew: give up runs that were interrupted.", rich_help_panel=RESULT)
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Tune a model on a task, report its metric, save it.

    Settings and checkpoints are chosen on a part of train (dev); the validation split is for the reported figure
    only. Interrupted? Run the same command again: it resumes from the last checkpoint.

    [bold]Examples[/bold]

      ffnkit tune small [cyan]--task sst2 --tuner full --lr 1e-4 --steps 300[/cyan] --out tuned

      ffnkit tune small --train-file train.csv --validation-file test.csv
      [cyan]--text-column title --text-column body --label-column topic[/cyan] --out tuned

      ffnkit tune small --task sst2 [cyan]--distil-from roberta-base[/cyan] --out tuned

      ffnkit tune small --task sst2 [cyan]--distil-from big-tuned --distil-set objective=both[/cyan] --out tuned

      ffnkit tune switch-small --task sst2 [cyan]--head words --routers frozen[/cyan] --out tuned

      ffnkit tune pruned --task sst2 [cyan]--tuner dsee --form apart[/cyan] --out tuned

      ffnkit tune merged --task sst2 [cyan]--tuner lora --tied each --quantize nf4[/cyan] --out tuned

      ffnkit tune gpt2-small [cyan]--task e2e --generation-set num_beams=4[/cyan] --out tuned

      ffnkit tune t5-small --train-file news.jsonl
      [cyan]--input-column article --target-column summary[/cyan] --out tuned

      ffnkit tune gpt2-small [cyan]--train-file book.txt --max-length 512[/cyan] --out tuned

      ffnkit tune llama [cyan]--train-file chats.jsonl --kind instruction --packing[/cyan] --max-length 1024 --out tuned
    """
    from ffnkit.cli.tune_job import TuneJob

    check_output(out, overwrite=overwrite, source=model)
    given = training.given | ({} if data.max_length is None else {"max_length": data.max_length})
    job = TuneJob(
        model=model,
        out=out,
        task=data.task(),
        data_dir=data.data_dir,
        settings=merged(given, more or []),
        tuner=tuner,
        tuner_settings=merged({"routers": routers, "tied": tied, "quantize": quantize}, tuner_set or [], "--tuner-set"),
        teacher=distil_from,
        distil_settings=distil_given(distil_text, distil_set or []),
        seed=seed,
        limit=limit,
        fold=fold,
        tokenizer=data.tokenizer,
        generation_settings=describe.parse_settings(data.generation_set or [], "--generation-set"),
        restart=restart,
        form=form,
        flags={name: FLAGS[name] for name in given},
    )
    console.quieten()
    with mapped(device_map):
        report = job.run()
    if not report:
        return
    if as_json:
        console.print_json(report)
    else:
        show(report, job.task)
        kept = f", updates apart from a base with {report['zeros']:.1%} zeros" if form == "apart" else ""
        console.out(f"saved in {out}{kept}")
        console.say(job.last)


def merged(given: dict[str, Any], pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """The options that were given, with ``--set``; FfnkitError when a setting is given in both ways."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in describe.parse_settings(pairs, option).items():
        if name in found:
            raise FfnkitError(f"{option} {name}={value}", "its own option is given too", "Give one of the two")
        found[name] = value
    return found


def distil_given(text: Path | None, pairs: list[str]) -> dict[str, Any]:
    """Settings of the distillation: ``--distil-set`` with ``--distil-text``."""
    found = describe.parse_settings(pairs, "--distil-set")
    if text is not None and "text" in found:
        raise FfnkitError(f"--distil-set text={found['text']}", "--distil-text is given too", "Give one of the two")
    return found if text is None else {**found, "text": str(text)}


@app.command("eval", cls=Told, rich_help_panel="Models")
@options.grouped
def evaluate(
    model: options.Model,
    data: Data,
    split: Annotated[
        Literal["all", "report", "dev", "test"] | None,
        typer.Option(
            "--split", help="report: what tune reports on; dev: a part of train; all: a lone file; test: GLUE's server."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Texts at a time. \\[default: 64; with --lm-eval 1]")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows; all by default.")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, by commas.", rich_help_panel=HARNESS
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", help="A folder of further tasks; repeatable.", rich_help_panel=HARNESS),
    ] = None,
    lm_eval_set: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval-set",
            metavar="NAME=VALUE",
            help="num_fewshot, gen_kwargs, ...; repeatable.",
            rich_help_panel=HARNESS,
        ),
    ] = None,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write generated texts to this file, as JSON lines; of test: a folder."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split --split dev.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Measure a tuned model on a task: on its validation split, or on every row of a file of your own.

    [bold]Examples[/bold]

      ffnkit eval tuned --task sst2

      ffnkit eval tuned --task sst2 [cyan]--json[/cyan] | jq .metrics.accuracy

      ffnkit eval tuned [cyan]--validation-file test.csv[/cyan] --text-column text --label-column stars

      ffnkit eval tuned --task webnlg [cyan]--generation-set num_beams=4 --predictions written.jsonl[/cyan]

      ffnkit eval tuned --task mnli [cyan]--split test --predictions glue[/cyan]   [dim]# MNLI-m.tsv, MNLI-mm.tsv[/dim]

      ffnkit eval small [cyan]--lm-eval hellaswag,arc_easy --limit 200 --lm-eval-set num_fewshot=5[/cyan]
    """
    from ffnkit.cli.eval_job import EvalJob, generation_built, submit

    if lm_eval is not None:
        refuse_beside(data, {"--split": split, "--predictions": predictions})
        asked = harness_job.settings(lm_eval, include_path or [], limit, batch_size, lm_eval_set or [])
        console.quieten()
        with mapped(device_map, runs_only=True, beside=device):
            report = harness_job.run(model, asked, data.tokenizer, options.pick_device(device))
        console.print_json(report) if as_json else harness_job.show(report)
        return
    for flag, value in (("--include-path", include_path), ("--lm-eval-set", lm_eval_set)):
        if value:
            raise FfnkitError(f"{flag} {value[0]}", "there is no --lm-eval", "Add --lm-eval TASKS")
    split = split or ("all" if data.lone else "report")
    console.quieten()
    if predictions is not None and split != "test":
        from ffnkit.tune.evaluation import is_predictions

        read = [data.train, data.validation]
        check_output_file("--predictions", predictions, "file of predictions", is_predictions, read)
    chosen = data.evaluated(model, split)
    place = options.pick_device(device)
    generation = generation_built(describe.parse_settings(data.generation_set or [], "--generation-set"))
    job = EvalJob(
        model,
        chosen,
        data.data_dir,
        split,
        batch_size or 64,
        data.max_length or 128,
        limit,
        seed,
        place,
        data.tokenizer,
    )
    if split == "test":
        with mapped(device_map, runs_only=True, beside=device):
            report = submit(job, predictions)
        if as_json:
            console.print_json(report)
        else:
            console.out(f"predictions in {predictions}: {', '.join(f'{k} ({n})' for k, n in report['files'].items())}")
        return
    with mapped(device_map, runs_only=True, beside=device):
        report = replace(job, generation=generation, predictions=predictions).run()
    if as_json:
        console.print_json(report)
    else:
        show(report, chosen)


def refuse_beside(data: Any, others: dict[str, Any]) -> None:
    """Raises FfnkitError where a task of ours is named beside those of the harness."""
    own = {OPTIONS[name]: getattr(data, name) for name in OPTIONS} | {"--max-length": data.max_length, **others}
    for flag, value in own.items():
        if value not in (None, ()):
            do = "Leave it out; --lm-eval-set says what the harness is asked"
            raise FfnkitError(f"{flag} {value}", "--lm-eval is given too", do)


def show(report: dict[str, Any], task: Any) -> None:
    """Print metrics as a table, and those of further splits below."""
    tables = {f"{report['split']} split, {report['rows']} rows": report["metrics"], **report.get("extra", {})}
    for name, metrics in tables.items():
        rows = [(metric, f"{value:.4f}") for metric, value in metrics.items()]
        console.table(f"{task.name}, {name}", ("metric", "value"), rows, right=(1,))
