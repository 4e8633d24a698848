"""``ffnkit tune`` and ``eval``: a task by name, or tables of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ffnkit.cli import console, describe, options
from ffnkit.cli.app import app
from ffnkit.cli.outputs import check_output
from ffnkit.errors import FfnkitError

DATA, TRAINING, RESULT = "Task and data", "Training", "Result"
Precision = Literal["fp32", "bf16", "fp16"]

TaskName = Annotated[str | None, typer.Option("--task", "-t", help="One of 'ffnkit tasks'.", rich_help_panel=DATA)]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="FFNKIT_DATA", help="Folder with TASK/train.jsonl ...", rich_help_panel=DATA),
]
TrainFile = Annotated[
    Path | None, typer.Option("--train-file", help="Your own csv, jsonl, json or parquet.", rich_help_panel=DATA)
]
ValidationFile = Annotated[
    Path | None, typer.Option("--validation-file", help="Your own file for the reported figure.", rich_help_panel=DATA)
]
TextColumn = Annotated[
    list[str] | None, typer.Option("--text-column", help="A column of text; give two for pairs.", rich_help_panel=DATA)
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="The column of labels.", rich_help_panel=DATA)]
Metric = Annotated[str | None, typer.Option("--metric", help="The metric of your own files.", rich_help_panel=DATA)]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Tokens a text.", rich_help_panel=DATA)]

Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Model or folder of the tokenizer, if not MODEL.", rich_help_panel=DATA),
]


def setting(flag: str, text: str, **kwargs: Any) -> Any:
    """An option of the panel Training that stands for a field of TrainSettings; not given: the field's default."""
    return typer.Option(flag, help=text, rich_help_panel=TRAINING, show_default=False, **kwargs)


@app.command(rich_help_panel="Models")
def tune(
    model: options.Model,
    out: options.Out,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    metric: Metric = None,
    max_length: MaxLength = None,
    tokenizer: Tokenizer = None,
    tuner: Annotated[str, typer.Option("--tuner", help="One of 'ffnkit tuners'.", rich_help_panel=TRAINING)] = "full",
    learning_rate: Annotated[float | None, setting("--lr", "Learning rate.")] = None,
    epochs: Annotated[float | None, setting("--epochs", "Passes over the data.")] = None,
    steps: Annotated[int | None, setting("--steps", "Optimizer steps; in place of --epochs.")] = None,
    batch_size: Annotated[int | None, setting("--batch-size", "Texts a step and device.")] = None,
    accumulation: Annotated[int | None, setting("--accumulation", "Batches a step.")] = None,
    schedule: Annotated[str | None, setting("--schedule", "linear, cosine, constant, ...")] = None,
    warmup: Annotated[float | None, setting("--warmup", "Warm-up: steps, or a share of them below 1.")] = None,
    weight_decay: Annotated[float | None, setting("--weight-decay", "Weight decay.")] = None,
    precision: Annotated[Precision | None, setting("--precision", "Mixed precision.")] = None,
    eval_every: Annotated[int | None, setting("--eval-every", "Steps between evaluations on dev.")] = None,
    early_stopping: Annotated[int | None, setting("--early-stopping", "Stop after N evaluations without gain.")] = None,
    best_metric: Annotated[str | None, setting("--best-metric", "Picks the best checkpoint.")] = None,
    report_to: Annotated[list[str] | None, setting("--report-to", "tensorboard, wandb, ...; repeatable.")] = None,
    more: Annotated[
        list[str] | None, setting("--set", "A further setting of the training; repeatable.", metavar="NAME=VALUE")
    ] = None,
    tuner_set: Annotated[
        list[str] | None, setting("--tuner-set", "A setting of the tuner; repeatable.", metavar="NAME=VALUE")
    ] = None,
    distil_from: Annotated[
        str | None, setting("--distil-from", "First match the layers of this uncompressed model.", metavar="TEACHER")
    ] = None,
    distil_set: Annotated[
        list[str] | None, setting("--distil-set", "A setting of the distillation; repeatable.", metavar="NAME=VALUE")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data, head, order.", rich_help_panel=TRAINING)] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows of train.", rich_help_panel=DATA)] = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold what was kept apart for tuning.", rich_help_panel=RESULT)
    ] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Tune a model on a task, report its metric, save it in the compact form.

    Settings and checkpoints are chosen on a part of train (dev); the validation split is for the reported figure
    only. Interrupted? Run the same command again: it resumes from the last checkpoint.

    [bold]Examples[/bold]

      ffnkit tune small [cyan]--task sst2 --tuner full --lr 1e-4 --steps 300[/cyan] --out tuned

      ffnkit tune small --train-file train.csv --validation-file test.csv
      [cyan]--text-column title --text-column body --label-column topic[/cyan] --out tuned

      ffnkit tune small --task sst2 [cyan]--distil-from roberta-base[/cyan] --out tuned
    """
    from ffnkit.cli.tune_job import Sources, TuneJob

    check_output(out, overwrite=overwrite, source=model)
    sources = Sources(task, data_dir, train_file, validation_file, tuple(text_column or ()), label_column, metric)
    given = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "precision": precision,
        "eval_every": eval_every,
        "early_stopping": early_stopping,
        "best_metric": best_metric,
        "report_to": report_to or None,
        "max_length": max_length,
    }
    job = TuneJob(
        model=model,
        out=out,
        task=sources.task(),
        data_dir=data_dir,
        settings=merged(given, more or []),
        tuner=tuner,
        tuner_settings=describe.parse_settings(tuner_set or []),
        teacher=distil_from,
        distil_settings=describe.parse_settings(distil_set or []),
        seed=seed,
        limit=limit,
        fold=fold,
        tokenizer=tokenizer,
    )
    console.quieten()
    report = job.run()
    if as_json:
        console.print_json(report)
    else:
        show(report, job.task)
        console.out(f"saved in {out}")


def merged(given: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """The options that were given, with ``--set``; FfnkitError when a setting is given in both ways."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in describe.parse_settings(pairs).items():
        if name in found:
            raise FfnkitError(f"--set {name}={value}", "its own option is given too", "Give one of the two")
        found[name] = value
    return found


@app.command("eval", rich_help_panel="Models")
def evaluate(
    model: options.Model,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    metric: Metric = None,
    max_length: MaxLength = None,
    tokenizer: Tokenizer = None,
    split: Annotated[
        Literal["report", "dev"], typer.Option("--split", help="The validation split, or a part of train.")
    ] = "report",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts at a time.")] = 64,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows; all by default.")] = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split --split dev.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Measure a tuned model on a task.

    [bold]Examples[/bold]

      ffnkit eval tuned --task sst2

      ffnkit eval tuned --task sst2 [cyan]--json[/cyan] | jq .metrics.accuracy
    """
    from ffnkit.cli.tune_job import EvalJob, Sources

    sources = Sources(task, data_dir, train_file, validation_file, tuple(text_column or ()), label_column, metric)
    chosen = sources.task()
    console.quieten()
    place = options.pick_device(device)
    report = EvalJob(model, chosen, data_dir, split, batch_size, max_length or 128, limit, seed, place, tokenizer).run()
    if as_json:
        console.print_json(report)
    else:
        show(report, chosen)


def show(report: dict[str, Any], task: Any) -> None:
    """Print metrics as a table, and those of further splits below."""
    tables = {f"{report['split']} split, {report['rows']} rows": report["metrics"], **report.get("extra", {})}
    for name, metrics in tables.items():
        rows = [(metric, f"{value:.4f}") for metric, value in metrics.items()]
        console.table(f"{task.name}, {name}", ("metric", "value"), rows, right=(1,))
