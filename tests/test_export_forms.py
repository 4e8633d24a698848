"""Exports for engines that read a width for each layer, the form that is saved unasked, and tools run with ffnkit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from test_layer_numbers import gemma3n
from tolerance import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit.checkpoint.sizes import best_form, standard_parameters
from ffnkit.cli.executing import ignoring, with_hook
from ffnkit.cli.forms import elsewhere
from ffnkit.cli.program import app
from ffnkit.io.architectures import load_any
from ffnkit.methods import get
from ffnkit.model.finding import ffns
from ffnkit.surgery.meta import rehearse

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TIED = ("bert", "gpt2", "t5")


def ragged(family: str = "llama", widths: tuple[int, ...] = (9, 17), dropped: bool = True) -> PreTrainedModel:
    """A model whose first FFNs have these widths and whose last one gives nothing."""
    model = FAMILIES["llama"].model()
    if family == "qwen2":  # biases on queries, keys and values
        shape = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        config = Qwen2Config(**shape, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    names = [ffn.name for ffn in ffns(model)]
    fk.apply(model, fk.plan(model, fk.Fusion(width=dict(zip(names, widths, strict=False)), restarts=1)))
    if dropped:
        fk.apply(model, fk.plan(model, get("ffn-drop")(layers="2")))
    return model.eval()


def as_engines(folder: Path, *, exact: bool) -> dict[str, tuple[int, ...]]:
    """The shapes that an engine builds: vLLM takes ffn_mult where it is there, else the width."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    shapes: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(config["block_configs"]):
        assert row["attention"]["no_op"] is False
        kv = config["num_attention_heads"] // row["attention"]["n_heads_in_group"]
        layer = f"model.layers.{number}"
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv * config["head_dim"], config["hidden_size"])
        ffn = row["ffn"]
        if ffn["no_op"]:
            continue
        if "ffn_mult" in ffn or not exact:
            width = int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3)
            width = width if width % 256 == 0 else width + 256 - width % 256
        else:
            width = ffn["intermediate_size"]
        shapes[f"{layer}.mlp.down_proj.weight"] = (config["hidden_size"], width)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (config["hidden_size"],)
    return shapes


@pytest.mark.parametrize("multiple", [1, 256])
def test_engines_read_each_layers_width(tmp_path: Path, multiple: int) -> None:
    model = ragged()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fk.export(model, tmp_path / "out", target="nemotron-nas", multiple=multiple)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stored = {name: tuple(value.shape) for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    built = as_engines(tmp_path / "out", exact=multiple == 1)
    kinds = ("k_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight")
    assert {name: shape for name, shape in stored.items() if name.endswith(kinds)} == built
    widths = [shape[1] for name, shape in built.items() if name.endswith("down_proj.weight")]
    assert widths == ([9, 17] if multiple == 1 else [256, 256, 256])  # zeros where llama.cpp would lose attention
    assert ("--multiple 256" in str(report)) == (multiple == 1)
    assert report.padding == (0 if multiple == 1 else 3 * 16 * (3 * 256 - 9 - 17 - 1))


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_plain_transformers_opens_it_with_the_code_beside_it(tmp_path: Path, family: str) -> None:
    model = ragged(family)
    fk.export(model, tmp_path / "out", target="nemotron-nas")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(opened).__module__.startswith("transformers_modules")
    with torch.no_grad():
        assert_close(opened(IDS).logits, model(IDS).logits, rel=1e-5, what="the export")


@pytest.mark.slow
def test_a_family_that_lists_a_width_for_each_layer_is_standard_as_it_is(tmp_path: Path) -> None:
    model, widths = gemma3n(2), [8, 16, 24, 12, 20, 4]
    named = dict(zip((ffn.name for ffn in ffns(model)), widths, strict=True))
    fk.apply(model, fk.plan(model, get("magnitude")(width=named)))
    assert best_form(model) == "standard"
    assert fk.export(model, tmp_path / "out").padding == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == widths and "quantization_config" not in config
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(opened(IDS).logits, model.eval()(IDS).logits, rel=1e-5, what="the export")


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fk.FfnkitError, match="not of LLaMA's shape"):
        fk.export(FAMILIES["gpt2"].model(), tmp_path / "out", target="nemotron-nas")
    with pytest.raises(fk.FfnkitError, match="no such form"):
        fk.export(FAMILIES["gpt2"].model(), tmp_path / "out", target="onnx")  # type: ignore[arg-type]


