"""Classifiers of encoder-decoders that transformers has none for: what they compute, saving, tasks and recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from test_recipe_run import outcome
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import ffnkit as fk
from ffnkit import tasks
from ffnkit.errors import FfnkitError
from ffnkit.model.families import classifiers
from ffnkit.recipe import run
from ffnkit.recipe.schema import recipe_from

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 1], [5, 6, 1, 0, 0, 0, 0]])
MASK = (IDS != 0).long()
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "num_labels": 3,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "num_labels": 3, "dropout_rate": 0.0,
}  # fmt: skip
SWITCH = T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
KINDS = {
    "blenderbot": BART, "blenderbot-small": BART, "m2m_100": BART, "marian": BART, "pegasus": BART, "pegasus_x": BART,
    "led": BART | {"attention_window": [4, 4]}, "longt5": T5, "nllb-moe": BART | {"num_experts": 4},
    "switch_transformers": SWITCH,
}  # fmt: skip


def built(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **KINDS[kind] | more)).eval()


@pytest.mark.parametrize(("kind", "settings"), [("t5", T5), ("bart", BART)])
def test_the_head_is_that_of_t5_and_bart(kind: str, settings: dict[str, Any]) -> None:
    """Against the classes that transformers has, with their weights; there the classes register nothing."""
    own = built_as(AutoConfig.for_model(kind, **settings))
    theirs = AutoModelForSequenceClassification.from_config(own.config).eval()
    assert type(theirs).__module__.startswith("transformers.")
    assert not own.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    labels = torch.tensor([0, 2])
    found, wanted = (m(input_ids=IDS, attention_mask=MASK, labels=labels) for m in (own, theirs))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0, atol=1e-6)
    ids = IDS.clone()
    ids[0, 2] = 1  # two ends in one text, one in the other
    with pytest.raises(Exception, match="same number of <eos>"):
        theirs(input_ids=ids, attention_mask=MASK)
    assert torch.equal(own(input_ids=ids, attention_mask=MASK).logits[1], found.logits[1])


def built_as(config: Any) -> Any:
    """Our class for a family that has one."""
    body = transformers.models.auto.modeling_auto.MODEL_MAPPING[type(config)]
    family = next(each for each in body.__mro__[1:] if issubclass(each, transformers.PreTrainedModel))
    torch.manual_seed(0)
    name = type(AutoModelForSequenceClassification.from_config(config)).__name__
    return type(name, (classifiers.OnDecoder, family), {"body": body})(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_a_text_without_an_end(kind: str) -> None:
    model = built(kind)
    assert type(model).__module__ == "ffnkit.model.families.classifiers"
    whole = model(input_ids=IDS, attention_mask=MASK).logits
    alone = model(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3]).logits
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-5)
    endless = IDS[1:].clone()
    endless[0, 2] = 7  # its last token counts then
    assert classifiers.last(endless, MASK[1:], model.config).tolist() == [2]
    assert classifiers.last(endless, None, model.config).tolist() == [2]
    loss = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(whole, torch.tensor([0, 2])))
    assert built(kind, num_labels=1)(input_ids=IDS, labels=torch.tensor([0.5, 1.0])).loss.isfinite()


_FRESH = """
import sys, torch
from pathlib import Path
import transformers as T
folder = Path(sys.argv[1])
known = torch.load(folder / "expected.pt")
for each in known:
    try:
        T.AutoModelForSequenceClassification.from_pretrained(folder / each / "standard")
    except (ValueError, KeyError):
        pass
    else:
        raise AssertionError(f"{each} opens without ffnkit")
