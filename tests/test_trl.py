"""TRL: tuning and preferences on compressed models; the reference is never the model from before the compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import ffnkit as fk
from ffnkit import tune
from ffnkit.checkpoint.companions import write_companions
from ffnkit.surgery.compressed import UNSAVED

FIRST = 0.6931  # of a policy that is its reference: -log sigmoid(0)
TEXTS = [f"Once upon a time there was a cat number {i}. It was happy and sad." for i in range(8)]
COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
    "max_length": 48, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(models_dir: Path) -> Path:
    return models_dir / "stories260K"


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = fk.load(source)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    return Path(fk.save(model, tmp_path_factory.mktemp("trl") / "small"))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def preferences(model: Any, source: Path, out: Path, **settings: Any) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"Once there was a {i} ", "chosen": "cat. It was.", "rejected": "dog of and."} for i in range(8)]
    arguments = DPOConfig(output_dir=str(out), **COMMON, **settings)
    assert arguments.bf16  # TRL's default
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = Dataset.from_list(rows)
    return losses(DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer))


def prepared(model: Any, source: Path, name: str) -> tuple[Any, Any]:
    """A model with a tuner's updates, chosen on a few texts."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    tuner = tune.get(name)
    return tuner.prepare(model, [{"input_ids": each, "labels": each} for each in ids]), tuner


def test_an_edited_model_no_longer_names_its_source(source: Path, small: Path, tmp_path: Path) -> None:
    model = fk.load(source)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    assert model.config._name_or_path == UNSAVED and model.name_or_path == str(source)
    write_companions(model, tmp_path, None)  # which still know it
    assert (tmp_path / "tokenizer.json").is_file()
    assert str(source) not in (small / "config.json").read_text()
    whole = fk.load(source)
    with pytest.raises(ValueError):
        fk.apply(whole, fk.plan(model, fk.Fusion(width=0.25)))
    assert whole.config._name_or_path == str(source)  # nothing was applied
    updated, _ = prepared(fk.load(source), source, "sparsegrad")
    assert updated.config._name_or_path == str(source)  # updates begin as nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_preferences_begin_at_the_compressed_model(source: Path, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    first, *later = preferences(fk.load(small), source, tmp_path / "saved")
    assert first == pytest.approx(FIRST, abs=1e-4) and later[-1] < first
    model = fk.load(source)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    with pytest.raises(OSError, match="edited in memory"):  # the source as its reference would be wrong
        preferences(model, source, tmp_path / "memory")
    first, *later = preferences(model, source, tmp_path / "precomputed", precompute_ref_log_probs=True)
    assert first == pytest.approx(FIRST, abs=1e-4) and later[-1] < first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sparsegrad", "dsee"])
def test_updates_in_bf16(source: Path, small: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tuner = prepared(fk.load(small), source, name)
    first, *later = preferences(model, source, tmp_path / "dpo", precompute_ref_log_probs=True)
    assert first == pytest.approx(FIRST, abs=1e-4) and later[-1] < first
    done = tuner.finish(model)
    fk.save(done, tmp_path / "aligned", tokenizer=AutoTokenizer.from_pretrained(source))
    model, tuner = prepared(fk.load(tmp_path / "aligned"), source, name)
    arguments = SFTConfig(output_dir=str(tmp_path / "sft"), **COMMON)
    assert arguments.bf16
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = Dataset.from_dict({"text": TEXTS})
    found = losses(SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer))
    assert found[-1] < found[0]
    done = tuner.finish(model)
    fk.save(done, tmp_path / "tuned")
    told = done.state_dict()  # its forward is still accelerate's, in bf16
    assert all(value.equal(told[key]) for key, value in fk.load(tmp_path / "tuned").state_dict().items())