def test_the_report_tells_padding_and_speeds(tmp_path: Path) -> None:
    model = ragged(dropped=False)
    before = {ffn.name: 30 for ffn in ffns(model)}
    report = fk.export(model, tmp_path / "out", measure=8, before=before)
    assert report.padding == 3 * 16 * (24 - 9 + 24 - 17) == report.parameters - report.compact_parameters
    assert report.speed is not None and set(report.speed.tokens_per_second) == {
        "exported", "original", "uniform", "compact",
    }  # fmt: skip
    said = str(report)
    assert "padding costs" in said and "the original" in said and "plain from_pretrained" in said
    uniform = fk.export(FAMILIES["llama"].model(), tmp_path / "plain", measure=8, multiple=16)
    assert uniform.parameters - uniform.compact_parameters == uniform.padding == 3 * 3 * 16 * 8
    json.dumps(report.to_dict(), default=str)


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (fk.Fusion(width=8, restarts=1), "standard"),  # the factor that stays apart is folded
        (fk.Fusion(width=8, layers="last:1", restarts=1), "compact"),
        (fk.Merging(groups=[["0", "1"]]), "compact"),
    ],
)
def test_the_form_that_is_saved_unasked(method: Any, form: str) -> None:
    model = FAMILIES["llama"].model()
    plan = fk.plan(model, method)
    assert best_form(rehearse(model, plan.edits)) == form
    fk.apply(model, plan)
    assert best_form(model) == form