import ffnkit as fk
for each, (ids, mask, logits) in known.items():
    forms = [folder / each / form for form in ("compact", "standard")]
    opened = [T.AutoModelForSequenceClassification.from_pretrained(form) for form in forms]
    for model in (*opened, fk.load(folder / each / "compact"), fk.load(folder / each / "standard")):
        found = model.eval()(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(found, logits, atol=1e-5), (each, (found - logits).abs().max())
"""


@pytest.mark.slow
def test_both_forms_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for kind in ("switch_transformers", "marian"):
        model = built(kind)
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="decoder:1")))
        fk.save(model, tmp_path / kind / "compact")
        fk.export(model, tmp_path / kind / "standard")
        assert "import" in (tmp_path / kind / "standard" / "README.md").read_text()
        expected[kind] = (IDS, MASK, model(input_ids=IDS, attention_mask=MASK).logits.detach())
    torch.save(expected, tmp_path / "expected.pt")
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Switch with its language-model head, a tokenizer, and rows that look like CoLA's."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("switch")
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(20)), "cola", "sentence", ":"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(**SWITCH)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder / "model")
    (folder / "cola").mkdir()
    for split, count in (("train", 60), ("validation", 12)):
        rows = [{"sentence": f"w{i % 20} w{i // 20 + 9}", "label": int(i % 3 == 0)} for i in range(count)]
        (folder / "cola" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_recipe_in_the_papers_setting(switch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the pretrained language model to both checkpoint forms; the metric is accuracy, for CoLA too."""
    monkeypatch.setenv("FFNKIT_DATA", str(switch))
    data = {
        "name": "switch", "model": str(switch / "model"), "seeds": [0], "export": "both",
        "task": {"name": "cola", "metric": "accuracy", "template": "cola sentence: {sentence}"},
        "stages": ["compress", "distil", "tune", "evaluate", "export"], "measure": {"latency": False},
        "arms": {"fusion": {"method": "fusion", "width": 0.25, "layers": "encoder:1,decoder:1"}},
        "distil": {"steps": 2, "batch_size": 8}, "limits": {"dev": 10}, "tuner": {"name": "full", "routers": "frozen"},
        "tune": {"preset": "mlp-fusion-switch", "epochs": 1, "batch_size": 16},
    }  # fmt: skip
    recipe = recipe_from(data, "switch")
    tune = recipe.tune_of("fusion")
    assert (tune.betas, tune.warmup, tune.max_grad_norm, tune.learning_rate) == ((0.9, 0.98), 0.8, 0.0, 1e-4)
    results = run(recipe, tmp_path / "out", progress=False, isolate=False)
    assert results.ok, results.rows
    (row,) = results.rows
    assert set(row["metrics"]) == {"accuracy", "matthews"}
    assert row["settings"]["tuner"]["routers"] == "frozen" and outcome(tmp_path / "out")
    model = fk.load(tmp_path / "out" / row["checkpoints"]["compact"])
    assert type(model).__name__ == "SwitchTransformersForSequenceClassification"


def test_templates_of_labelled_texts(switch: Path) -> None:
    task: Any = tasks.choose(name="cola", template="cola sentence: {sentence}")
    tokenizer = task.load_tokenizer(switch / "model")
    rows = task.splits(switch, train_limit=2).train
    (first, _) = task.encode(rows, tokenizer, 16)["input_ids"]
    assert tokenizer.decode(first).startswith("cola sentence : w")
    words: Any = tasks.choose(name="cola", template="cola sentence: {sentence}", head="words")
    assert words.prompts(rows.to_dict(), seq2seq=True)[0].startswith("cola sentence: w")
    for wrong, found in (("{label}", "it names label"), ("text", "it leaves out sentence"), ("{sentence", "braces")):
        with pytest.raises(FfnkitError, match=found):
            tasks.choose(name="cola", template=wrong)
    with pytest.raises(FfnkitError, match="not both will do"):
        tasks.choose(name="e2e", template="{sentence}")


def test_families_that_transformers_classifies_keep_its_classes() -> None:
    for name in ("t5", "bart", "bert"):
        config = FAMILIES[name].config()
        assert type(AutoModelForSequenceClassification.from_config(config)).__module__.startswith("transformers.")


_ORDERS = """
import sys
order = sys.argv[1]
if order == "transformers first":
    from transformers import SwitchTransformersConfig, MarianMTModel
import ffnkit
if order == "models first":
    from transformers import MarianMTModel, SwitchTransformersForConditionalGeneration
from transformers import AutoModelForSequenceClassification as Auto, MarianConfig, SwitchTransformersConfig
for config in (MarianConfig, SwitchTransformersConfig):
    assert Auto._model_mapping[config].__module__ == "ffnkit.model.families.classifiers"
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["transformers first", "models first", "configs first"])
def test_whatever_is_imported_first(order: str) -> None:
    """A config is imported by its model too, in the midst of it."""
    done = subprocess.run([sys.executable, "-c", _ORDERS, order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
