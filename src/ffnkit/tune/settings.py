"""Settings of fine-tuning and of distillation, checked when they are made; light to import."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

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
    {"eval_batch_size", "logging_every", "save_every", "save_total_limit", "keep_checkpoints", "report_to", "device"}
)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainSettings(_Settings):
    """How a model is fine-tuned. The seed is passed apart, so that arms share settings."""

    learning_rate: Positive = Field(5e-5, description="peak learning rate of Adam")
    schedule: Schedule = Field("linear", description="a learning-rate schedule of transformers, by its name")
    schedule_options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the schedule")
    warmup: NotNegative = Field(0.06, description="below 1: share of the steps; from 1: number of steps")
    weight_decay: NotNegative = Field(0.0, description="decoupled (AdamW); biases and norms are left out")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's averaging factors")
    eps: Positive = Field(1e-8, description="Adam's epsilon")
    optimizer: str = Field("adamw_torch_fused", description="an optimizer of transformers, by its name")
    max_grad_norm: NotNegative = Field(1.0, description="gradients are clipped to this norm; 0: not clipped")
    epochs: Positive = Field(3.0, description="passes over the training split; unused where steps is set")
    steps: Count | None = Field(None, description="optimizer steps in all; overrides epochs")
    batch_size: Count = Field(32, description="examples of a forward pass, a device")
    eval_batch_size: Count = Field(64, description="examples of a forward pass while evaluating, a device")
    accumulation: Count = Field(1, description="forward passes an optimizer step")
    max_length: Count = Field(128, description="longer texts are cut, in tokens")
    augment: Literal["none", "flip", "crop-flip"] = Field(
        "none", description="images to train on: flip mirrors, crop-flip moves too"
    )
    packing: bool = Field(False, description="several examples in a row of max_length tokens, kept apart; of decoders")
    group_by_length: bool = Field(False, description="batches of similar lengths: less padding, less random order")
    precision: Precision = Field("fp32", description="bf16 and fp16: mixed precision; fp16 needs a GPU")
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    eval_every: Count | None = Field(None, description="evaluate on dev every so many steps; null: each epoch")
    save_every: Count | None = Field(None, description="further checkpoints, besides one at each evaluation")
    save_total_limit: Count | None = Field(2, description="checkpoints kept on disk; best and last always are")
    keep_checkpoints: bool = Field(False, description="leave the checkpoints on disk after success")
    keep_best: bool = Field(True, description="end with the best checkpoint instead of the last one")
    best_metric: str | None = Field(None, description="picks the best checkpoint: a metric of the task, or loss")
    early_stopping: Count | None = Field(None, description="stop after so many evaluations without a gain")
    logging_every: Count = Field(10, description="steps between entries of the loss log")
    report_to: str | list[str] = Field("none", description="trackers of transformers: none, tensorboard, wandb, ...")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: the GPU where there is one")

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        if self.early_stopping is not None and not self.keep_best:
            raise ValueError("early_stopping needs keep_best, which names the checkpoint to stop at")
        return self

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """``augment`` and ``packing`` are told where there are any, so that facts about runs stay what they were."""
        told: dict[str, Any] = handler(self)
        if told.get("augment") == "none":
            del told["augment"]
        if not told.get("packing", True):
            del told["packing"]
        return told


class DistilSettings(_Settings):
    """How a compressed model is fitted to the uncompressed one: what is compared, what trains, on which text."""

    objective: Literal["layers", "logits", "both"] = Field("layers", description="hidden states, answers, or both")
    temperature: Positive = Field(2.0, description="softens both models' logits; unused by a regression")
    hard_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the true labels' loss in that of the logits"
    )
    layers_weight: NotNegative = Field(1.0, description="weight of the hidden states' loss where objective is both")
    logits_weight: NotNegative = Field(1.0, description="weight of the logits' loss where objective is both")
    trains: Literal["ffn", "all"] = Field("ffn", description="ffn: the compressed FFNs; all: every parameter")
    text: str | None = Field(None, description="a file of text without labels, in place of the task's training texts")
    text_column: str = Field("text", description="the column of that file, unless it is plain text")
    teacher: str | None = Field(None, description="of a recipe: a tuned model to learn from, not the uncompressed one")
    learning_rate: Positive = Field(5e-5, description="peak learning rate of Adam")
    schedule: Literal["linear", "constant"] = Field("linear", description="linear decays to 0 at the last step")
    warmup: NotNegative = Field(0.0, description="below 1: share of the steps; from 1: number of steps")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's averaging factors")
    eps: Positive = Field(1e-8, description="Adam's epsilon")
    max_grad_norm: NotNegative = Field(0.0, description="gradients are clipped to this norm; 0: not clipped")
    epochs: Positive = Field(1.0, description="passes over the data; unused where steps is set")
    steps: Count | None = Field(None, description="optimizer steps in all; overrides epochs")
    batch_size: Count = Field(32, description="examples a step, where the data are examples and not ready batches")
    max_length: Count = Field(128, description="longer texts are cut, in tokens, by whoever encodes the data")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: forward passes under autocast")
    save_every: Count = Field(100, description="steps between saved states, where an output folder is given")
    logging_every: Count = Field(10, description="steps between entries of the loss log")

    @model_validator(mode="after")
    def _fits_objective(self) -> DistilSettings:
        if self.hard_weight and self.objective == "layers":
            raise ValueError("hard_weight is a part of the loss of logits; set objective to logits or both")
        if self.objective == "both" and not self.layers_weight + self.logits_weight:
            raise ValueError("layers_weight and logits_weight are both 0; give at least one of them")
        return self


class CalibrationSettings(_Settings):
    """Which data a method sees that measures activations."""

    tokens: Count = Field(6400, description="tokens in all, padding left out")
    text: str | None = Field(None, description="a text file, or a table with a column of text; null: the task's rows")
    text_column: str = Field("text", description="the column of the text, where the file is a table")
    max_length: Count = Field(128, description="longer texts are cut, in tokens")
    batch_size: Count = Field(16, description="texts of a forward pass")
