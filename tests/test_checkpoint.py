"""Saving, loading, exporting: shared FFNs, other heads, Trainer checkpoints, damaged files, kills and full disks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tolerance import assert_close, assert_differs
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns


def bert(seed: int = 0, layers: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=layers, intermediate_size=24, vocab_size=50
    )
    return BertForSequenceClassification(config).eval()


def narrow(layers: str = "last:2", **more: Any) -> BertForSequenceClassification:
    model = bert(**more)
    return fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers=layers)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 23).view(2, 10)).logits


def tied() -> BertForSequenceClassification:
    """Layers 0 and 2 share one FFN."""
    model = bert()
    layers = model.bert.encoder.layer
    layers[2].intermediate.dense, layers[2].output.dense = layers[0].intermediate.dense, layers[0].output.dense
    return model


# --- forms --------------------------------------------------------------------------------------------------------


def test_a_uniform_folded_model_needs_no_hook(tmp_path: Path) -> None:
    model = fk.fold(narrow("all"))
    assert model.config.intermediate_size == 12 and not hasattr(model.config, "quantization_config")
    fk.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 12 and "quantization_config" not in config


def test_an_unfolded_model_writes_an_impossible_width(tmp_path: Path) -> None:
    fk.save(narrow("all"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 1 and config["quantization_config"]["compact"] == "ffnkit"


@pytest.mark.parametrize("fused", [False, True])
def test_shared_ffns_are_stored_once_and_reload_shared(tmp_path: Path, fused: bool) -> None:
    model = tied()
    if fused:
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="0")))
    fk.save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if "intermediate.dense.weight" in n]  # noqa: SIM118 (no mapping)
    assert len(names) == 2
    again = fk.load(tmp_path / "out")
    assert_close(logits(again), logits(model), rel=1e-6)
    layers = again.bert.encoder.layer
    assert layers[0].intermediate.dense.weight is layers[2].intermediate.dense.weight
    assert layers[0].output.dense.weight is layers[2].output.dense.weight
    assert len(ffns(again)) == 2 and len({id(p) for p in again.parameters()}) == len(list(again.parameters()))
    fk.save(again, tmp_path / "second")
    assert_close(logits(fk.load(tmp_path / "second")), logits(model), rel=1e-6)


def test_shared_ffns_are_written_out_in_the_standard_form(tmp_path: Path) -> None:
    model = tied()
    report = fk.export(model, tmp_path / "out")
    assert report.bytes > report.compact_bytes
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(logits(plain), logits(model), rel=1e-6)
    assert len(ffns(plain)) == 3


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = narrow()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    report = fk.export(model, tmp_path / "out")
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config
    assert report.padded == ("bert.encoder.layer.1", "bert.encoder.layer.2")


def test_a_body_takes_a_head_and_goes_on(tmp_path: Path) -> None:
    body = AutoModel.from_config(bert().config)
    fk.apply(body, fk.plan(body, fk.Fusion(width=0.5, layers="last:2")))
    fk.save(body, tmp_path / "body")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)
    expected = logits(model)
    fk.save(model, tmp_path / "head")
    assert_close(logits(fk.load(tmp_path / "head")), expected, rel=1e-6)
    assert_close(logits(fk.fold(model)), expected, rel=1e-5)
    back = AutoModel.from_pretrained(tmp_path / "head")
    assert [f.width for f in ffns(back)] == [24, 12, 12]
    fk.fold(back)


def test_a_loaded_compact_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = narrow()
    fk.save(model, tmp_path / "out")
    again = fk.load(tmp_path / "out")
    assert not getattr(again, "hf_quantizer", None) and not getattr(again, "is_quantized", False)
    assert again.to(torch.bfloat16).dtype == torch.bfloat16
    assert fk.load(tmp_path / "out", dtype=torch.float64).dtype == torch.float64
    fk.apply(fk.fold(again), fk.plan(again, fk.Fusion(width=6)))
    assert [f.width for f in ffns(again)] == [6, 6, 6]


def test_a_trainer_saves_resumes_and_reloads_a_compact_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.arange(3, 13), "labels": torch.tensor(i % 2)} for i in range(8)]

    def run(folder: str, steps: int, resume: bool = False) -> BertForSequenceClassification:
        model = narrow()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            learning_rate=1e-2,
            use_cpu=True,
            logging_strategy="no",
            lr_scheduler_type="constant",
        )
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume or None)
        return model

    whole = run("whole", 4)
    run("parts", 2)
    assert_close(logits(run("parts", 4, resume=True)), logits(whole), rel=1e-6)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert_close(logits(reloaded), logits(whole), rel=1e-6)
    assert_differs(logits(whole), logits(narrow()), what="training changed nothing")


def test_tokenizer_generation_config_and_card_travel_along(tmp_path: Path, models_dir: Path) -> None:
    model = fk.load(models_dir / "stories260K")
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:2")))
    for name, write in (("compact", fk.save), ("standard", fk.export)):
        write(model, tmp_path / name)
        present = set(os.listdir(tmp_path / name))
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= present


_PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM
assert "ffnkit" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.load(folder + ".in")).logits, folder + ".out")
assert "ffnkit" not in sys.modules
"""


