"""Settings of fine-tuning and of distillation, checked when they are made; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ffnkit.settings.calibration import MIX, ROW_LENGTH, TEXT_COLUMN, TEXT_LENGTH, TEXTS_A_PASS, TOKENS
from ffnkit.settings.checked import Checked
from ffnkit.settings.presets import Preset
from ffnkit.tune.presets import TRAINING

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]
Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Fields of TrainSettings that leave the trained weights as they are: a run may be resumed with other values of them.
HARMLESS = frozenset(
    {
        *("eval_batch_size", "logging_every", "save_every", "save_total_limit", "keep_checkpoints", "report_to"),
        *("device", "preset"),  # what a preset says stands in the other fields
    }
)
Training = Literal[
    "mlp-fusion-glue",
    "mlp-fusion-webnlg",
    "mlp-fusion-switch",
    "ffn-merging-gpt2",
    "ffn-merging-vit",
    "ffn-merging-opus",
]


class TrainSettings(Checked):
    """How a model is fine-tuned. The seed is passed apart, so that arms share settings."""

    learning_rate: Annotated[Positive, Field(description="peak learning rate of Adam")] = 5e-5
    schedule: Annotated[
        Schedule, Field(description="of the learning rate, by transformers: linear, cosine, constant, ...")
    ] = "linear"
    schedule_options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the schedule")
    warmup: Annotated[NotNegative, Field(description="below 1: share of the steps; from 1: number of steps")] = 0.06
    weight_decay: Annotated[NotNegative, Field(description="decoupled (AdamW); not on biases, norms, coefficients")] = (
        0.0
    )
    betas: Annotated[tuple[Beta, Beta], Field(description="Adam's averaging factors")] = (0.9, 0.999)
    eps: Annotated[Positive, Field(description="Adam's epsilon")] = 1e-8
    optimizer: Annotated[str, Field(description="an optimizer of transformers, by its name")] = "adamw_torch_fused"
    max_grad_norm: Annotated[NotNegative, Field(description="gradients are clipped to this norm; 0: not clipped")] = 1.0
    label_smoothing: Annotated[
        Annotated[float, Field(ge=0, lt=1)], Field(description="share of the target spread over all classes or words")
    ] = 0.0
    compressed_rate_factor: Annotated[
        Positive, Field(description="what was compressed learns at this many times the learning rate")
    ] = 1.0
    epochs: Annotated[Positive, Field(description="passes over the training split; unused where steps is set")] = 3.0
    steps: Annotated[Count | None, Field(description="optimizer steps in all; overrides epochs")] = None
    batch_size: Annotated[Count, Field(description="examples of a forward pass, a device")] = 32
    eval_batch_size: Annotated[Count, Field(description="examples of a forward pass while evaluating, a device")] = 64
    accumulation: Annotated[Count, Field(description="forward passes an optimizer step")] = 1
    max_length: Annotated[Count, Field(description="longer texts are cut, in tokens")] = 128
    augment: Annotated[
        Literal["none", "flip", "crop-flip"], Field(description="images to train on: flip mirrors, crop-flip moves too")
    ] = "none"
    packing: Annotated[
        bool, Field(description="several examples in a row of max_length tokens, kept apart; of decoders")
    ] = False
    group_by_length: Annotated[
        bool, Field(description="batches of similar lengths: less padding, less random order")
    ] = False
    precision: Annotated[Precision, Field(description="bf16 and fp16: mixed precision; fp16 needs a GPU")] = "fp32"
    gradient_checkpointing: Annotated[bool, Field(description="less memory for about a third more time")] = False
    eval_every: Annotated[Count | None, Field(description="steps between evaluations on dev; null: each epoch")] = None
    save_every: Annotated[Count | None, Field(description="further checkpoints, besides one at each evaluation")] = None
    save_total_limit: Annotated[
        Count | None, Field(description="checkpoints kept on disk; best and last always are")
    ] = 2
    keep_checkpoints: Annotated[bool, Field(description="leave the checkpoints on disk after success")] = False
    keep_best: Annotated[bool, Field(description="end with the best checkpoint instead of the last one")] = True
    best_metric: Annotated[
        str | None, Field(description="picks the best checkpoint: a metric of the task, or loss")
    ] = None
    early_stopping: Annotated[Count | None, Field(description="evaluations without a gain after which it stops")] = None
    logging_every: Annotated[Count, Field(description="steps between entries of the loss log")] = 10
    report_to: Annotated[
        str | list[str], Field(description="trackers of transformers: none, tensorboard, wandb, ...")
    ] = "none"
    device: Annotated[Literal["auto", "cpu"], Field(description="auto: the GPU where there is one")] = "auto"
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None, Field(description="all dropout of the model; null: the model's own")
    ] = None
    preset: Annotated[Training | None, Field(description="values for what is not given")] = None

    presets: ClassVar[Mapping[str, Preset]] = TRAINING

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        if self.early_stopping is not None and not self.keep_best:
            raise ValueError("early_stopping needs keep_best, which names the checkpoint to stop at")
        if self.schedule_options or self.schedule in ("cosine_with_min_lr", "warmup_stable_decay"):
            self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        """Raises ValueError for options that the schedule does not take, or lacks, before a model runs."""
        import torch
        from transformers.optimization import get_scheduler

        options = dict(self.schedule_options)
        try:
            get_scheduler(self.schedule, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 0, 1, options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule_options do not fit the schedule {self.schedule}: {error}") from None

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Later settings are told where they are not the default, so that facts about runs stay what they were."""
        told: dict[str, Any] = handler(self)
        plain: dict[str, Any] = {"augment": "none", "packing": False, "dropout": None, "preset": None}
        plain |= {"label_smoothing": 0.0, "compressed_rate_factor": 1.0}
        return {name: value for name, value in told.items() if name not in plain or value != plain[name]}


