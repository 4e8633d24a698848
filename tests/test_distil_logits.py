"""Distillation of answers: the loss against a slow loop over its formula, for every kind of head."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_distil import batches, noisy
from tolerance import assert_close, assert_differs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffnkit.errors import FfnkitError
from ffnkit.tune import DistilSettings, distil_logits, distillation_loss, layerwise_loss

CAUSAL = ("gpt2", "llama", "mixtral")
PAIRS = ("t5", "bart", "switch")


def settings(**changes: Any) -> DistilSettings:
    return DistilSettings(**{"objective": "logits", "temperature": 3.0, **changes})


def loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], **changes: Any) -> Tensor:
    return distillation_loss(student, teacher, batch, settings(**changes))[0]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def slow_row(ours: Tensor, theirs: Tensor, temperature: float, label: int | None, hard_weight: float) -> float:
    """The formula for one example: T^2 sum_v p_v log(p_v / q_v), and the cross entropy of its label."""
    p = softmax([float(value) / temperature for value in theirs])
    q = softmax([float(value) / temperature for value in ours])
    soft = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if not hard_weight:
        return soft
    assert label is not None
    return (1 - hard_weight) * soft - hard_weight * math.log(softmax([float(value) for value in ours])[label])


@torch.no_grad()
def slow_loss(
    student: nn.Module,
    teacher: nn.Module,
    inputs: dict[str, Tensor],
    counted: dict[tuple[int, ...], int | None],
    temperature: float = 3.0,
    hard_weight: float = 0.0,
) -> Tensor:
    """The mean over the places of the logits that are named, each with its label."""
    ours, theirs = student(**inputs).logits, teacher(**inputs).logits
    rows = [slow_row(ours[at], theirs[at], temperature, label, hard_weight) for at, label in counted.items()]
    return torch.tensor(sum(rows) / len(rows))


def ids(rows: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


# Classifiers and regressions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_classifiers(name: str, hard_weight: float) -> None:
    teacher = FAMILIES[name].model()
    student, inputs = noisy(teacher, share=1.0), batches(name, teacher, 1)[0]
    logits = teacher(**inputs).logits
    labels = torch.arange(len(logits)) % logits.shape[1]
    counted = {(row,): int(label) for row, label in enumerate(labels)}
    batch = {**inputs, "labels": labels}
    fast = loss(student, teacher, batch, hard_weight=hard_weight)
    assert_close(fast, slow_loss(student, teacher, inputs, counted, 3.0, hard_weight), rel=1e-4)
    if hard_weight:
        assert_differs(fast, loss(student, teacher, {**batch, "labels": labels.flip(0)}, hard_weight=hard_weight))
        return
    assert_close(fast, loss(student, teacher, inputs), rel=1e-6)  # no labels are needed
    assert_differs(fast, slow_loss(student, teacher, inputs, counted, 1.0))  # the temperature matters, and its square
    assert_differs(fast, slow_loss(student, teacher, inputs, counted) / 9)


def test_the_temperature_squared_keeps_gradients_of_one_size() -> None:
    """Hinton et al., section 2: soft gradients scale as 1/T^2, so T^2 times the loss has a limit as T grows."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 4, 7, generator=generator)
    hot, hotter = (distil_logits.softened_kl(ours, theirs, t).sum() for t in (100.0, 200.0))
    assert_close(hot, hotter, rel=0.02)
    centred = (ours - ours.mean(-1, keepdim=True)) - (theirs - theirs.mean(-1, keepdim=True))
    assert_close(hotter, centred.square().sum() / (2 * 7), rel=0.02)
    assert_differs(distil_logits.softened_kl(ours, theirs, 1.0).sum(), hotter, rel=0.05)


def regression() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    config = FAMILIES["bert"].config()
    config.num_labels, config.problem_type = 1, "regression"
    torch.manual_seed(0)
    teacher = type(FAMILIES["bert"].model())(config).eval()
    return noisy(teacher, share=2.0), teacher, batches("bert", teacher, 1)[0]


