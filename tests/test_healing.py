"""Healing: a compressed model learns from the one that it was; what does not gain is not kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from families import FAMILIES
from family import redraw
from test_cli import bad, bert, good
from torch import nn

import ffnkit as fk
from ffnkit.calibration import shipped
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.settings.amounts import amount
from ffnkit.tasks.models import load_tokenizer
from ffnkit.tune import CalibrationSettings, zeros
from ffnkit.tune.healing import heal as module
from ffnkit.tune.healing.data import healing_data
from ffnkit.tune.healing.loss import Blocks, whole_loss
from ffnkit.tune.healing.masters import Masters
from ffnkit.tune.healing.settings import HealSettings

__all__ = ["bert"]  # a fixture

KINDS = ("llama", "bert", "gpt2", "mixtral", "t5", "bart", "vit")


def settings(**given: Any) -> HealSettings:
    return HealSettings.model_validate({"tokens": 250, "learning_rate": 3e-3, "checks": 4, **given})


def pair(name: str, **how: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A narrowed model, its original, and batches of it."""
    family = FAMILIES[name]
    original: Any = family.model().to(how.pop("dtype", torch.float32))
    model = copy.deepcopy(original)
    fk.apply(model, fk.plan(model, how.pop("method", fk.Fusion(0.5, restarts=1))))
    return model, original, [family.inputs(original, seed=seed) for seed in range(12)]


def kl(model: Any, original: Any, batches: list[Any]) -> float:
    kind = module.kind_of(original, batches[0])
    with torch.no_grad():
        return sum(whole_loss(model, original, batch, kind).item() for batch in batches) / len(batches)


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "blocks") for name in KINDS), *((name, "lora") for name in ("llama", "t5")), ("llama", "whole")],
)
def test_every_family_heals(name: str, how: str) -> None:
    model, original, batches = pair(name)
    more = {"blocks": 0.5 if how == "blocks" else 0.0}
    more |= {"trains": "lora", "learning_rate": 1e-2} if how == "lora" else {}
    before, flags = kl(model, original, batches[:2]), [p.requires_grad for p in model.parameters()]
    weights = copy.deepcopy(original.state_dict())
    found = fk.heal(model, original, batches[2:], settings(**more), held={"held": batches[:2]})
    assert found.kept_at and found.after["held"] < found.before["held"] == pytest.approx(before, rel=1e-4)
    assert kl(model, original, batches[:2]) == pytest.approx(found.after["held"], rel=2e-3)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, weights[key]) for key, value in original.state_dict().items())
    assert bool(found.block_steps) == (how == "blocks")


def test_a_model_without_a_head_learns_hidden_states() -> None:
    family = FAMILIES["bert"]
    torch.manual_seed(0)
    original = transformers.BertModel(family.config()).eval()
    model = copy.deepcopy(original)
    fk.apply(model, fk.plan(model, fk.Fusion(0.5, restarts=1)))
    batches = [family.inputs(original, seed=seed) for seed in range(8)]
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    assert module.kind_of(original, batches[0]) == "states"
    found = fk.heal(model, original, batches, settings())
    assert found.after["held"] < found.before["held"]


