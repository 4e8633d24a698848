"""Layer-wise distillation: the loss against its formula, what trains, resuming, every kind of model."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tolerance import assert_close, assert_differs, relative_error
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.tune import DistilSettings, distil, layerwise_loss
from ffnkit.tune.distil_data import Data
from ffnkit.tune.distil_state import FILE
from ffnkit.tune.distillation import learning_rate

KINDS = ("bert", "gpt2", "llama", "t5", "vit", "distilbert", "mixtral")


def noisy(model: nn.Module, names: list[str] | None = None, share: float = 0.3, seed: int = 1) -> nn.Module:
    """A copy whose FFNs (of ``names``) are disturbed: a stand-in for a compressed model."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ffn in ffns(model):
            if names is None or ffn.name in names:
                for p in ffn.parameters():
                    p.add_(share * p.std() * torch.randn(p.shape, generator=generator))
    return model


def batches(name: str, model: nn.Module, count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [FAMILIES[name].inputs(model, seed=seed) for seed in range(count)]


def slow_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula, one layer, example, token and coordinate at a time."""
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**batch, output_hidden_states=True)
    layers = []
    for key, masked in (("encoder_hidden_states", True), ("decoder_hidden_states", False), ("hidden_states", True)):
        if ours.get(key) is None:
            continue
        mask = batch.get("attention_mask") if masked else None
        for h, g in zip(ours[key][1:], theirs[key][1:], strict=True):
            tokens = []
            for b in range(h.shape[0]):
                for n in range(h.shape[1]):
                    if mask is None or mask[b, n]:
                        tokens.append(sum((float(h[b, n, i]) - float(g[b, n, i])) ** 2 for i in range(h.shape[2])))
            layers.append(sum(tokens) / len(tokens))
    return torch.tensor(sum(layers) / len(layers))


@pytest.mark.parametrize("name", KINDS)
def test_loss_is_the_formula(name: str) -> None:
    teacher = FAMILIES[name].model()
    student = noisy(teacher)
    batch = batches(name, teacher, 1)[0]
    assert_close(layerwise_loss(student, teacher, batch), slow_loss(student, teacher, batch), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_an_equal_student_has_no_loss(name: str) -> None:
    teacher = FAMILIES[name].model()
    batch = batches(name, teacher, 1)[0]
    assert (
        layerwise_loss(copy.deepcopy(teacher), teacher, batch).item() < 1e-9
    )  # attention kernels differ without gradients
    assert layerwise_loss(noisy(teacher), teacher, batch).item() > 1e-3


def padded(ids: torch.Tensor, more: int, pad: int) -> dict[str, torch.Tensor]:
    mask = torch.cat([torch.ones_like(ids), ids.new_zeros(ids.shape[0], more)], dim=1)
    return {"input_ids": torch.cat([ids, ids.new_full((ids.shape[0], more), pad)], dim=1), "attention_mask": mask}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_does_not_count(name: str) -> None:
    teacher = FAMILIES[name].model()
    student = noisy(teacher)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    whole = layerwise_loss(student, teacher, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    batch = padded(ids, 3, FAMILIES[name].config().pad_token_id)
    assert_close(layerwise_loss(student, teacher, batch), whole, rel=1e-5)
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert_differs(layerwise_loss(student, teacher, unmasked), whole)


def test_padding_does_not_count_in_either_stack() -> None:
    teacher = FAMILIES["t5"].model()
    student = noisy(teacher)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    target = {f"decoder_{k}": v for k, v in padded(ids[:, :4], 0, 1).items()}
    whole = layerwise_loss(student, teacher, {**padded(ids, 0, 1), **target})
    batch = {**padded(ids, 2, 1), **{f"decoder_{k}": v for k, v in padded(ids[:, :4], 3, 1).items()}}
    assert_close(layerwise_loss(student, teacher, batch), whole, rel=1e-5)
    del batch["decoder_attention_mask"]
    assert_differs(layerwise_loss(student, teacher, batch), whole)


def test_targets_of_a_decoder_mask_it() -> None:
    teacher = FAMILIES["t5"].model()
    student = noisy(teacher)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :4].contiguous()
    whole = layerwise_loss(student, teacher, {**padded(ids, 0, 1), "labels": labels})
    longer = torch.cat([labels, labels.new_full((2, 3), -100)], dim=1)
    assert_close(layerwise_loss(student, teacher, {**padded(ids, 0, 1), "labels": longer}), whole, rel=1e-5)
    filled = longer.masked_fill(longer == -100, 7)
    assert_differs(layerwise_loss(student, teacher, {**padded(ids, 0, 1), "labels": filled}), whole)


def test_labels_are_not_needed() -> None:
    teacher = FAMILIES["bert"].model()
    student, batch = noisy(teacher), batches("bert", teacher, 1)[0]
    with_labels = {**batch, "labels": torch.tensor([77.0, 0.5])}  # no class of the head: it must not be looked at
    assert_close(layerwise_loss(student, teacher, with_labels), layerwise_loss(student, teacher, batch))


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_and_changes_the_compressed_ffns_only(name: str) -> None:
    teacher = FAMILIES[name].model().train()
    first = ffns(teacher)[0].name
    student = noisy(teacher, [first]).train()
    frozen = next(iter(student.parameters())).requires_grad_(False)
    before, whole = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    data = batches(name, teacher, 2)
    result = distil(student, teacher, data, DistilSettings(learning_rate=0.01, steps=25), progress=False)
    assert result.names == (first,)
    assert result.last_loss < 0.5 * result.first_loss
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    trained = {id(p) for p in ffns(student)[0].parameters()}
    claimed = {n for n, p in student.named_parameters(remove_duplicate=False) if id(p) in trained}
    assert changed and changed <= claimed
    assert result.trainable_parameters == ffns(student)[0].num_parameters
    assert all(torch.equal(v, whole[n]) for n, v in teacher.state_dict().items())
    assert all(p.grad is None for model in (student, teacher) for p in model.parameters())
    assert student.training and teacher.training and not frozen.requires_grad
    assert sum(not p.requires_grad for p in student.parameters()) == 1 + sum(
        not p.requires_grad for p in teacher.parameters()
    )


def test_names_choose() -> None:
    teacher = FAMILIES["bert"].model()
    student, last = noisy(teacher), ffns(teacher)[-1].name
    result = distil(student, teacher, batches("bert", teacher), DistilSettings(steps=2), names=[last], progress=False)
    assert result.names == (last,)
    with pytest.raises(FfnkitError, match="no such FFN.*Choose among"):
        distil(student, teacher, batches("bert", teacher), names=["nothing"], progress=False)


def test_nothing_compressed_is_said() -> None:
    teacher = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="no FFN of the student differs"):
        distil(copy.deepcopy(teacher), teacher, batches("bert", teacher), progress=False)


def test_unlike_depths_are_said() -> None:
    shallow, deep = FAMILIES["bert"].config(), FAMILIES["bert"].model()
    shallow.num_hidden_layers = 2
    student = type(deep)(shallow)
    with pytest.raises(FfnkitError, match="differ in depth"):
        layerwise_loss(student, deep, batches("bert", deep, 1)[0])


def test_the_teacher_can_be_freed() -> None:
    teacher = FAMILIES["bert"].model()
    student, data = noisy(teacher), batches("bert", teacher)
    distil(student, teacher, data, DistilSettings(steps=1), progress=False)
    watch = weakref.ref(teacher)
    del teacher
    assert watch() is None


def test_fused_students_keep_their_counts() -> None:
    """The counts of a fused model stay fixed, and its narrow FFNs come closer to the whole ones."""
    import ffnkit as fk

    teacher = FAMILIES["bert"].model()
    student = copy.deepcopy(teacher)
    fk.apply(student, fk.plan(student, fk.Fusion(width=0.5, restarts=1)))
    scales = {name: value.clone() for name, value in student.named_buffers() if name.endswith("scale")}
    result = distil(
        student, teacher, batches("bert", teacher), DistilSettings(learning_rate=0.01, steps=20), progress=False
    )
    assert len(result.names) == 3 and result.last_loss < result.first_loss
    assert len(scales) == 3 and all(torch.equal(student.get_buffer(name), value) for name, value in scales.items())


# Resuming and order -------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Dying:
    """Batches that end in a kill after ``after`` of them."""

    def __init__(self, items: list[Any], after: int) -> None:
        self.items, self.after = items, after

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            if self.after == 0:
                raise Killed
            self.after -= 1
            yield item


@pytest.mark.parametrize("after", [1, 4, 7, 12])
def test_a_kill_changes_nothing(tmp_path: Path, after: int) -> None:
    teacher = FAMILIES["bert"].model()
    data = batches("bert", teacher, 5)
    settings = DistilSettings(learning_rate=0.01, epochs=3, save_every=3, warmup=0.2)
    straight = noisy(teacher)
    whole = distil(straight, teacher, data, settings, progress=False)
    with pytest.raises(Killed):
        distil(noisy(teacher), teacher, Dying(data, after), settings, out_dir=tmp_path / "run", progress=False)
    resumed = noisy(teacher)
    again = distil(resumed, teacher, data, settings, out_dir=tmp_path / "run", progress=False)
    assert again.losses == whole.losses and again.steps == 15
    for (name, p), q in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    teacher = FAMILIES["bert"].model()
    data, settings = batches("bert", teacher), DistilSettings(learning_rate=0.01)
    first, second = noisy(teacher), noisy(teacher)
    distil(first, teacher, data, settings, out_dir=tmp_path, progress=False)
    distil(second, teacher, Dying(data, 0), settings, out_dir=tmp_path, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    teacher = FAMILIES["bert"].model()
    data = batches("bert", teacher)
    distil(noisy(teacher), teacher, data, DistilSettings(steps=1), out_dir=tmp_path, progress=False)
    with pytest.raises(FfnkitError, match="differs in settings"):
        distil(noisy(teacher), teacher, data, DistilSettings(steps=1, eps=1e-3), out_dir=tmp_path, progress=False)
    with pytest.raises(FfnkitError, match="differs in seed"):
        distil(noisy(teacher), teacher, data, DistilSettings(steps=1), seed=3, out_dir=tmp_path, progress=False)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(FfnkitError, match="Remove the file"):
        distil(noisy(teacher), teacher, data, DistilSettings(steps=1), out_dir=tmp_path, progress=False)


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(rows)}


def order(data: Data, start: int, total: int) -> list[list[int]]:
    return [batch["rows"].tolist() for batch in data.batches(start, total)]


def test_examples_come_in_an_order_that_the_seed_fixes() -> None:
    examples = list(range(10))
    straight = order(Data(examples, collate, 4, seed=0), 0, 8)
    assert sorted(sum(straight[:3], [])) == examples == sorted(sum(straight[3:6], []))
    assert straight[:3] != straight[3:6]
    assert order(Data(examples, collate, 4, seed=0), 4, 8) == straight[4:]
    assert order(Data(examples, collate, 4, seed=1), 0, 8) != straight
    assert Data(examples, collate, 4, 0).steps(1.5) == 5


def test_a_shuffling_loader_comes_in_an_order_that_the_seed_fixes() -> None:
    loader = torch.utils.data.DataLoader(list(range(10)), batch_size=4, shuffle=True, collate_fn=collate)
    straight = order(Data(loader, None, 1, seed=0), 0, 8)
    torch.rand(7)
    state = torch.get_rng_state()
    assert order(Data(loader, None, 1, seed=0), 4, 8) == straight[4:]
    assert torch.equal(torch.get_rng_state(), state)
    assert order(Data(loader, None, 1, seed=1), 0, 8) != straight


def test_data_that_cannot_be_counted_or_repeated() -> None:
    with pytest.raises(FfnkitError, match="empty"):
        Data([], None, 1, 0).steps(1)
    endless = Dying([], 0)
    endless.__class__ = type("Endless", (Dying,), {"__len__": None})
    with pytest.raises(FfnkitError, match="Set steps"):
        Data(endless, None, 1, 0).steps(1)


def test_learning_rates() -> None:
    linear = DistilSettings(learning_rate=1.0, warmup=2)
    rates = [learning_rate(linear, step, 10) for step in range(10)]
    assert rates[2] == max(rates) == 1.0 and rates[-1] == pytest.approx(1 / 8)
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and 0 < rates[0] < rates[1] < 1
    constant = DistilSettings(learning_rate=1.0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(10)} == {1.0}


def test_relative_error_of_bf16() -> None:
    teacher = FAMILIES["bert"].model()
    results = [
        distil(noisy(teacher), teacher, batches("bert", teacher), DistilSettings(steps=3, precision=p), progress=False)
        for p in ("fp32", "bf16")
    ]
    first, second = (torch.tensor(r.losses) for r in results)
    assert 0 < relative_error(second, first) < 0.05