class DistilSettings(Checked):
    """How a compressed model is fitted to the uncompressed one: what is compared, what trains, on which text."""

    objective: Annotated[Literal["layers", "logits", "both"], Field(description="hidden states, answers, or both")] = (
        "layers"
    )
    temperature: Annotated[Positive, Field(description="softens both models' logits; unused by a regression")] = 2.0
    hard_weight: Annotated[
        Annotated[float, Field(ge=0, le=1)], Field(description="share of the true labels' loss in that of the logits")
    ] = 0.0
    layers_weight: Annotated[
        NotNegative, Field(description="weight of the hidden states' loss where objective is both")
    ] = 1.0
    logits_weight: Annotated[NotNegative, Field(description="weight of the logits' loss where objective is both")] = 1.0
    trains: Annotated[Literal["ffn", "all"], Field(description="ffn: the compressed FFNs; all: every parameter")] = (
        "ffn"
    )
    text: Annotated[
        str | None, Field(description="a file of text without labels, in place of the task's training texts")
    ] = None
    text_column: Annotated[str, Field(description="the column of that file, unless it is plain text")] = "text"
    teacher: Annotated[
        str | None, Field(description="of a recipe: a tuned model to learn from, not the uncompressed one")
    ] = None
    learning_rate: Annotated[Positive, Field(description="peak learning rate of Adam")] = 5e-5
    schedule: Annotated[Literal["linear", "constant"], Field(description="linear decays to 0 at the last step")] = (
        "linear"
    )
    warmup: Annotated[NotNegative, Field(description="below 1: share of the steps; from 1: number of steps")] = 0.0
    betas: Annotated[tuple[Beta, Beta], Field(description="Adam's averaging factors")] = (0.9, 0.999)
    eps: Annotated[Positive, Field(description="Adam's epsilon")] = 1e-8
    max_grad_norm: Annotated[NotNegative, Field(description="gradients are clipped to this norm; 0: not clipped")] = 0.0
    epochs: Annotated[Positive, Field(description="passes over the data; unused where steps is set")] = 1.0
    steps: Annotated[Count | None, Field(description="optimizer steps in all; overrides epochs")] = None
    batch_size: Annotated[
        Count, Field(description="examples a step, where the data are examples and not ready batches")
    ] = 32
    max_length: Annotated[Count, Field(description="longer texts are cut, in tokens, by whoever encodes the data")] = (
        128
    )
    precision: Annotated[Literal["fp32", "bf16"], Field(description="bf16: forward passes under autocast")] = "fp32"
    save_every: Annotated[Count, Field(description="steps between saved states, where an output folder is given")] = 100
    logging_every: Annotated[Count, Field(description="steps between entries of the loss log")] = 10

    @model_validator(mode="after")
    def _fits_objective(self) -> DistilSettings:
        if self.hard_weight and self.objective == "layers":
            raise ValueError("hard_weight is a part of the loss of logits; set objective to logits or both")
        if self.objective == "both" and not self.layers_weight + self.logits_weight:
            raise ValueError("layers_weight and logits_weight are both 0; give at least one of them")
        return self


class CalibrationSettings(Checked):
    """Which data a method sees that measures activations."""

    tokens: Annotated[Count, Field(description="tokens in all, padding left out")] = TOKENS
    text: Annotated[
        str | list[str] | dict[str, NotNegative] | None,
        Field(
            description="a text file, or a table with a column of text or of messages; several: a list, or each with"
            " its share; null: the task's rows"
        ),
    ] = None
    mix: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="beside a text file, the share of tokens that is of ffnkit's text of many kinds",
        ),
    ] = MIX
    text_column: Annotated[str, Field(description="the column of the text, where the file is a table")] = TEXT_COLUMN
    max_length: Annotated[
        Count | None,
        Field(
            description=f"longer texts are cut, in tokens; null: {TEXT_LENGTH} of a text file (not more than the model"
            f" reads), {ROW_LENGTH} of a task's rows"
        ),
    ] = None
    batch_size: Annotated[
        Count | None,
        Field(description=f"texts of a forward pass; null: {TEXTS_A_PASS}, fewer where they are long"),
    ] = None

    @property
    def row_length(self) -> int:
        """Tokens of a task's row at most."""
        return self.max_length or ROW_LENGTH

    @property
    def text_length(self) -> int:
        """Tokens of a piece of a text file at most: what tokens far apart do to each other counts too."""
        return self.max_length or TEXT_LENGTH

    def texts_a_pass(self, length: int) -> int:
        """Texts of a forward pass, each of at most so many tokens."""
        return self.batch_size or min(max(TEXTS_A_PASS * ROW_LENGTH // length, 1), TEXTS_A_PASS)