def test_what_gains_nothing_is_not_kept() -> None:
    model, original, batches = pair("llama")
    weights = copy.deepcopy(model.state_dict())
    found = fk.heal(model, original, batches, settings(learning_rate=50.0))
    assert not found.kept_at and found.after == found.before and "gained nothing" in str(found)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_worse_on_one_text_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, batches = pair("llama")
    losses = iter([{"in": 1.0, "out": 1.0}, {"in": 0.1, "out": 1.01}, *[{"in": 0.1, "out": 1.2}] * 20])
    monkeypatch.setattr(module._Run, "_held", lambda self: next(losses))
    weights = copy.deepcopy(model.state_dict())
    found = fk.heal(model, original, batches, settings())
    assert not found.kept_at
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("told", "back"), [([1.1, 1.2, 0.9, 0.8], 0), ([1.1, 1.3, 0.9, 0.8], 1), ([float("nan"), 0.9, 0.9, 0.8], 1)]
)
def test_a_state_on_the_way_may_be_worse_and_a_lost_one_is_left(
    told: list[float], back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate falls to nothing in the end, and gains come with its fall; what is far worse, or no number, is left."""
    model, original, batches = pair("llama")
    losses = iter([{"in": 1.0, "out": 1.0}, *({"in": 0.9, "out": loss} for loss in told)])
    monkeypatch.setattr(module._Run, "_held", lambda self: next(losses))
    returns, plain = [], module.Masters.back_to
    monkeypatch.setattr(module.Masters, "back_to", lambda self, best: (returns.append(1), plain(self, best)))
    found = fk.heal(model, original, batches, settings())
    assert len(returns) == back and found.after == {"in": 0.9, "out": 0.8} and len(found.checks) == 5


def test_lost_again_and_again_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, batches = pair("llama")
    losses = iter([{"in": 1.0}, *[{"in": 9.0}] * 20])
    monkeypatch.setattr(module._Run, "_held", lambda self: next(losses))
    found = fk.heal(model, original, batches, settings(checks=10, patience=2))
    assert len(found.checks) == 3 and not found.kept_at and found.tokens < 250


def test_interrupted_it_has_the_best_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, batches = pair("llama")
    flags = [p.requires_grad for p in model.parameters()]
    said = model(**batches[0]).logits.detach()

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    for trains in ("ffn", "lora"):
        with pytest.raises(KeyboardInterrupt):
            fk.heal(model, original, batches, settings(trains=trains), progress=stop)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("lora" in name for name, _ in model.named_modules())
        assert torch.allclose(model(**batches[0]).logits, said, atol=1e-5)  # lora folds factors


@pytest.mark.parametrize("trains", ["ffn", "lora"])
def test_where_nothing_gains_it_says_what_is_left(trains: str) -> None:
    model, original, batches = pair("llama")
    apart = [ffn.special for ffn in ffns(model)]
    found = fk.heal(model, original, batches, settings(trains=trains, learning_rate=1e-12))
    assert apart[0] and not found.kept_at and found.folded == (trains == "lora")
    assert str(found).endswith("as it was, what stood apart folded" if found.folded else "the model is as it was")
    assert [ffn.special for ffn in ffns(model)] == ([{} for _ in apart] if found.folded else apart)


@pytest.mark.parametrize("trains", ["ffn", "lora", "all"])
def test_zeros_stay_zeros_and_ties_stay_ties(trains: str) -> None:
    tied = fk.Merging(groups=((0, 1),), match=False)
    for method in (fk.Prune(0.5), tied):
        model, original, batches = pair("llama", method=method)
        noted = zeros.note(fk.fold(copy.deepcopy(model), masked=True))
        found = fk.heal(model, original, batches, settings(trains=trains))
        assert found.kept_at
        assert len({id(f.module) for f in _ffns(model)}) == len({id(f.module) for f in _ffns(copy.deepcopy(model))})
        now = zeros.note(fk.fold(copy.deepcopy(model), masked=True))
        assert {name: bits.tolist() for name, (bits, _) in now.items()} == {
            name: bits.tolist() for name, (bits, _) in noted.items()
        }
        assert bool(noted) == (method is not tied)


def _ffns(model: nn.Module) -> list[Any]:
    from ffnkit.model.finding import ffns

    return ffns(model)


def test_plain_zeros_stay_too() -> None:
    model, original, batches = pair("bert", method=fk.Prune(0.5))
    fk.fold(model, masked=True)
    noted = zeros.note(model)
    assert noted and fk.heal(model, original, batches, settings()).kept_at
    assert {name: bits.tolist() for name, (bits, _) in zeros.note(model).items()} == {
        name: bits.tolist() for name, (bits, _) in noted.items()
    }


def test_a_model_in_bf16_learns_steps_below_its_grid() -> None:
    model, original, batches = pair("llama", dtype=torch.bfloat16)
    found = fk.heal(model, original, batches, settings(learning_rate=1e-3))
    assert found.after["held"] < found.before["held"] and next(model.parameters()).dtype == torch.bfloat16
    # a hundred steps of 1e-4 move 1.0 by a hundredth; added one by one to bf16 they would be lost
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = Masters([weight], {})
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        masters.step(1e-4, most=1e9)
    assert weight.detach().float().tolist() == pytest.approx([0.99] * 3, abs=4e-3)


def test_a_layer_learns_from_its_own_inputs_alone() -> None:
    """Gradients block by block equal those of a loop that runs each layer on what the original's got."""
    model, original, batches = pair("llama")
    blocks = Blocks(model, original)
    assert len(blocks) == 3
    blocks.learn(batches[0])
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    seen: dict[int, Any] = {}
    handles = [
        layer.register_forward_hook(lambda _, a, k, out, n=n: seen.update({n: (a, k, out)}), with_kwargs=True)
        for n, layer in enumerate(original.model.layers)
    ]
    with torch.no_grad():
        original(**{k: v for k, v in batches[0].items() if k != "labels"}, use_cache=False)
    for handle in handles:
        handle.remove()
    mask = batches[0]["attention_mask"].float()
    for number, layer in enumerate(model.model.layers):
        args, kwargs, wanted = seen[number]
        ours = layer(*args, **kwargs)
        size = (wanted - wanted.mean(-1, keepdim=True)).square().sum(-1) + 1e-6
        (((ours - wanted).square().sum(-1) / size * mask).sum() / mask.sum()).backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(again) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, again, strict=True))


