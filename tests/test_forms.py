"""Nothing wrong in silence about checkpoints: dtypes, opening without ffnkit, missing tensors, other weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, NAMES
from methods import EVERY, case_of, slow_but
from safetensors.torch import load_file, save_file
from torch import nn

import ffnkit as fk
from ffnkit.checkpoint import hook
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import load_with_info
from ffnkit.model import probe
from ffnkit.testing.contract import distance
from ffnkit.tune import load_adapter, tuners

FAST = ("bert", "llama", "t5", "clip", "mixtral", "gpt2")
WRITE = {"compact": fk.save, "standard": fk.export}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edited(name: str, method: str) -> Any:
    model = FAMILIES[name].model()
    return fk.apply(model, fk.plan(model, EVERY[method](), data=case_of(name).batches(model)))


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", slow_but(FAST, NAMES))
def test_config_and_tensors_keep_the_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = FAMILIES[name].model().to(dtype)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:1")))
    own, told = model.state_dict(), str(dtype).removeprefix("torch.")
    for form, write in WRITE.items():
        report = write(model, tmp_path / form)
        written = config_of(tmp_path / form)
        parts = [written[key] for key in model.config.sub_configs if written.get(key)]
        assert {each["dtype"] for each in (written, *parts)} == {told}
        stored = load_file(tmp_path / form / "model.safetensors")
        assert all(value.dtype == dtype for key, value in stored.items() if key in own and own[key].dtype == dtype)
        opened = type(model).from_pretrained(tmp_path / form)
        assert opened.dtype == dtype == next(opened.parameters()).dtype
        if form == "standard":
            assert report.dtype == told and (report.output_error is not None or report.recast)


def bfloat16_but(model: Any, kind: str) -> Any:
    model = model.bfloat16()
    chosen = [m for m in model.modules() if kind in type(m).__name__]
    assert chosen
    for module in chosen:
        module.float()
    return model


@pytest.mark.parametrize(("name", "kind"), [("bert", "LayerNorm"), ("llama", "RMSNorm"), ("llama", "Embedding")])
def test_mixed_dtypes_are_stored_as_they_are_and_open_in_that_of_most(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = bfloat16_but(FAMILIES[name].model(), kind)
    other = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    for form, write in WRITE.items():
        report = write(model, tmp_path / form)
        stored = load_file(tmp_path / form / "model.safetensors")
        assert {n for n, v in stored.items() if v.dtype == torch.float32} == other
        assert config_of(tmp_path / form)["dtype"] == "bfloat16" == str(fk.load(tmp_path / form).dtype)[6:]
        if form == "standard":
            assert set(report.recast) == other and str(len(other)) in str(report)
        else:
            assert "stored in another dtype" in caplog.text


def test_parts_of_a_composite_model_say_their_own_dtype(tmp_path: Path) -> None:
    model: Any = FAMILIES["clip"].model().bfloat16()
    model.vision_model.float()
    for form, write in WRITE.items():
        write(model, tmp_path / form)
        written = config_of(tmp_path / form)
        assert (written["text_config"]["dtype"], written["vision_config"]["dtype"]) == ("bfloat16", "float32")


def test_an_export_of_another_dtype_than_the_config_says_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffnkit.checkpoint.export.write_dtypes", lambda *_: None)  # the control
    with pytest.raises(FfnkitError, match="opens in torch.float32"):
        fk.export(FAMILIES["bert"].model().bfloat16(), tmp_path / "out")


# --- without ffnkit ---------------------------------------------------------------------------------------------------

_PLAIN = """
import json, sys
sys.modules["ffnkit"] = None
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
answers = {}
for folder, name in json.loads(sys.stdin.read()):
    for ignore in (False, True):
        try:
            getattr(transformers, name).from_pretrained(folder, ignore_mismatched_sizes=ignore)
            answers[folder] = "opens"
        except Exception as error:
            answers[folder] = answers.get(folder, str(error))