def test_a_regression_has_a_squared_error_and_no_temperature() -> None:
    student, teacher, inputs = regression()
    ours, theirs = student(**inputs).logits.detach(), teacher(**inputs).logits.detach()
    labels = torch.linspace(-1, 1, len(ours))
    soft = sum(float(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    hard = sum(float(a - b) ** 2 for a, b in zip(ours, labels, strict=True)) / len(ours)
    batch = {**inputs, "labels": labels}
    assert_close(loss(student, teacher, batch), torch.tensor(soft), rel=1e-5)
    assert_close(loss(student, teacher, batch, temperature=1.0), torch.tensor(soft), rel=1e-5)
    assert_close(loss(student, teacher, batch, hard_weight=0.25), torch.tensor(0.75 * soft + 0.25 * hard), rel=1e-5)
    assert_differs(torch.tensor(soft), torch.tensor(hard))


def test_what_cannot_be_compared_is_said() -> None:
    student, teacher, inputs = regression()
    with pytest.raises(FfnkitError, match="have no labels"):
        loss(student, teacher, inputs, hard_weight=0.5)
    other = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="logits of shapes"):
        loss(student, other, inputs)
    with pytest.raises(FfnkitError, match="have no labels"):
        loss(noisy(other), other, inputs, hard_weight=0.5)
    with pytest.raises(FfnkitError, match="have no labels"):  # a score is no class
        loss(noisy(other), other, {**inputs, "labels": torch.zeros(2)}, hard_weight=0.5)
    several = copy.deepcopy(other)
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(FfnkitError, match="probability of its own"):
        loss(several, other, inputs)
    body = other.base_model
    with pytest.raises(FfnkitError, match="logits of BertModel"):
        loss(noisy(body), body, inputs)


# Language models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_models_count_tokens_whose_next_one_counts(name: str, side: str) -> None:
    teacher = FAMILIES[name].model()
    student, tokens = noisy(teacher), ids()
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0 if side == "left" else 1
    mask[1, 4:] = 1 if side == "left" else 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, :3] = -100  # a prompt
    inputs = {"input_ids": tokens, "attention_mask": mask}
    counted: dict[tuple[int, ...], int | None] = {(0, at): int(tokens[0, at + 1]) for at in (2, 3, 4)}
    real = (2, 3, 4) if side == "left" else (0, 1, 2)
    counted |= {(1, at): int(tokens[1, at + 1]) for at in real}
    batch = {**inputs, "labels": labels}
    for weight in (0.0, 0.4):
        fast = loss(student, teacher, batch, hard_weight=weight)
        assert_close(fast, slow_loss(student, teacher, inputs, counted, 3.0, weight), rel=1e-4)
    whole = {(0, at): None for at in range(5)} | {(1, at): None for at in real}
    assert_close(loss(student, teacher, inputs), slow_loss(student, teacher, inputs, whole), rel=1e-4)
    for wrong in (whole, {(b, at): None for b in (0, 1) for at in range(6)}):  # prompt, padding and last token count
        assert_differs(loss(student, teacher, batch), slow_loss(student, teacher, inputs, wrong))


def test_the_hard_part_is_the_loss_of_the_library() -> None:
    teacher = FAMILIES["llama"].model()
    student, tokens = noisy(teacher), ids()
    labels = tokens.clone()
    labels[:, :2] = -100
    batch = {"input_ids": tokens, "labels": labels}
    wanted = student(**batch).loss
    assert_close(loss(student, teacher, batch, hard_weight=1.0), wanted, rel=1e-5)
    assert_differs(loss(student, teacher, batch, hard_weight=0.5), wanted)


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoders_count_the_targets_tokens(name: str) -> None:
    teacher = FAMILIES[name].model()
    student, tokens = noisy(teacher), ids()
    labels = ids(length=5, seed=1)
    labels[1, 3:] = -100
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    shifted = teacher.prepare_decoder_input_ids_from_labels(labels=labels)
    counted = {(b, at): int(labels[b, at]) for b in (0, 1) for at in range(5) if labels[b, at] != -100}
    for weight in (0.0, 0.4):
        fast = loss(student, teacher, {**inputs, "labels": labels}, hard_weight=weight)
        slow = slow_loss(student, teacher, {**inputs, "decoder_input_ids": shifted}, counted, 3.0, weight)
        assert_close(fast, slow, rel=1e-4)
    whole = {(b, at): None for b in (0, 1) for at in range(5)}
    padded = slow_loss(student, teacher, {**inputs, "decoder_input_ids": shifted}, whole)
    assert_differs(loss(student, teacher, {**inputs, "labels": labels}), padded)


def test_masked_language_models_count_what_the_masks_keep() -> None:
    teacher = FAMILIES["xlm-roberta"].model()
    student, tokens = noisy(teacher), ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    real = {(b, at): None for b in (0, 1) for at in range(6) if mask[b, at]}
    assert_close(loss(student, teacher, inputs), slow_loss(student, teacher, inputs, real), rel=1e-4)
    labels = torch.full_like(tokens, -100)
    labels[0, 1], labels[1, 3] = 7, 9
    found = loss(student, teacher, {**inputs, "labels": labels}, hard_weight=0.4)
    assert_close(found, slow_loss(student, teacher, inputs, {(0, 1): 7, (1, 3): 9}, 3.0, 0.4), rel=1e-4)
    assert_differs(found, slow_loss(student, teacher, inputs, {(0, 2): 7, (1, 3): 9}, 3.0, 0.4))