def test_counts_as_people_write_them() -> None:
    for word, count in {"200k": 200_000, "1m": 1_000_000, "1.5M": 1_500_000, "200_000": 200_000, " 7 ": 7}.items():
        assert amount(word) == count
    assert HealSettings.model_validate({"tokens": "2k"}).tokens == 2000
    for wrong in ("k", "1.5", "-3", "200kb", "0", 0, True, 1.5):
        with pytest.raises(ValueError):
            HealSettings.model_validate({"tokens": wrong})


@pytest.mark.parametrize(
    ("tokens", "size", "texts"),
    [("200k", 256, 1), ("1m", 256, 5), ("10m", 256, 32), ("4k", 25, 10), ("200k", 25, 10), ("4k", 1000, 1), (9, 1, 32)],
)
def test_a_step_is_small(tokens: Any, size: float, texts: int) -> None:
    assert HealSettings.model_validate({"tokens": tokens}).texts_a_step(size) == texts
    assert HealSettings.model_validate({"tokens": tokens, "batch_size": 7}).texts_a_step(size) == 7


def test_rows_of_a_task_count_by_their_length(bert: Path) -> None:
    task, tokenizer = fk.tasks.get("sst2"), load_tokenizer(bert)
    model = task.load_model(str(bert), tokenizer=tokenizer)
    for words, least, most in ((1, 32, 32), (28, 8, 9)):  # few short ones would be too small a step
        rows = datasets.Dataset.from_dict({"sentence": [" ".join(["film"] * words)] * 200, "label": [0, 1] * 100})
        own = {"task": task, "rows": rows, "dev": rows}
        parts, held = healing_data(model, tokenizer, settings(tokens=4000), CalibrationSettings(max_length=32), **own)
        assert least <= max(len(batch["input_ids"]) for batch in parts[0][0]) <= most
        assert sum(map(module.size_of, held["sst2"])) >= 600
        parts, held = healing_data(
            model,
            tokenizer,
            settings(tokens=4000),
            CalibrationSettings(max_length=32),
            **own | {"dev": rows.select([])},
        )
        assert held == {} and least <= max(len(batch["input_ids"]) for batch in parts[0][0]) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_step_as_adamw_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    ours = [nn.Parameter(value.clone()) for value in start]
    masters = Masters(ours, {})
    averages = [[torch.zeros_like(value, dtype=torch.float64) for value in start] for _ in range(2)]
    wanted = [value.double() for value in start]
    for number in range(1, 6):
        for parameter in ours:
            parameter.grad = torch.randn_like(parameter) * 0.01
        gradients = [parameter.grad.double() for parameter in ours if parameter.grad is not None]
        masters.step(0.01)
        for first, second, value, gradient in zip(*averages, wanted, gradients, strict=True):
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            value -= 0.01 * (first / (1 - 0.9**number)) / ((second / (1 - 0.95**number)).sqrt() + 1e-8)
    for parameter, value in zip(ours, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value.to(dtype))


def test_refusals() -> None:
    model, original, batches = pair("llama")
    with pytest.raises(FfnkitError, match="too few batches"):
        fk.heal(model, original, batches[:1], settings())
    with pytest.raises(FfnkitError, match="no batches"):
        fk.heal(model, original, [], settings())


