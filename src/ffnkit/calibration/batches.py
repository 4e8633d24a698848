"""One way to run a model over batches: what a batch may be, device and dtype, eval mode, labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.ops.products import fast_products

Batch = Mapping[str, Any]

ASKED = "calibration data"
GIVE = "Give a list or DataLoader of batches, each a dict of tensors for model(**batch)"
MEDIA = ("pixel", "image", "video", "input_features")  # where these go in, tokens of theirs need no embedding
IDS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def checked(batches: Iterable[Batch], asked: str = ASKED) -> Iterator[Batch]:
    """The batches one after the other, as they are.

    Raises:
        FfnkitError: there are none, or one is no mapping of tensors with a batch dimension; in one line, that says
            what was found.
    """
    check_batches(batches, asked)
    number = -1
    for number, batch in enumerate(batches):
        if (fault := _fault(batch)) is not None:
            raise FfnkitError(asked, f"batch {number} is {fault[0]}", fault[1])
        yield batch
    if number < 0:
        spent = " (an iterator gives its batches only once)" if isinstance(batches, Iterator) else ""
        raise FfnkitError(asked, f"there are no batches{spent}", "Give at least one batch for model(**batch)")


def check_batches(batches: Iterable[Batch], asked: str = ASKED) -> None:
    """Raises FfnkitError where something holds no batches, whatever is in it."""
    if isinstance(batches, Mapping):
        raise FfnkitError(asked, f"a lone {type(batches).__name__}", "Give a list of batches: data=[batch]")
    if not isinstance(batches, Iterable) or isinstance(batches, str | Tensor):
        raise FfnkitError(asked, f"a {type(batches).__name__}, which holds no batches", GIVE)


def kept(batches: Iterable[Batch], asked: str = ASKED) -> list[Batch]:
    """The same as a list, for several passes over what may be a generator."""
    return list(checked(batches, asked))


def telling(
    batches: Iterable[Batch], progress: Callable[[int, int, str], None] | None, what: str = "data"
) -> Iterator[Batch]:
    """The batches, with progress once the work on each is done; their number is not known of a generator."""
    for number, batch in enumerate(batches, 1):
        yield batch
        if progress is not None:
            progress(number, len(batches) if isinstance(batches, Sized) else number, what)


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of what a module gives that has a row for something, which a loss has not."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    found = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return next((value for value in found if value.ndim > 1), found[0])


def _fault(batch: Any) -> tuple[str, str] | None:
    """What a batch is instead, and what to do about it."""
    if isinstance(batch, tuple | list):
        held = sorted({type(value).__name__ for value in batch})
        do = "Name the tensors: {'input_ids': ..., 'attention_mask': ...}"
        return f"a {type(batch).__name__} of {', '.join(held) or 'nothing'}, not a dict", do
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}, not a dict", GIVE
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    foreign = [name for name in IDS if batch.get(name) is not None and name not in tensors]
    if foreign or not tensors:
        name = foreign[0] if foreign else next(iter(batch), None)
        found = "empty" if name is None else f"a row whose {name} is a {type(batch[name]).__name__}, not a tensor"
        return found, "Collate rows into batches of tensors, with a DataLoader and its collate_fn"
    for name, value in tensors.items():
        if name in IDS and value.ndim < 2:
            return f"a single row ({name} has shape {tuple(value.shape)})", "Collate rows into batches: (batch, tokens)"
        if value.ndim and not value.numel():
            return f"empty ({name} has shape {tuple(value.shape)})", "Leave empty batches out"
    return None


def prepared(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors on the model's device, floating ones in the model's dtype.

    Padding may be a token that the model has no embedding for (a "[PAD]" that was added to the tokenizer): it becomes
    token 0, which the mask hides as well.

    Raises:
        FfnkitError: a token that counts has no embedding.
    """
    batch = _embedded(model, batch)
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() and dtype is not None else value.to(device)

    return {name: moved(value) for name, value in batch.items()}


def _embedded(model: nn.Module, batch: Batch) -> Batch:
    ids, mask, table = batch.get("input_ids"), batch.get("attention_mask"), _embedding(model)
    if not isinstance(ids, Tensor) or table is None or not bool((ids >= table.num_embeddings).any()):
        return batch
    beyond = ids >= table.num_embeddings
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        hidden = beyond & mask.eq(0).to(ids.device)
        batch = {**batch, "input_ids": ids.masked_fill(hidden, 0)}
        beyond = beyond & ~hidden
    if bool(beyond.any()) and not any(name.startswith(MEDIA) for name in batch):
        found = f"token {int(ids[beyond][0])}, and the model has embeddings for {table.num_embeddings} tokens"
        do = "Use the model's own tokenizer, resize the model's embeddings, or mask padding"
        raise FfnkitError(ASKED, found, do)
    return batch