def test_nothing_that_counts_is_no_loss() -> None:
    teacher = FAMILIES["llama"].model()
    student, tokens = noisy(teacher), ids()
    empty = loss(student, teacher, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    assert empty.item() == 0
    empty.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "mixtral", "switch"])
def test_an_equal_student_has_no_loss(name: str) -> None:
    teacher = FAMILIES[name].model()
    batch = {"input_ids": ids()}
    batch |= {"labels": ids(seed=1)} if name in PAIRS else {}
    assert loss(copy.deepcopy(teacher), teacher, batch).item() < 1e-6
    assert loss(noisy(teacher), teacher, batch).item() > 1e-3


# Chunks, gradients, sums --------------------------------------------------------------------------------------------


def plain(student: Tensor, teacher: Tensor, keep: Tensor, labels: Tensor, t: float, hard: float) -> Tensor:
    """The formula on whole tensors."""
    rows = distil_logits.softened_kl(student.float(), teacher.float(), t)
    cross = nn.functional.cross_entropy(student.float(), labels, reduction="none")
    return (((1 - hard) * rows + hard * cross) * keep).sum() / keep.sum()


def draws(rows: int = 11, width: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(rows, width, generator=generator)).to(dtype)
    teacher = (3 * torch.randn(rows, width, generator=generator)).to(dtype)
    keep = torch.rand(rows, generator=generator) > 0.3
    return student, teacher, keep, torch.randint(width, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 120, 1 << 22])
@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_gradients_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int, hard: float) -> None:
    monkeypatch.setattr(distil_logits, "CHUNK", chunk)
    student, teacher, keep, labels = draws()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    fast, *_ = distil_logits._Softened.apply(ours, teacher, keep, labels if hard else None, 2.0, hard, True)
    slow = plain(theirs, teacher, keep, labels, 2.0, hard)
    (5 * fast).backward()
    (5 * slow).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert_close(fast, slow, rel=1e-6)
    assert_close(ours.grad, theirs.grad, rel=1e-5)
    assert not ours.grad[~keep].any()
    assert_differs(plain(student, teacher, torch.ones_like(keep), labels, 2.0, hard), slow)


class Largest(TorchDispatchMode):
    """Notes how many float32 tensors of a size and more are made."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.numel() >= self.size:
            self.count += 1
        return out


def test_no_float32_copy_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, keep, labels = draws(64, 200, torch.bfloat16)
    keep.fill_(True)
    monkeypatch.setattr(distil_logits, "CHUNK", 1000)
    ours = student.clone().requires_grad_()
    with Largest(student.numel() // 4) as seen:
        fast, *_ = distil_logits._Softened.apply(ours, teacher, keep, labels, 2.0, 0.3, True)
        fast.backward()
    assert seen.count == 0 and ours.grad is not None and ours.grad.dtype == torch.bfloat16
    theirs = student.clone().requires_grad_()
    with Largest(student.numel() // 4) as seen:
        slow = plain(theirs, teacher, keep, labels, 2.0, 0.3)
        slow.backward()
    assert seen.count > 3 and theirs.grad is not None
    assert_close(fast, slow, rel=1e-5)
    assert_close(ours.grad, theirs.grad, rel=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_both_is_the_stated_sum(name: str) -> None:
    teacher = FAMILIES[name].model()
    student, batch = noisy(teacher), {"input_ids": ids(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch |= {"labels": ids(seed=1)} if name == "t5" else {}
    layers, answers = layerwise_loss(student, teacher, batch), loss(student, teacher, batch)
    both = {"objective": "both", "layers_weight": 0.25, "logits_weight": 10.0}
    total, parts = distillation_loss(student, teacher, batch, settings(**both))
    assert_close(total, 0.25 * layers + 10 * answers, rel=1e-5)
    assert_differs(total, layers + answers)
    assert set(parts) == {"layers", "logits"} and not any(part.requires_grad for part in parts.values())
    assert_close(parts["layers"], layers, rel=1e-5)
    assert_close(parts["logits"], answers, rel=1e-5)


def test_settings_that_contradict_each_other() -> None:
    for changes in ({"hard_weight": 0.5}, {"objective": "both", "layers_weight": 0, "logits_weight": 0}):
        with pytest.raises(ValueError, match="give at least one|set objective"):
            DistilSettings(**changes)
    for field, value in {"objective": "head", "temperature": 0, "hard_weight": 1.5, "trains": "head"}.items():
        with pytest.raises(ValueError, match=field):
            DistilSettings(**{"objective": "both", field: value})