def test_adapters_beside_what_keeps_something_of_its_own_are_refused_early(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("compress", small[0], "--method", "calibrated-merging", "--layers", "0-1", "--heal", "2k")
    told = bad(*words, "--heal-set", "trains=lora", "--out", tmp_path / "out")
    assert "or extras=false" in told and "loading" not in told
    with pytest.raises(FfnkitError, match="adapters would give each layer weights"):
        settings(trains="lora").check_beside(fk.CalibratedMerging(layers="0-1"))
    settings(trains="lora").check_beside(fk.CalibratedMerging(layers="0-1", extras=False))
    settings().check_beside(fk.CalibratedMerging(layers="0-1"))


@pytest.mark.slow
def test_adapters_would_part_what_keeps_something_of_its_own() -> None:
    """Members without anything of their own stay shared."""
    _, original, batches = pair("llama")
    model, plain = copy.deepcopy(original), copy.deepcopy(original)
    fk.apply(model, fk.plan(model, fk.CalibratedMerging(layers="0-1", refine=0), data=batches))
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(FfnkitError, match="shared by 2 layers that keep something of their own"):
        fk.heal(model, original, batches, settings(trains="lora"))
    fk.heal(model, original, batches, settings())
    assert sum(p.numel() for p in model.parameters()) == size
    fk.apply(plain, fk.plan(plain, fk.CalibratedMerging(layers="0-1", refine=0, extras=False), data=batches))
    size = sum(p.numel() for p in plain.parameters())
    found = fk.heal(plain, original, batches, settings(trains="lora", learning_rate=1e-3))
    assert found.kept_at and sum(p.numel() for p in plain.parameters()) == size


def test_texts_are_learned_by_their_shares() -> None:
    sizes = {"a": 40, "b": 10}
    parts = [([{"input_ids": torch.full((1, size), ord(name))}] * 3, 0.5) for name, size in sizes.items()]
    order = module._Order(parts, seed=0)
    seen = [order.next()[0]["input_ids"] for _ in range(50)]
    spent = {name: sum(x.numel() for x in seen if int(x[0, 0]) == ord(name)) for name in sizes}
    assert abs(spent["a"] - spent["b"]) <= 40


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small decoder with a tokenizer of pieces of words, and a file of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("decoder")
    plain = Tokenizer(models.BPE(unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "</s>"]
    plain.train_from_iterator(shipped.texts(), trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes)
    model = transformers.LlamaForCausalLM(config)
    redraw(model, seed=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    text = folder / "own.txt"
    # in no order that the text of many kinds has
    words = sorted(word for word in set(" ".join(shipped.texts()).split()) if len(word) < 12)
    drawn = torch.randint(len(words), (200, 40), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text("\n\n".join(" ".join(words[number] for number in row) for row in drawn))
    return folder, text


def test_command_line(small: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = small
    words = ("compress", folder, "--method", "calibrated-fusion", "--set", "width=0.5", "--calibration-tokens", 300)
    words = (*words, "--text", text, "--cost-tokens", 300)
    ran = good(*words, "--heal", "2k", "--heal-set", "learning_rate=0.01", "--out", tmp_path / "out", "--json")
    report = json.loads(ran.stdout)
    stages = report["cost"]["stages"]
    assert list(stages) == ["uncompressed", "compressed", "healed"]
    for place in ("in", "out"):
        assert stages["healed"]["places"][place]["kl"] < stages["compressed"]["places"][place]["kl"]
    assert report["healing"]["kept_at"] and set(report["healing"]["after"]) == {"in", "out"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "own.txt, kept apart" in card and "## How it was healed" in card
    history = json.loads((tmp_path / "out" / "ffnkit.json").read_text())
    assert history["cost"] == report["cost"] and history["healing"]["tokens"] == 2000
    healed = fk.load(tmp_path / "out")
    assert next(healed.parameters()).dtype == torch.bfloat16
    assert "--heal" in good("compress", "--help").stdout
    for wrong, told in {
        ("--heal", "many"): "200k",
        ("--heal-set", "rank=4"): "there is no --heal",
        ("--heal", "2k", "--heal-set", "speed=4"): "speed",
        ("--heal", "2k", "--heal-set", "blocks=2"): "blocks",
        ("--cost-text", "missing.txt"): "no such file",
    }.items():
        assert told in bad(*words, *wrong, "--out", tmp_path / "x"), wrong
    assert "--dry-run" in bad(*words, "--heal", "2k", "--dry-run")
    assert not (tmp_path / "x").exists()


def test_data_of_healing_beside_a_method_that_reads_none(small: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = small
    words = ("compress", folder, "--method", "random", "--set", "width=0.5", "--text", text, "--cost-tokens", 100)
    out = ("--out", tmp_path / "out")
    ran = good(*words, "--heal", "1k", *out, "--plan-out", tmp_path / "p.plan", "--json")
    report = json.loads(ran.stdout)
    assert set(report["healing"]["after"]) == {"in", "out"} and set(report["cost"]["stages"]["healed"]["places"]) == {
        "in",
        "out",
    }
    again = ("compress", folder, "--plan", tmp_path / "p.plan", "--text", text, "--cost-tokens", 100)
    ran = good(*again, "--heal", "1k", "--out", tmp_path / "again", "--json")
    assert set(json.loads(ran.stdout)["healing"]["after"]) == {"in", "out"}
    assert "random uses no data" in bad(*words, "--dry-run")
    assert "random uses no data" in bad(*words[:-1], 0, *out)


def test_images_are_healed_by_a_task(tmp_path: Path) -> None:
    FAMILIES["vit"].model().save_pretrained(tmp_path / "vit")
    words = ("compress", tmp_path / "vit", "--method", "random", "--set", "width=0.5", "--out", tmp_path / "x")
    assert "--heal 1k: it learns from data, no data are given" in bad(*words, "--heal", "1k")
