"""Options of ``ffnkit tune`` that stand for settings of the training, each with the text of its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

TRAINING = "Training"
FLAGS: dict[str, str] = {}  # what the fields of TrainSettings are called here


def of(name: str, flag: str, panel: str = TRAINING, **more: Any) -> Any:
    """An option that stands for a field of TrainSettings; a command that has one is :class:`Told`."""
    FLAGS[name] = flag.partition("/")[0]
    return typer.Option(flag, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class Training:
    """What these options say; its fields are the options, in their order."""

    learning_rate: Annotated[float | None, of("learning_rate", "--lr")] = None
    epochs: Annotated[float | None, of("epochs", "--epochs")] = None
    steps: Annotated[int | None, of("steps", "--steps")] = None
    batch_size: Annotated[int | None, of("batch_size", "--batch-size")] = None
    accumulation: Annotated[int | None, of("accumulation", "--accumulation")] = None
    packing: Annotated[bool | None, of("packing", "--packing/--no-packing")] = None
    schedule: Annotated[str | None, of("schedule", "--schedule")] = None
    warmup: Annotated[float | None, of("warmup", "--warmup")] = None
    weight_decay: Annotated[float | None, of("weight_decay", "--weight-decay")] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, of("precision", "--precision")] = None
    eval_every: Annotated[int | None, of("eval_every", "--eval-every")] = None
    early_stopping: Annotated[int | None, of("early_stopping", "--early-stopping")] = None
    best_metric: Annotated[str | None, of("best_metric", "--best-metric")] = None
    report_to: Annotated[list[str] | None, of("report_to", "--report-to")] = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given, by the names of the fields."""
        return {name: value for name, value in vars(self).items() if value not in (None, [])}


class Told(TyperCommand):
    """A command that reads texts of options from their fields, which are slow to import, when its help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from ffnkit.tune.settings import TrainSettings

        for option in self.params:
            if isinstance(option, TyperOption) and option.name in FLAGS and option.help is None:
                option.help = sentence(TrainSettings.model_fields[option.name].description or "")
        super().format_help(ctx, formatter)


def sentence(text: str) -> str:
    """A field's text as it stands in a help: a word begins with a capital, a value as it is written."""
    first = text.split()[0]
    return f"{text[0].upper() if first.isalpha() else text[0]}{text[1:]}".removesuffix(".") + "."