print(json.dumps(answers))
"""


def opened_plainly(folders: list[tuple[str, str]]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN], input=json.dumps(folders), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-500:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


BARRIER = ("svd", "merging", "heads", "prune", "unstructured", "fusion", "calibrated-fusion", "combined")


@pytest.mark.parametrize(
    ("names", "methods"),
    [
        (("llama", "gpt2", "clip", "switch"), BARRIER[:3]),
        *(pytest.param((*NAMES[part::8], "clip"), BARRIER, marks=pytest.mark.slow) for part in range(8)),
    ],
    ids=["some", *map(str, range(8))],
)
def test_no_compact_checkpoint_opens_without_ffnkit(
    names: tuple[str, ...], methods: tuple[str, ...], tmp_path: Path
) -> None:
    folders = []
    for name in names:
        for method in methods:
            try:
                model = edited(name, method)
            except FfnkitError:
                continue  # what a family does not bear
            folder = tmp_path / name / method
            fk.save(model, folder)
            if hook.is_compact(config_of(folder).get("quantization_config")):
                folders.append((str(folder), type(model).__name__))
    assert len({Path(f).parent for f, _ in folders}) == len(set(names))
    control = tmp_path / "control"  # the method named, as in format 1: transformers only warns
    fk.save(edited("llama", "svd"), control)
    written = config_of(control)
    written["quantization_config"]["quant_method"] = "ffnkit"
    (control / "config.json").write_text(json.dumps(written))
    assert fk.load(control) is not None
    vision = tmp_path / "clip" / "svd"
    folders += [(str(vision), cls) for cls in ("CLIPVisionModel", "CLIPTextModel")]
    found = opened_plainly([*folders, (str(control), "LlamaForCausalLM")])
    assert found.pop(str(control)) == "opens"
    assert [folder for folder, why in found.items() if "quant_method" not in why] == []


@pytest.mark.parametrize("method", ["svd", "fusion", "merging", "heads"])
def test_a_part_of_a_composite_model_opens_by_its_own_config(method: str, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"layers": "0-1"} if method == "merging" else {}
    model: Any = FAMILIES["clip-equal"].model()
    data = case_of("clip-equal").batches(model)
    fk.apply(model, fk.plan(model, EVERY[method](**layers), data=data))
    fk.save(model, tmp_path / "whole")
    given = FAMILIES["clip-equal"].inputs(model)
    for cls, key, part in (
        (transformers.CLIPVisionModel, "pixel_values", model.vision_model),
        (transformers.CLIPTextModel, "input_ids", model.text_model),
    ):
        opened: Any = cls.from_pretrained(tmp_path / "whole").eval()
        with torch.no_grad():
            wanted = part(given[key]).pooler_output
            assert torch.equal(opened(given[key]).pooler_output, wanted)
            fk.save(opened, tmp_path / cls.__name__)
            again: Any = fk.load(tmp_path / cls.__name__)
            assert torch.equal(again(given[key]).pooler_output, wanted)
        assert fk.export(opened, tmp_path / f"{cls.__name__}-standard").output_error is not None


def test_the_body_of_an_edited_model_is_saved_by_itself(tmp_path: Path) -> None:
    model = edited("bert", "svd")
    ids = FAMILIES["bert"].inputs(model)
    with torch.no_grad():
        wanted = model.bert(**ids).last_hidden_state
    fk.save(model.bert, tmp_path / "body")
    with torch.no_grad():
        body: Any = fk.load(tmp_path / "body")
        assert torch.equal(body(**ids).last_hidden_state, wanted)


# --- what is missing --------------------------------------------------------------------------------------------------

KEY = "bert.encoder.layer.1.intermediate.dense.weight"


def damaged(folder: Path, out: Path, change: Any) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = next(out.glob("*.safetensors"))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    return out


CHANGES: dict[str, tuple[Any, str]] = {
    "a tensor of the body": (lambda t: t.pop(KEY), KEY),
    "one that is renamed": (
        lambda t: t.update({"other.name": t.pop(KEY)}),
        rf"{KEY}(, and hold other\.name| is described by its config, and not in the file)",
    ),
    "the head": (lambda t: t.pop("classifier.weight"), "classifier.weight"),
    "another shape": (lambda t: t.update({KEY: torch.zeros(3, 16)}), rf"{KEY} is \(3, 16\) .* and \(40, 16\)"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_what_a_checkpoint_lacks_is_refused_by_name(change: str, compact: bool, tmp_path: Path) -> None:
    model: Any = FAMILIES["bert"].model()
    if compact:
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="0")))
    fk.save(model, tmp_path / "whole")
    apply, told = CHANGES[change]
    folder = damaged(tmp_path / "whole", tmp_path / "damaged", apply)
    for cls in (None, transformers.AutoModelForSequenceClassification):
        with pytest.raises(FfnkitError, match=told):
            fk.load(folder) if cls is None else load_with_info(cls, folder, ignore_mismatched_sizes=True)
    load_with_info(transformers.AutoModelForMaskedLM, tmp_path / "whole")  # the control: a new head is none


def test_a_body_may_lack_its_pooler_and_a_classifier_may_not(tmp_path: Path) -> None:
    config = FAMILIES["bert"].config()
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "body")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "whole")
    lost = damaged(tmp_path / "whole", tmp_path / "lost", lambda t: t.pop("bert.pooler.dense.weight"))
    assert type(fk.load(tmp_path / "body")).__name__ == "BertModel"
    with pytest.raises(FfnkitError, match=r"its files lack bert\.pooler\.dense\.weight"):
        fk.load(lost)


@pytest.mark.parametrize(
    ("saved", "opened", "new"),
    [
        ("BertForMaskedLM", "BertForSequenceClassification", {"classifier", "pooler"}),
        ("BertModel", "BertForTokenClassification", {"classifier"}),
        ("CLIPModel", "CLIPForImageClassification", {"classifier"}),
        ("LlamaModel", "LlamaForCausalLM", {"lm_head"}),
    ],
)
def test_a_new_head_is_drawn(saved: str, opened: str, new: set[str], tmp_path: Path) -> None:
    family = next(f for f in FAMILIES.values() if f.model_class.startswith(saved[:4]))
    model = getattr(transformers, saved)(family.config())
    model.save_pretrained(tmp_path / "out")
    _, info = load_with_info(getattr(transformers, opened), tmp_path / "out")
    assert {part for key in info["missing_keys"] for part in key.split(".")} >= new
    there = set(getattr(transformers, opened)(family.config()).state_dict())
    first = next(k for k in model.state_dict() if ".0." in k and any(name.endswith(k) for name in there))
    lost = damaged(tmp_path / "out", tmp_path / "lost", lambda t: t.pop(first))
    with pytest.raises(FfnkitError, match="its files lack"):
        load_with_info(getattr(transformers, opened), lost)


def test_keywords_of_from_pretrained(tmp_path: Path) -> None:
    fk.save(edited("bert", "fusion"), tmp_path / "out")
    with pytest.raises(FfnkitError, match=r"\(3,\) in the file and \(5,\) .*and 1 more.*ignore_mismatched_sizes"):
        fk.load(tmp_path / "out", num_labels=5)
    model: Any = fk.load(tmp_path / "out", num_labels=5, ignore_mismatched_sizes=True, attn_implementation="eager")
    assert model.classifier.out_features == 5 and model.config._attn_implementation == "eager"
    assert fk.load(tmp_path / "out", dtype="bfloat16", output_attentions=True).dtype == torch.bfloat16


def test_a_config_that_names_no_class_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"].model().save_pretrained(tmp_path / "out")
    written = config_of(tmp_path / "out")
    del written["architectures"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(written))
    with pytest.raises(FfnkitError, match="names no class.*LlamaForCausalLM"):
        fk.load(tmp_path / "out")
    assert type(fk.load(tmp_path / "out", architectures=["LlamaForCausalLM"])).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("given", ["some/model", Path("folder"), None, {}], ids=str)
def test_the_name_of_a_model_is_none(given: Any, tmp_path: Path) -> None:
    calls = {
        "inspect": lambda: fk.inspect(given),
        "plan": lambda: fk.plan(given, fk.Fusion(width=0.5)),
        "fold": lambda: fk.fold(given),
        "save": lambda: fk.save(given, tmp_path / "out"),
        "export": lambda: fk.export(given, tmp_path / "out"),
    }
    for name, call in calls.items():
        with pytest.raises(FfnkitError, match=r"Open it first: ffnkit\.load"):
            call()
            pytest.fail(name)


def test_a_model_with_adapters_of_peft_is_not_saved_as_its_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = edited("llama", "fusion")
    for wrapped in (get_peft_model(model, LoraConfig(target_modules=["q_proj"])), model):
        with pytest.raises(FfnkitError, match="adapter of peft"):
            fk.save(wrapped, tmp_path / "out")  # type: ignore[arg-type]
    bare = FAMILIES["llama"].model()
    bare._hf_peft_config_loaded = True  # type: ignore[assignment]
    with pytest.raises(FfnkitError, match="adapter of peft"):
        fk.save(bare, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["lora_A.weight", "lora_B.weight", "classifier.weight", ".0.intermediate"])
def test_an_adapter_that_lacks_tensors_is_refused(lost: str, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    settings = {"name": "lora", "rank": 2, "adapter_dir": tmp_path / "adapter"}
    tuners.finish(tuners.prepare(family.model(), settings), settings)
    load_adapter(family.model(), tmp_path / "adapter")  # the control

    def drop(tensors: dict[str, Any]) -> None:
        chosen = [key for key in tensors if lost in key]
        for key in chosen if lost.startswith(".") else chosen[:1]:
            del tensors[key]

    folder = damaged(tmp_path / "adapter", tmp_path / "damaged", drop)
    with pytest.raises(FfnkitError):
        load_adapter(family.model(), folder)
    if "lora" in lost:
        with pytest.raises(FfnkitError, match=r"alone|adapts"):
            fk.plan(family.model(), fk.DSEE(lora=str(folder), nonzeros=0, targets="ffn"))


# --- plans and the weights that they were made for --------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in EVERY if m not in ("layer-drop", "ffn-drop", "random", "reinit")])
def test_a_plan_is_refused_by_other_weights_of_the_same_shape(method: str, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    plan = fk.plan(model, EVERY[method](), data=case_of("bert").batches(model))
    plan.save(tmp_path / "plan")
    plan = fk.Plan.load(tmp_path / "plan")
    for cast in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fk.apply(family.model().to(cast), plan)  # type: ignore[type-var]
    with pytest.raises(FfnkitError, match="has other weights than the plan was made for"):
        fk.apply(family.model(seed=1), plan)
    fk.apply(family.model(seed=1), replace(plan, weights={}))  # as in older files: the control


@pytest.mark.parametrize("method", ["layer-drop", "ffn-drop", "random", "reinit"])
def test_a_plan_that_no_weights_decided_fits_every_model_of_the_shape(method: str) -> None:
    plan = fk.plan(FAMILIES["bert"].model(), EVERY[method]())
    assert not plan.weights
    fk.apply(FAMILIES["bert"].model(seed=1), plan)


def test_a_plan_of_two_knows_the_weights_before_the_first() -> None:
    model: Any = FAMILIES["bert"].model()
    first = fk.plan(model, fk.RemoveHeads(remove=1))
    fk.apply(model, first)
    both = first.then(fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.apply(FAMILIES["bert"].model(), both)
    with pytest.raises(FfnkitError, match="other weights"):
        fk.apply(FAMILIES["bert"].model(seed=1), both)


# --- probes of an export ----------------------------------------------------------------------------------------------


def test_a_model_that_draws_in_evaluation_is_compared_with_itself() -> None:
    class Noisy(nn.Module):
        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            self.inner: Any = FAMILIES["bert"].model()
            self.config, self.generator = self.inner.config, generator

        def forward(self, input_ids: Any) -> Any:
            out = self.inner(input_ids).logits
            return (out + torch.randn(out.shape, generator=self.generator),)

    noisy = Noisy(torch.Generator().manual_seed(0))
    assert probe.compare(noisy, noisy.inner, 1e-3) == (None, "it gives other outputs each time")
    other: Any = FAMILIES["bert"].model(seed=1)
    gap, why = probe.compare(noisy.inner, other, 1e-3)
    assert gap is not None and gap > 1e-3 and not why  # the control


def test_a_config_that_lacks_what_its_class_does_without() -> None:
    """Speech encoders without a vocabulary run on probe inputs; where none can be made there is nothing to compare."""
    from transformers import AudioFlamingo3Encoder, AudioFlamingo3EncoderConfig

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = AudioFlamingo3Encoder(AudioFlamingo3EncoderConfig(max_source_positions=10, num_mel_bins=8, **small)).eval()
    assert probe.runnable(model) is not None
    assert probe.compare(model, copy.deepcopy(model), 1e-6) == (0.0, "")
    model.config.num_mel_bins = 5
    assert probe.runnable(model) is None
    assert probe.compare(model, model, 1e-6)[0] is None


def test_what_does_not_run_on_probe_inputs_is_exported_and_said(tmp_path: Path) -> None:
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_length=32, num_mel_bins=16
    )
    report = fk.export(transformers.ASTForAudioClassification(config).eval(), tmp_path / "out")
    assert report.output_error is None and "could not be compared (it does not run" in str(report)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    llama = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=50, **small))
    video = transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **small)
    )
    choice = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=50, **small))
    for model in (llama, video, choice):
        assert fk.export(model.eval(), tmp_path / "out").output_error is not None


def test_outputs_are_the_same_in_every_form(tmp_path: Path) -> None:
    """Widths in a list by layer, with activations that count the neurons: padding would change what they keep."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=[24, 24, 32, 32], vocab_size_per_layer_input=50, hidden_size_per_layer_input=4,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=2,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0], altup_num_inputs=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Gemma3nForCausalLM(config).eval()
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    fk.apply(model, fk.plan(model, fk.CalibratedFusion(width=0.5, refine=0), data=[batch]))
    fk.fold(model)
    with torch.no_grad():
        wanted = {"logits": model(**batch).logits}
    for form, write in WRITE.items():
        write(model, tmp_path / form)
        assert config_of(tmp_path / form)["intermediate_size"] == [12, 12, 16, 16]
        opened: Any = transformers.Gemma3nForCausalLM.from_pretrained(tmp_path / form)
        with torch.no_grad():
            assert distance({"logits": opened(**batch).logits}, wanted) < 1e-5


# --- code of its own --------------------------------------------------------------------------------------------------

_CODE = """
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_of_its_own_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffnkit.cli import compressing
    from ffnkit.io import loading

    monkeypatch.setattr(loading, "trust", loading.Trust())
    folder = tmp_path / "own"
    FAMILIES["bert"].model().save_pretrained(folder)
    (folder / "own_model.py").write_text(_CODE)
    written = config_of(folder) | {
        "model_type": "own-bert",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForSequenceClassification": "own_model.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(FfnkitError, match="trust_remote_code=True, or ffnkit --trust-remote-code"):
        fk.load(folder)
    model: Any = fk.load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.save(model, tmp_path / "small")
    again = fk.load(tmp_path / "small", trust_remote_code=True)
    assert distance(FAMILIES["bert"].outputs(again), FAMILIES["bert"].outputs(model)) == 0
    loading.trust.given = True  # what the option of the command line sets
    method: Any = EVERY["magnitude"](width=0.25)
    job = compressing.Compression(str(folder), method, None, "auto", "cpu")
    assert job.run(None, tmp_path / "out", "standard", True)["after"]["ffn_parameters"] > 0
    assert type(fk.load(tmp_path / "out")).__name__ == "OwnModel"