@pytest.mark.parametrize(
    "family", [*TIED, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES) if name not in TIED)]
)
def test_tied_embeddings_count_once_in_the_standard_form(family: str) -> None:
    model = FAMILIES[family].model()
    assert standard_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_a_compact_checkpoint_folded_on_opening(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    fk.apply(model, fk.plan(model, fk.Fusion(width=8, layers="last:1", restarts=1)))
    fk.save(model, tmp_path / "out")
    opened = fk.load(tmp_path / "out", fold=True).eval()
    assert not any(ffn.special for ffn in ffns(opened))
    with torch.no_grad():
        assert_close(opened(IDS).logits, model.eval()(IDS).logits, rel=1e-5, what="the folded model")
    with pytest.raises(fk.FfnkitError, match="quantized"):
        fk.load(tmp_path / "out", fold=True, quantization_config={"quant_method": "bitsandbytes"})


def test_exec_imports_ffnkit_in_children_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.OTHER = True\n")
    inner = "import sys; print('ffnkit' in sys.modules, OTHER)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    given = {"PATH": "", "PYTHONPATH": f"{tmp_path}:{Path(fk.__file__).parents[1]}"}
    run = [sys.executable, "-c", outer]
    hooked = subprocess.run(run, env=with_hook(dict(given)), capture_output=True, text=True)
    assert hooked.stdout.split() == ["True", "True"], hooked.stderr
    assert subprocess.run(run, env=given, capture_output=True, text=True).stdout.split() == ["False", "True"]


@pytest.mark.parametrize("flags", [["-E"], ["-uI"], ["-S"], ["-W", "ignore", "-E"], ["-Xdev", "-BE"]])
def test_exec_refuses_a_python_that_would_not_import_it(flags: list[str]) -> None:
    for name in ("python", "/usr/bin/python3.11"):
        assert ignoring([name, *flags, "tool.py"]) in ("E", "I", "S")
        given = {"PYTHONPATH": str(Path(fk.__file__).parents[1])}
    run = [sys.executable, *flags, "-c", "import sys; print('ffnkit' in sys.modules)"]
    found = subprocess.run(run, env=with_hook(given), capture_output=True, text=True)
    assert found.stdout.split() == ["False"], "the control: Python does leave it out"
    result = CliRunner().invoke(app, ["exec", "--", "python", *flags, "tool.py"])
    assert result.exit_code == 2 and "Leave that flag out" in result.output


@pytest.mark.parametrize(
    "words",
    [["tool", "-E"], ["python", "tool.py", "-E"], ["python", "-m", "tool", "-I"], ["python", "-c", "1", "-S"]]
    + [["python", "-u", "-WE", "tool.py"], ["python", "-mE"], ["python", "--help-all"], ["python", "-"], ["python"]],
)
def test_flags_of_the_tool_itself_are_its_own(words: list[str]) -> None:
    assert ignoring(words) is None


@pytest.mark.slow
def test_a_tool_run_by_exec_opens_a_compact_checkpoint(tmp_path: Path) -> None:
    fk.save(ragged(), tmp_path / "out")
    (tmp_path / "tool.py").write_text(
        "import sys, transformers\n"
        "print(sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).parameters()))\n"
    )
    words = ["python", str(tmp_path / "tool.py"), str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-m", "ffnkit", "exec", "--", *words], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) > 0, run.stderr
    plain = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert plain.returncode != 0 and "quant_method" in plain.stderr


@pytest.mark.slow
def test_plain_opening_quantizes_a_compact_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    fk.save(ragged(dropped=False), tmp_path / "out")
    asked = BitsAndBytesConfig(load_in_8bit=True)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=asked)
    second = fk.load(tmp_path / "out", quantization_config=asked)
    kinds = [type(m).__name__ for m in first.modules()]
    assert kinds == [type(m).__name__ for m in second.modules()] and "Linear8bitLt" in kinds


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shared_ffns_with_updates_under_a_config_that_ties_the_head(family: str, tmp_path: Path) -> None:
    """An update moves the weights that the FFNs share: what names them as tied finds none of that name."""
    model: Any = FAMILIES[family].model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    fk.apply(model, fk.plan(model, get("merging")(window=2)))
    fk.apply(model, fk.plan(model, fk.SparseGrad(density=0.1, basis="none", choose="random", modules_to_train=())))
    inputs = FAMILIES[family].inputs(model)
    wanted = FAMILIES[family].outputs(model, inputs)
    names = vars(model)["_tied_weights_keys"]
    fk.export(model, tmp_path / "standard")
    assert vars(model)["_tied_weights_keys"] == names
    for key, value in FAMILIES[family].outputs(fk.load(tmp_path / "standard"), inputs).items():
        assert_close(value, wanted[key], rel=1e-5)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("t5", "bart", "xlm-roberta"))]
)
def test_a_head_of_its_own_under_a_config_that_ties_it(family: str, tmp_path: Path) -> None:
    """transformers opens what has both tensors as it is; both forms keep it, and the config says so."""
    model: Any = FAMILIES[family].model()
    inputs = FAMILIES[family].inputs(model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    own = FAMILIES[family].outputs(model, inputs)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(model.get_output_embeddings().weight))
    model.save_pretrained(tmp_path / "source")
    model = load_any(str(tmp_path / "source"))
    fk.apply(model, fk.plan(model, get("magnitude")(width=0.5)))
    wanted = FAMILIES[family].outputs(model, inputs)
    for form, write in (("standard", fk.export), ("compact", fk.save)):
        write(model, tmp_path / form)
        for key, value in FAMILIES[family].outputs(fk.load(tmp_path / form), inputs).items():
            assert_close(value, wanted[key], rel=1e-5)
    tied = json.loads((tmp_path / "standard" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (family not in ("llama", "gpt2", "gemma3"))  # of the others the key is about more tensors
    assert not torch.allclose(own["logits"], wanted["logits"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_exported_where_nothing_of_it_changes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)
    fk.save(ragged(dropped=False), tmp_path / "ragged")
    even = FAMILIES["llama"].model()
    fk.export(fk.apply(even, fk.plan(even, fk.Fusion(width=16, restarts=1))), tmp_path / "even")
    opened = fk.load(tmp_path / "ragged", quantization_config=asked)
    for target in ("standard", "nemotron-nas"):
        with pytest.raises(fk.FfnkitError, match="Export the model from before it was quantized"):
            fk.export(opened, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()
    same = fk.load(tmp_path / "even", quantization_config=asked)
    fk.export(same, tmp_path / "out")
    with pytest.raises(fk.FfnkitError, match="for nemotron-nas: the model is quantized"):
        fk.export(same, tmp_path / "out", target="nemotron-nas")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in same.modules()]


@pytest.mark.parametrize("fold", [False, True])
def test_of_a_compact_folder_is_said_whether_plain_transformers_opens_it(tmp_path: Path, fold: bool) -> None:
    """A factor that stands apart makes neither form smaller, and still only ffnkit opens the folder."""
    model = FAMILIES["llama"].model()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    model = fk.fold(model) if fold else model
    fk.save(model, tmp_path)
    described = "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    said = elsewhere("compact", tmp_path, model)
    assert described is not fold and best_form(model) == "standard"
    assert said.startswith("opens everywhere: ") is fold
    assert (f"ffnkit export {tmp_path} --out DIR for tools without ffnkit" in said) is not fold