@pytest.mark.slow  # test_contract.py does it for small models of each kind
def test_pretrained_decoders_open_in_a_fresh_process_without_ffnkit(tmp_path: Path, models_dir: Path) -> None:
    """A LLaMA (gated) and a GPT-2 (Conv1D), fused in all layers and in the last two."""
    expected = {}
    for name in ("stories260K", "gpt_nano_sort"):
        for layers in ("all", "last:2"):
            model = fk.load(models_dir / name)
            ids = torch.arange(6).repeat(2, 1) % 3
            fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers=layers)))
            folder = tmp_path / f"{name}-{layers.replace(':', '')}"
            fk.export(model, folder)
            torch.save(ids, f"{folder}.in")
            with torch.no_grad():
                expected[folder] = model(ids).logits
    subprocess.run([sys.executable, "-c", _PLAIN, *map(str, expected)], check=True, timeout=120)
    for folder, logits_here in expected.items():
        assert_close(torch.load(f"{folder}.out"), logits_here, rel=1e-6, what=folder.name)


def test_quantized_weights_compose_with_the_hook(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = fk.fold(narrow())
    fk.save(model, tmp_path / "float")
    quantized = fk.load(tmp_path / "float", quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    weight = quantized.bert.encoder.layer[2].intermediate.dense.weight
    assert type(weight).__name__ == "Int8Tensor" and weight.shape == (12, 16)
    assert_close(logits(quantized), logits(model), rel=0.1)
    fk.save(quantized, tmp_path / "int8")
    assert_close(logits(fk.load(tmp_path / "int8")), logits(quantized), rel=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_in_one_line(tmp_path: Path) -> None:
    fk.save(narrow(), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(FfnkitError) as error:
        fk.load(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_nan_weights_are_not_saved(tmp_path: Path) -> None:
    fk.save(narrow(), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = narrow(seed=1)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("inf")
    for write in (fk.save, fk.export):
        with pytest.raises(FfnkitError, match=r"classifier\.weight"):
            write(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_plans_reject_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    for content in (b"", b"no plan"):
        path.write_bytes(content)
        with pytest.raises(FfnkitError, match="cannot be read"):
            fk.Plan.load(path)
    with pytest.raises(FfnkitError, match="cannot be read"):
        fk.Plan.load(tmp_path / "missing")


def test_a_plan_prints_what_becomes_of_each_ffn() -> None:
    model = bert()
    plan = fk.plan(model, fk.Fusion(width=0.5, layers="last:2"))
    text = str(plan)
    assert "bert.encoder.layer.1  16 x 24  ->  12 neurons" in text and "layer.0" not in text
    before = sum(p.numel() for p in model.parameters())
    fk.apply(model, plan)
    assert sum(p.numel() for p in model.parameters()) == before - plan.saved_parameters
    assert f"{before - plan.saved_parameters:,} parameters" in text


def test_a_compressed_decoder_still_generates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    prompt = torch.arange(3, 9)[None]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    fk.save(model, tmp_path / "out")
    again = fk.load(tmp_path / "out")
    assert torch.equal(again.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert copy.deepcopy(again).generate(prompt, max_new_tokens=6, do_sample=False).shape == expected.shape


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    model: Any = bert()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FfnkitError, match="format"):
        fk.load(tmp_path)


def test_an_export_that_gives_other_outputs_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffnkit.model.probe.compare", lambda *_: (0.5, ""))
    with pytest.raises(FfnkitError, match="outputs differ"):
        fk.export(bert(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
