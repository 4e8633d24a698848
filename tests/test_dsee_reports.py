"""Forgetting on neutral text, zeros in the tables, and results in the fields of PEFT's method comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_recipe_run import recipe_of, run, tiny
from torch.nn import functional

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.recipe.state import unit_of
from ffnkit.report.columns import cells
from ffnkit.report.forgetting import forgetting, kind_of, language_model, neutral_loss
from ffnkit.report.peft_comparison import main, to_peft_comparison, write_peft_comparison
from ffnkit.report.table import summarize

TEXTS = ["the film was very good", "the plot was cold and the cast was bad", "nice music"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT, the same as a masked and as a causal language model, and a neutral text."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    base = tiny(tmp_path_factory.mktemp("reports"))
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    tokenizer = tokens(base)
    masked = BertForMaskedLM(BertConfig(vocab_size=25, max_position_embeddings=32, **sizes))
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=25, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    for name, model in (("masked", masked), ("causal", causal)):
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    (base / "neutral.txt").write_text("\n\n".join(TEXTS * 3))
    return base


def tokens(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def opened(folder: Path, name: str) -> Any:
    found = language_model(str(folder / name))
    assert not isinstance(found, str)
    return found


# Forgetting ----------------------------------------------------------------------------------------------------------


def test_a_causal_loss_is_that_of_a_slow_loop(folder: Path) -> None:
    model, tokenizer = opened(folder, "causal"), tokens(folder)
    assert kind_of(model) == "causal"
    losses = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids).logits[0]
            losses += [-float(functional.log_softmax(logits[i], -1)[ids[0, i + 1]]) for i in range(len(ids[0]) - 1)]
    wanted = sum(losses) / len(losses)
    for size in (1, 2, 16):  # padding changes nothing
        assert neutral_loss(model, tokenizer, TEXTS, batch_size=size) == pytest.approx(wanted, rel=1e-5)
    assert neutral_loss(model, tokenizer, TEXTS[:1]) != pytest.approx(wanted, rel=1e-3)  # the control
    assert neutral_loss(model, tokenizer, TEXTS, limit=1) == pytest.approx(neutral_loss(model, tokenizer, TEXTS[:1]))


def test_a_masked_loss_asks_for_the_same_places_each_time(folder: Path) -> None:
    model, tokenizer = opened(folder, "masked").train(), tokens(folder)
    assert kind_of(model) == "masked"
    one = neutral_loss(model, tokenizer, TEXTS)
    assert one == neutral_loss(model, tokenizer, TEXTS) and model.training  # without dropout
    assert one != neutral_loss(model, tokenizer, TEXTS, seed=1)
    assert one == pytest.approx(neutral_loss(model, tokenizer, TEXTS, batch_size=1), rel=1e-5)
    assert 0.5 * math.log(25) < one < 2 * math.log(25)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    neutral_loss(model, tokenizer, TEXTS)
    hidden = (seen[0] == tokenizer.mask_token_id).sum(1)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert hidden.tolist() == [max(1, round(0.15 * length)) for length in lengths]
    special = torch.isin(seen[0], torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert int(special.sum()) == 2 * len(TEXTS)  # these are never hidden


def test_long_texts_are_cut_and_short_room_is_refused(folder: Path) -> None:
    model, tokenizer = opened(folder, "masked"), tokens(folder)
    assert neutral_loss(model, tokenizer, [" ".join(TEXTS * 20)], max_length=8) > 0
    with pytest.raises(FfnkitError, match="no room"):
        neutral_loss(model, tokenizer, TEXTS, max_length=2)
    with pytest.raises(FfnkitError, match="no token"):
        neutral_loss(model, tokenizer, [])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_heads_have_no_such_loss(folder: Path, name: str) -> None:
    with pytest.raises(FfnkitError, match="no language-model head"):
        neutral_loss(FAMILIES[name].model(), tokens(folder), TEXTS)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_body_below_a_task_head_is_read_by_the_bases_own_head(folder: Path, kind: str) -> None:
    from transformers import AutoModelForSequenceClassification

    tokenizer, base = tokens(folder), str(folder / kind)
    tuned = AutoModelForSequenceClassification.from_pretrained(base)
    found = forgetting(base, tuned, tokenizer, TEXTS)
    assert found["before"] == neutral_loss(opened(folder, kind), tokenizer, TEXTS)
    assert found["after"] == pytest.approx(found["before"], rel=1e-6)  # an untuned body forgot nothing
    fk.apply(tuned, fk.plan(tuned, fk.RemoveHeads(remove=1)))
    fk.apply(tuned, fk.plan(tuned, fk.Fusion(width=0.5, restarts=1)))
    pruned = forgetting(base, tuned, tokenizer, TEXTS)
    assert pruned["before"] == found["before"] and pruned["after"] != found["after"]
    assert tuned.base_model is getattr(tuned, tuned.base_model_prefix)  # it still has its body


def test_where_there_is_no_head_a_note_says_so(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tuned = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    found = forgetting(str(folder / "model"), tuned, tokens(folder), TEXTS)
    assert found["before"] is found["after"] is None and "no language-model head" in found["note"]


def test_a_language_model_is_measured_as_it_is(folder: Path) -> None:
    base, tokenizer = str(folder / "causal"), tokens(folder)
    tuned = opened(folder, "causal")
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight.mul_(3)
    found = forgetting(base, tuned, tokenizer, TEXTS)
    assert found["after"] == neutral_loss(tuned, tokenizer, TEXTS) != found["before"]


@pytest.mark.slow
def test_recipes_measure_it(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "stages": ["tune", "evaluate"],
        "arms": {"full": {"tuner": "full"}, "head": {"tuner": "head"}},
        "measure": {"latency": False},
        "tune": {"learning_rate": 3e-3, "steps": 3, "batch_size": 8, "max_length": 16, "keep_best": False},
    }
    masked = str(folder / "masked")
    assert run(recipe_of(folder, **changes, model=masked, forgetting=str(folder / "neutral.txt")), tmp_path / "out").ok
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    full, head = (row["neutral_loss"] for row in rows)
    assert full["before"] == head["before"] and head["after"] == pytest.approx(head["before"], rel=1e-6)
    assert abs(full["after"] - full["before"]) > 1e-4
    assert "forgetting" in (tmp_path / "out" / "table.md").read_text()
    (folder / "other.txt").write_text("bad cast")
    for path, words in (("other.txt", "of another recipe"), ("none.txt", "forgetting: data file")):
        with pytest.raises(FfnkitError, match=words):
            run(recipe_of(folder, **changes, model=masked, forgetting=str(folder / path)), tmp_path / "out")
    with pytest.raises(FfnkitError, match="measured in the stage evaluate"):
        recipe_of(folder, **{**changes, "stages": ["tune"]}, forgetting=str(folder / "neutral.txt"))
    plain = recipe_of(folder, **changes)
    assert "forgetting" not in plain.to_dict()  # so that facts about earlier runs stay what they were


# Tables --------------------------------------------------------------------------------------------------------------


def row(arm: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "metrics": {"accuracy": 0.5}, "parameters": 10, **more}


def test_zeros_and_forgetting_have_columns_where_an_arm_has_them() -> None:
    rows = [
        row("whole", neutral_loss={"before": 2.0, "after": 2.5}),
        row("half", zeros=0.5, zeros_merged=0.4, neutral_loss={"before": 2.0, "after": 1.9}),
        row("other", neutral_loss={"before": None, "after": None, "note": "no head"}),
    ]
    header, lines = cells(summarize(rows, "accuracy"))
    at = {name: header.index(name) for name in ("zeros (merged)", "forgetting")}
    assert [line[at["zeros (merged)"]] for line in lines] == ["–", "50.0% (40.0%)", "–"]
    assert [line[at["forgetting"]] for line in lines] == ["+0.5000", "-0.1000", "–"]
    assert "Forgetting was not measured: no head." in summarize(rows, "accuracy").notes
    plain = [row("whole"), row("heads", zeros=0.0, zeros_merged=0.0)]  # heads leave no zeros
    assert not {"zeros (merged)", "forgetting"} & set(cells(summarize(plain, "accuracy"))[0])


# PEFT's fields -------------------------------------------------------------------------------------------------------

# What the results of PEFT's method comparison hold (method_comparison/MetaMathQA/utils.py).
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN_INFO = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
    "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
    "autocast_adapter_dtype", "generation_kwargs", "attn_implementation",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "out"
    prune = {"prune": {"method": "prune", "sparsity": 0.5}}
    arms = {
        "full": {"tuner": "full"},
        "lora": {"tuner": {"name": "lora", "rank": 2}, "tune": {"steps": 2}},
        "dsee": {"tuner": {"name": "dsee", "rank": 2}, **prune},
    }
    stages = ["tune", "prune", "recover", "evaluate"]
    assert run(recipe_of(folder, stages=stages, arms=arms, measure={"latency": False}), out).ok
    return out


def test_every_field_is_one_of_pefts_and_none_is_made_up(finished: Path, tmp_path: Path) -> None:
    paths = write_peft_comparison(finished, tmp_path)
    assert [path.name for path in paths] == ["full-seed0.json", "lora-seed0.json", "dsee-seed0.json"]
    rows = {row["arm"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    for path in paths:
        found = json.loads(path.read_text())
        arm = rows[path.name.removesuffix("-seed0.json")]
        assert set(found) == {"run_info", "train_info", "meta_info", "ffnkit"}
        assert set(found["run_info"]) <= RUN_INFO and set(found["train_info"]) <= TRAIN_INFO
        assert set(found["meta_info"]) <= META_INFO and set(found["run_info"]["train_config"]) <= TRAIN_CONFIG
        assert not {"accelerator_memory_max", "file_size"} & set(found["train_info"])  # they mean other things there
        assert found["train_info"]["num_trainable_params"] == arm["trainable_parameters"]
        assert found["train_info"]["status"] == "success" and found["run_info"]["error_msg"] == ""
        assert found["train_info"]["metrics"][-1]["test accuracy"] == arm["metrics"]["accuracy"]
        assert found["train_info"]["metrics"][0]["valid accuracy"] == arm["dev_metric"]
        assert found["ffnkit"]["flops_per_token"] == arm["flops_per_token"]
        assert found["meta_info"]["package_info"]["peft-version"] == arm["versions"]["peft"]
    full, lora, dsee = (json.loads(path.read_text()) for path in paths)
    assert full["run_info"]["peft_config"] is None and "peft_config" not in dsee["run_info"]
    assert lora["run_info"]["peft_config"]["r"] == 2 and lora["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert lora["run_info"]["train_config"]["max_steps"] == 2  # the arm's own
    assert dsee["ffnkit"]["pruning"]["sparsity"]["zeros"] == pytest.approx(0.5, abs=1e-3)


def test_peft_reads_the_lora_config(finished: Path) -> None:
    from peft import LoraConfig

    content = json.loads((finished / "results.json").read_text())
    config = to_peft_comparison(content["rows"][1], content["recipe"])["run_info"]["peft_config"]
    assert LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"}).r == 2


@pytest.mark.slow
def test_the_script(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished), "--out", str(tmp_path / "out")]) == 0
    assert "3 files" in capsys.readouterr().out and len(list((tmp_path / "out").iterdir())) == 3
    assert main([str(tmp_path), "--out", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().err
    assert "results.json" in said and said.count("\n") == 1 and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_failed_rows_say_so(finished: Path) -> None:
    content = json.loads((finished / "results.json").read_text())
    broken = content["rows"][0] | {"status": "failed", "error": "no memory", "metrics": {}, "dev_metric": None}
    found = to_peft_comparison(broken, content["recipe"])
    assert found["train_info"]["status"] == "failed" and found["train_info"]["metrics"] == []
    assert found["run_info"]["error_msg"] == "no memory"
    assert unit_of(finished, "full", 0).done  # the row was a copy