def _embedding(model: nn.Module) -> nn.Embedding | None:
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch without labels, unless the decoder's inputs are made from them."""
    inputs = {k: v for k, v in batch.items() if k not in ("label", "labels")}
    labels = batch.get("labels")
    wanted = has_decoder(model) and labels is not None and labels.ndim == 2 and not decoder_given(batch)
    return {**inputs, "labels": labels} if wanted else inputs


def decoder_given(batch: Batch) -> bool:
    """Whether the decoder's own inputs are in the batch."""
    return any(name.startswith("decoder_input") for name in batch)


def has_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads and a decoder writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_finite(what: str, values: Tensor, counted: Callable[[], Tensor] | None = None) -> None:
    """Raises FfnkitError where numbers overflowed or are none: nothing can be measured on them.

    Args:
        counted: gives those that count, where not all do.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    if bool(torch.isfinite(values.sum(dtype=wide))):  # then all are
        return
    if not bool(torch.isfinite(values if counted is None else counted()).all()):
        found = f"it is NaN or infinite in {str(values.dtype).removeprefix('torch.')}"
        raise FfnkitError(what, found, "Load the model with dtype float32 or bfloat16, or repair its weights")


def forward(model: nn.Module, batch: Batch, *, labels: bool = False, logits: bool = True) -> Any:
    """The model's output for a prepared batch.

    Args:
        labels: hand all labels to the model, so that it gives its loss; else only those that the decoder's inputs are
            made from. logits: of every token; else of the last one alone, where that saves the others.
    """
    inputs = batch if labels else model_inputs(model, batch)
    more = {} if logits or "labels" in inputs else few_logits(model)
    return called(model, {**more, **inputs})


def called(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What the model gives. Raises FfnkitError where its decoder has nothing to read (BART's makes its own)."""
    try:
        return model(**inputs)
    except ValueError as error:
        if not has_decoder(model) or "labels" in inputs or decoder_given(inputs):
            raise
        found = "no labels and no decoder_input_ids, and its decoder reads them"
        raise FfnkitError(f"a batch of {type(model).__name__}", found, "Add labels to the batches") from error


def runs_on(model: nn.Module, batch: Batch) -> bool:
    """Whether the model takes a batch, whatever it raises for one that it does not."""
    try:
        with torch.no_grad(), evaluating(model):
            forward(model, prepared(model, batch), logits=False)
    except Exception:
        return False
    return True


def few_logits(model: nn.Module) -> dict[str, Any]:
    """What asks a model for the last token's logits alone: of a large vocabulary they are most of a pass's memory, and
    of a small model a fifth of its time. Empty where it always gives all, or where somebody listens to its head."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heard = [model] if head is None else [model, *head.modules()]
    return {} if any(each._forward_hooks or each._forward_pre_hooks for each in heard) else {"logits_to_keep": 1}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """:func:`eval_mode`, and products in the type in which the device is fast: for whatever is not timed."""
    with eval_mode(model), fast_products(model):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, so no dropout, inside the block; each module's own mode, and the config's kind of problem, afterwards.

    Classifiers write into their config what kind of problem the labels that they saw are.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    model.eval()
    try:
        yield
    finally:
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem
        for module, mode in modes:
            module.training = mode


def run(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    before: Callable[[Batch], Any] | None = None,
    after: Callable[[Batch, Any], Any] | None = None,
    labels: bool = False,
    logits: bool = True,
    asked: str = ASKED,
) -> int:
    """Run the model over ``batches`` in eval mode; none is held longer than its turn.

    Args:
        batches: a generator, list, tuple, DataLoader or other iterable of mappings (dict, BatchEncoding, ...).
        before, after: called with each prepared batch, and after its pass with the model's output too.
        labels: as in :func:`forward`. logits: whether ``after`` reads them. asked: what an error says that the batches
            are for.

    Returns:
        The number of batches.

    Raises:
        FfnkitError: as :func:`checked`.
    """
    count = 0
    with evaluating(model):
        total = len(batches) if isinstance(batches, Sized) else 0
        for given in counted(checked(batches, asked), "batches", total):
            batch = prepared(model, given)
            if before is not None:
                before(batch)
            output = forward(model, batch, labels=labels, logits=logits and after is not None)
            if after is not None:
                after(batch, output)
            count += 1
    return count


@torch.enable_grad()
def backward(model: nn.Module, batches: Iterable[Batch], *, asked: str, do: str = "Give batches with labels") -> int:
    """Run the model over ``batches`` with their labels and go back from each loss; gradients are the caller's.

    Raises:
        FfnkitError: no batches, or outputs without a loss.
    """

    def after(_: Batch, output: Any) -> None:
        loss_of(output, asked, do).backward()

    return run(model, batches, after=after, labels=True, asked=asked)


def loss_of(output: Any, asked: str, do: str = "Give batches with labels") -> Tensor:
    """The loss in an output. Raises FfnkitError where there is none."""
    loss = getattr(output, "loss", None)
    if loss is None:
        raise FfnkitError(asked, "its outputs have no loss", do)
    assert isinstance(loss, Tensor)
    return loss
