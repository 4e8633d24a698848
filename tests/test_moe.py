"""Mixtures of experts end to end: routers, fused experts, tuning, checkpoints, and what inspect leaves out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, NAMES
from safetensors.torch import load_file, save_file
from test_tune import assert_same, killed_at
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tolerance import assert_close, assert_differs, relative_error
from torch import nn
from transformers import PreTrainedTokenizerFast

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.analysis import errors
from ffnkit.calibration.hooks import Activations
from ffnkit.cli.tuning import merged
from ffnkit.errors import FfnkitError
from ffnkit.model.experts import router_parameters, routers
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.tasks import Task
from ffnkit.tasks.classification.label_words import WordsTask
from ffnkit.tasks.rows.splitting import Source
from ffnkit.tune import DistilSettings, TrainSettings, distil, tuners
from ffnkit.tune.lora import targets

ROUTERS = {
    "switch": ["encoder.block.1.layer.1.mlp.router", "decoder.block.1.layer.2.mlp.router"],
    "mixtral": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "olmoe": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    "qwen2-moe": ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"],
    "qwen3-moe": ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"],
    "granitemoe": ["model.layers.0.block_sparse_moe.router", "model.layers.1.block_sparse_moe.router"],
    "llama4": ["model.layers.1.feed_forward.router"],
    "aria": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"],
    "gpt-oss": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"],
}
MOE = list(ROUTERS)
FEW: dict[str, Any] = {"fusion": {"restarts": 1}}  # what makes plans quick


def routed(model: nn.Module) -> list[FFN]:
    """The FFNs that a router chooses among."""
    return [ffn for ffn in ffns(model) if ffn.active < 1]


def empty(name: str) -> nn.Module:
    """A family's model without weights."""
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, FAMILIES[name].model_class)(FAMILIES[name].config())
    return model


def state(model: nn.Module, names: Any) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


# Routers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_routers_are_found(name: str) -> None:
    model = FAMILIES[name].model()
    assert list(routers(model)) == ROUTERS[name]
    inside = {id(p) for ffn in ffns(model) for p in ffn.parameters()}
    assert not inside & {id(p) for p in router_parameters(model).values()}


def test_what_is_no_router() -> None:
    shared = [n for n, _ in FAMILIES["qwen2-moe"].model().named_modules() if n.endswith("shared_expert_gate")]
    assert shared, "the control: a gate that weighs one expert and chooses none"
    assert all("shared" not in name for name in ROUTERS["qwen2-moe"])
    dense = [name for name in NAMES if name not in MOE and name != "qwen2-moe-equal"]
    assert {name: list(routers(empty(name))) for name in dense} == {name: [] for name in dense}


@pytest.mark.parametrize("method", ["fusion", "random", "unstructured"])
@pytest.mark.parametrize("name", MOE)
def test_compression_leaves_the_routers(method: str, name: str) -> None:
    model = FAMILIES[name].model()
    before = state(model, router_parameters(model))
    layers = [id(module) for module in routers(model).values()]
    fk.apply(model, fk.plan(model, methods.build(method, width=0.25, **FEW.get(method, {}))))
    assert [id(module) for module in routers(model).values()] == layers
    assert all(torch.equal(value, before[key]) for key, value in state(model, before).items())


def routes(model: nn.Module, name: str, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What every router gives."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: found.update({path: list(output)})

    handles = [module.register_forward_hook(keep(path)) for path, module in routers(model).items()]
    FAMILIES[name].outputs(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MOE)
def test_routes_are_equal_at_the_first_fused_layer(name: str) -> None:
    model = FAMILIES[name].model()
    batch = FAMILIES[name].inputs(model)
    first = routed(model)[0]
    before = routes(model, name, batch)
    layers = f"{first.stack}:{first.layer}" if first.stack else str(first.layer)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.25, layers=layers, restarts=1)))
    after = routes(model, name, batch)
    here, *later = before
    assert all(torch.equal(a, b) for a, b in zip(after[here], before[here], strict=True))
    for path in later:  # the control: what comes behind the narrow layer gets other tokens
        assert any(not torch.equal(a, b) for a, b in zip(after[path], before[path], strict=True))


def outputs_of(ffn: FFN, x: torch.Tensor) -> torch.Tensor:
    """(E, n, d) what each expert of a 3-D parameter gives for the same tokens."""
    from ffnkit.calibration.hooks import expert_forward

    return torch.stack([expert_forward(ffn, ffn.module, e, x)[2] for e in range(ffn.experts)])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama4", "aria"])
def test_experts_keep_their_numbers(name: str) -> None:
    model = FAMILIES[name].model()
    x = torch.randn(64, ffns(model)[0].d, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [outputs_of(ffn, x) for ffn in ffns(model) if ffn.experts]
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.75, restarts=1)))
        after = [outputs_of(ffn, x) for ffn in ffns(model) if ffn.experts]
    for old, new in zip(before, after, strict=True):
        errors = [[relative_error(n, o) for o in old] for n in new]
        nearest = [row.index(min(row)) for row in errors]
        assert nearest == list(range(len(old)))


# Tuners --------------------------------------------------------------------------------------------------------------


@cache
def halved(name: str) -> fk.Plan:
    return fk.plan(FAMILIES[name].model(), fk.Fusion(width=0.5, restarts=1))


def step(name: str, tuner: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model after one step of gradient descent under a tuner, and its weights before."""
    family = FAMILIES[name]
    model = fk.apply(family.model(), halved(name))
    flags = [p.requires_grad for p in model.parameters()]
    batch = family.inputs(model)
    tuned = tuners.prepare(model, tuner)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    tuned(**batch).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.grad is not None and parameter.requires_grad:
                parameter.sub_(0.5 * parameter.grad)
    merged = tuners.finish(tuned, tuner)
    assert [p.requires_grad for p in merged.parameters()] == flags
    return merged, before


TUNERS = [("full", "trained"), ("ffn", "frozen"), ("lora", "frozen")]  # with the setting that each has by default


@pytest.mark.parametrize("name", ["switch", "mixtral", "qwen2-moe", "llama4", "aria"])
@pytest.mark.parametrize(("tuner", "default"), TUNERS)
def test_routers_train_or_stay(tuner: str, default: str, name: str) -> None:
    assert tuners.get(tuner).routers == default
    for setting in ("trained", "frozen"):
        model, _ = step(name, {"name": tuner, "routers": setting})
        start = FAMILIES[name].model()
        names = list(router_parameters(model))
        assert names == list(router_parameters(start))
        same = [torch.equal(value, state(start, names)[key]) for key, value in state(model, names).items()]
        assert all(same) if setting == "frozen" else not any(same)


@pytest.mark.parametrize("asked", ["ffn", "attention", "all"])
@pytest.mark.parametrize("name", MOE)
def test_adapters_leave_the_routers(name: str, asked: str) -> None:
    model = FAMILIES[name].model()
    tuned = tuners.prepare(model, {"name": "lora", "targets": asked})
    trained = {id(p) for p in fk.trainable_parameters(tuned)}
    fixed = [module for path, module in tuned.get_base_model().named_modules() if path in ROUTERS[name]]
    assert len(fixed) == len(ROUTERS[name])
    assert not trained & {id(p) for module in fixed for p in module.parameters()}


def test_adapters_on_routers_when_asked() -> None:
    pattern = r".*\.router\.classifier"
    assert len(targets(FAMILIES["switch"].model(), pattern)[0]) == len(ROUTERS["switch"])
    model, _ = step("switch", {"name": "lora", "targets": pattern})
    start = FAMILIES["switch"].model()
    changed = [n for n, p in router_parameters(model).items() if not torch.equal(p, start.get_parameter(n))]
    assert len(changed) == len(ROUTERS["switch"])


@pytest.mark.parametrize("tuner", ["full", "ffn", "lora"])
def test_a_setting_without_routers_is_refused(tuner: str) -> None:
    model = FAMILIES["llama"].model()
    default = dict(TUNERS)[tuner]
    other = "frozen" if default == "trained" else "trained"
    with pytest.raises(FfnkitError, match="has no router"):
        tuners.prepare(model, {"name": tuner, "routers": other})
    tuners.finish(tuners.prepare(model, {"name": tuner, "routers": default}))


def test_the_option_of_the_command_line() -> None:
    assert merged({"routers": "frozen"}, ["rank=4"], "--tuner-set") == {"routers": "frozen", "rank": 4}
    with pytest.raises(FfnkitError, match="--tuner-set routers=trained"):
        merged({"routers": "frozen"}, ["routers=trained"], "--tuner-set")


# The whole chain -----------------------------------------------------------------------------------------------------

FOODS, PLACES = ("rice", "soup", "bread", "fish"), ("river", "park", "city", "hill")
TEXTS = [f"{food} is {word} at the {place}" for food in FOODS for place in PLACES for word in ("good", "bad")]
WORDS = sorted({word for text in TEXTS for word in text.split()} | {"taste", "text", "label", ":"})


def taste() -> WordsTask:
    rows = {"text": TEXTS, "label": [int("good" in text) for text in TEXTS]}
    source = Source(rows, None, "here")
    names = {"label_names": ("bad", "good"), "load": lambda _: source}
    return WordsTask(Task("taste", "classification", ("text",), "label", ("accuracy",), "accuracy", "here", **names))


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


TOKENIZER = tokenizer()
CHAIN = ["switch", "mixtral", "llama4"]


def small(name: str, dropout: float = 0.0) -> Any:
    """A model of the family for the words of the task."""
    family = FAMILIES[name]
    special = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more: dict[str, Any] = {"decoder_start_token_id": 0, "dropout_rate": dropout} if name == "switch" else {}
    config = family.config_class(**{**family.config_args, **special, **more})
    torch.manual_seed(0)
    return getattr(transformers, family.model_class)(config).eval()


def fit(name: str, out: Path, model: Any = None, **more: Any) -> Any:
    tuner = {"name": "full", "routers": more.pop("routers", "trained")}
    settings = TrainSettings(**{"learning_rate": 0.02, "batch_size": 8, "steps": 3, "max_length": 32, **more})
    splits = taste().splits(dev=8)
    model = fused(name) if model is None else model
    return tune.train(model, TOKENIZER, taste(), splits, settings, tuner=tuner, seed=1, out_dir=out, progress=False)


def fused(name: str, width: float = 0.25) -> Any:
    model = small(name, dropout=0.1)
    return fk.apply(model, fk.plan(model, fk.Fusion(width=width, restarts=1)))


def inputs(model: Any) -> dict[str, torch.Tensor]:
    batch = TOKENIZER(TEXTS[:4], return_tensors="pt", padding=True, return_token_type_ids=False)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return batch | ({"decoder_input_ids": batch["input_ids"].clone()} if model.config.is_encoder_decoder else {})


WORKER = """
import sys
from pathlib import Path
root = Path(sys.argv[1])
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
for case in sorted(root.iterdir()):
    batch = load_file(case / "inputs.safetensors")
    kind = getattr(transformers, (case / "class").read_text())
    with torch.no_grad():
        logits = kind.from_pretrained(case / "standard").eval()(**batch).logits
    save_file({"standard": logits}, case / "plain.safetensors")
assert "ffnkit" not in sys.modules
import ffnkit as fk
for case in sorted(root.iterdir()):
    batch = load_file(case / "inputs.safetensors")
    with torch.no_grad():
        save_file({"compact": fk.load(case / "compact").eval()(**batch).logits}, case / "own.safetensors")
"""


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compressed, tuned with frozen routers and saved in both forms, by family."""
    root, runs = tmp_path_factory.mktemp("chains"), tmp_path_factory.mktemp("runs")
    results = {}
    for name in CHAIN:
        results[name] = fit(name, runs / name, routers="frozen", keep_best=False)
        model, folder = results[name].model, root / name
        batch = inputs(model)
        folder.mkdir()
        (folder / "class").write_text(type(model).__name__)
        save_file(batch, folder / "inputs.safetensors")
        with torch.no_grad():
            save_file({"logits": model(**batch).logits}, folder / "logits.safetensors")
        fk.save(model, folder / "compact", tokenizer=TOKENIZER)
        fk.export(model, folder / "standard", tokenizer=TOKENIZER)
    return {name: (result, root / name) for name, result in results.items()}


@pytest.fixture(scope="module")
def reopened(chains: dict[str, Any]) -> None:
    """A fresh process has opened all of them, without ffnkit and with it."""
    source = str(Path(fk.__file__).parents[1])
    command = [sys.executable, "-c", WORKER, str(chains[CHAIN[0]][1].parent)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow  # test_contract.py does it for fused experts that are not tuned
@pytest.mark.parametrize("name", CHAIN)
def test_the_chain_comes_back_in_a_fresh_process(name: str, chains: dict[str, Any], reopened: None) -> None:
    _, folder = chains[name]
    expected = load_file(folder / "logits.safetensors")["logits"]
    assert_close(load_file(folder / "own.safetensors")["compact"], expected, rel=1e-5)
    assert_close(load_file(folder / "plain.safetensors")["standard"], expected, rel=1e-5)


@pytest.mark.parametrize("name", CHAIN)
def test_the_chain_comes_back(name: str, chains: dict[str, Any]) -> None:
    result, folder = chains[name]
    assert any(ffn.scale is not None for ffn in ffns(result.model)), "the counts are still apart after tuning"
    expected = load_file(folder / "logits.safetensors")["logits"]
    untuned = fused(name).eval()
    with torch.no_grad():  # the control: three steps are seen
        assert_differs(untuned(**inputs(untuned)).logits, expected, rel=1e-2)
    for form in ("compact", "standard"):
        again = fk.load(folder / form).eval()
        with torch.no_grad():
            assert_close(again(**inputs(again)).logits, expected, rel=1e-5, what=form)
        here = tune.evaluate(again, TOKENIZER, taste(), taste().splits(dev=8).report, max_length=32)
        there = tune.evaluate(result.model, TOKENIZER, taste(), taste().splits(dev=8).report, max_length=32)
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("name", CHAIN)
def test_frozen_routers_stay_bit_for_bit(name: str, chains: dict[str, Any], tmp_path: Path) -> None:
    tuned, start = chains[name][0].model, small(name)
    names = list(router_parameters(start))
    before = state(start, names)
    assert names and all(torch.equal(value, before[key]) for key, value in state(tuned, names).items())
    moved = {key for key, p in tuned.named_parameters() if key not in names and key in dict(start.named_parameters())}
    experts = {key for key in moved if "expert" in key}
    assert experts, "the control: experts train"
    trained = fit(name, tmp_path, keep_best=False, weight_decay=0.01).model
    assert not any(torch.equal(value, before[key]) for key, value in state(trained, names).items())
    assert all(p.requires_grad for p in tuned.parameters()), "the flags are as before"


@pytest.mark.parametrize("name", ["switch", "mixtral"])
def test_a_killed_run_ends_with_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"save_every": 2, "eval_every": 3, "keep_best": False, "routers": "frozen"}
    whole = fit(name, tmp_path / "whole", **more)
    killed_at(3, monkeypatch, lambda: fit(name, tmp_path / "killed", **more))
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    assert_same(fit(name, tmp_path / "killed", **more).model, whole.model)


@pytest.mark.parametrize("objective", ["layers", "logits", "both"])
@pytest.mark.parametrize("name", ["switch", "mixtral"])
def test_distillation_runs_and_leaves_the_routers(name: str, objective: str) -> None:
    teacher = small(name)
    student = copy.deepcopy(teacher)
    fk.apply(student, fk.plan(student, fk.Fusion(width=0.25, restarts=1)))
    before = state(student, router_parameters(student))
    batch = inputs(student)
    settings = DistilSettings(objective=objective, learning_rate=5e-3, steps=12)
    result = distil(student, teacher, [batch], settings, seed=0)
    assert result.losses[-1] < result.losses[0]
    assert all(torch.equal(value, before[key]) for key, value in state(student, before).items())


# The losses of the routers -------------------------------------------------------------------------------------------


def test_the_routers_own_loss_trains_as_in_transformers_and_is_not_reported() -> None:
    model = small("mixtral")
    batch = inputs(model)
    labels = batch["input_ids"]
    plain = model(**batch, labels=labels).loss
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0
    model.router_aux_loss_coef = 1.0
    assert model(**batch, labels=labels).loss > plain + 0.5, "the control: it is in the loss of training"
    task, rows = taste(), taste().splits(dev=8).report
    found = tune.evaluate(model, TOKENIZER, task, rows, max_length=32)["loss"]
    model.config.output_router_logits = False
    assert found == pytest.approx(tune.evaluate(model, TOKENIZER, task, rows, max_length=32)["loss"], rel=1e-5)


# Widths that the grouped product refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch tries the product without numbers in one
@pytest.mark.parametrize("name", ["mixtral", "aria"])
def test_experts_of_any_width_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers' default product of experts wants rows of a multiple of 16 bytes."""
    family = FAMILIES[name]
    model = family.model().to(dtype)
    model.set_experts_implementation("grouped_mm")
    batch = family.inputs(model)
    plan = fk.plan(model, fk.CalibratedFusion(width=0.25, refine=0, sequential=True), data=[batch])
    assert model.get_experts_implementation()[""] == "grouped_mm", "planning changes nothing"
    applied = fk.apply(copy.deepcopy(model), plan)
    assert {ffn.width for ffn in ffns(applied)} == {6}
    expected = family.outputs(applied, batch)["logits"]
    applied.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):  # the control
        applied(**batch)
    applied.set_experts_implementation("eager")
    fk.save(applied, tmp_path / "compact")
    folded = fk.fold(copy.deepcopy(applied))
    fk.save(folded, tmp_path / "folded")
    report = fk.export(applied, tmp_path / "standard")
    assert report.padded and json.loads((tmp_path / "standard" / "config.json").read_text())["intermediate_size"] == 8
    for form in ("compact", "folded", "standard"):
        again = fk.load(tmp_path / form).eval()
        assert again.get_experts_implementation()[""] == ("grouped_mm" if form == "standard" else "eager")
        exact = 1e-5 if dtype == torch.float32 else 3e-2
        assert_close(family.outputs(again, batch)["logits"], expected, rel=exact, what=form)


# Layouts and what is left out ----------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50, "num_hidden_layers": 2, "pad_token_id": 0}


def longcat() -> nn.Module:
    more = {"ffn_hidden_size": 24, "expert_ffn_hidden_size": 8, "n_routed_experts": 4, "zero_expert_num": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    sizes = {**TINY, "num_hidden_layers": 4, "num_layers": 2, "moe_topk": 2, **more, **ranks}
    return transformers.LongcatFlashModel(transformers.LongcatFlashConfig(**sizes))


def test_inspect_names_experts_that_it_leaves_out() -> None:
    model = longcat()
    found = fk.inspect(model)
    (left,) = found.left_out
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert left.name == "layers.*.mlp.experts" and left.count == 2
    assert left.shapes == {"gate_up_proj": (6, 16, 16), "down_proj": (4, 16, 8)}
    assert left.parameters == sum(p.numel() for p in experts) and left.share == left.parameters / found.parameters
    assert "left out: 2 x layers.*.mlp.experts (gate_up_proj 6 x 16 x 16, down_proj 4 x 16 x 8)" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["left_out"][0]["why"] == "experts of a form that is not known"


def test_inspect_names_pairs_and_norms_that_it_leaves_out() -> None:
    model = FAMILIES["bert"].model()
    assert fk.inspect(model).left_out == () and "left out" not in str(fk.inspect(model))
    model.extra = nn.ModuleDict({"first": nn.Linear(16, 48), "second": nn.Linear(48, 16)})
    (left,) = fk.inspect(model).left_out
    assert left.name == "extra" and set(left.shapes) == {"first.weight", "second.weight"}
    model.extra = nn.ModuleDict({"fc1": nn.Linear(16, 48), "norm": nn.LayerNorm(48), "fc2": nn.Linear(48, 16)})
    (left,) = fk.inspect(model).left_out
    assert left.name == "extra" and "norm" in left.why and set(left.shapes) == {"fc1.weight", "fc2.weight"}
    model.extra = nn.ModuleDict({"fc1": nn.Linear(16, 48), "norm": nn.LayerNorm(16), "fc2": nn.Linear(48, 16)})
    assert fk.inspect(model).left_out == (), "the control: no norm in between, so it is an FFN"


def test_nothing_of_the_known_families_is_left_out() -> None:
    left = {name: [str(each) for each in fk.inspect(empty(name)).left_out] for name in NAMES}
    assert {name: each for name, each in left.items() if each} == {}


def test_gate_and_up_take_turns_where_a_family_says_so() -> None:
    config = transformers.GptOssConfig(
        **TINY, intermediate_size=8, head_dim=8, num_key_value_heads=2, num_local_experts=4
    )
    experts = transformers.GptOssModel(config).layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 16, 16) and experts.down_proj.shape == (4, 8, 16)
    neurons = ffns(experts)[0].read()
    assert neurons.gate is not None and neurons.gate_bias is not None
    assert neurons.gate.equal(experts.gate_up_proj.mT[:, ::2]) and neurons.up.equal(experts.gate_up_proj.mT[:, 1::2])
    assert neurons.gate_bias.equal(experts.gate_up_proj_bias[:, ::2])
    experts.is_concatenated = True
    halves = ffns(experts)[0].read()
    assert halves.up.equal(experts.gate_up_proj.mT[:, 8:]), "the control"
    experts.down_proj_bias = nn.Parameter(experts.down_proj_bias[:, 1:])
    with pytest.raises(FfnkitError):  # one that is no bias of this weight
        ffns(experts)


def test_shared_experts_of_inkling_have_a_gate() -> None:
    from transformers.models.inkling.modeling_inkling import InklingSharedExperts

    config = transformers.InklingTextConfig(hidden_size=16, moe_intermediate_size=12, n_shared_experts=2)
    owner = InklingSharedExperts(config)
    torch.manual_seed(0)
    for parameter in owner.parameters():
        nn.init.normal_(parameter, std=0.3)
    (ffn,) = ffns(nn.ModuleDict({"shared_experts": owner}))
    assert (ffn.layout.name, ffn.gated, ffn.experts, ffn.width) == ("gated experts apart", True, 2, 12)
    assert ffn.num_parameters == sum(p.numel() for p in owner.parameters())
    assert ffn.active == 1, "every token passes"
    x, gammas = torch.randn(1, 5, 16), torch.rand(1, 5, 2)
    check_gate(ffn, lambda: owner(x, gammas))


def check_gate(ffn: FFN, run: Any) -> None:
    """(up, down) may trade a factor, of either sign; (gate, down) may not."""
    import dataclasses

    neurons = ffn.read().map(torch.clone)
    assert neurons.gate is not None
    with torch.no_grad():
        expected = run()
        bias = None if neurons.up_bias is None else -2 * neurons.up_bias
        ffn.write(dataclasses.replace(neurons, up=-2 * neurons.up, up_bias=bias, down=-0.5 * neurons.down))
        assert_close(run(), expected, rel=1e-5)
        bias = None if neurons.gate_bias is None else -2 * neurons.gate_bias
        ffn.write(dataclasses.replace(neurons, gate=-2 * neurons.gate, gate_bias=bias, down=-0.5 * neurons.down))
        assert_differs(run(), expected, rel=0.1)


def test_the_audio_of_phi_4_has_its_gate_second() -> None:
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP

    torch.manual_seed(0)
    config = transformers.Phi4MultimodalAudioConfig(hidden_size=16, intermediate_size=24)
    owner = Phi4MultimodalAudioMLP(config).eval()
    (ffn,) = ffns(owner)
    assert ffn.layout.up_first and torch.equal(ffn.read().up, owner.gate_up_proj.weight[:24])
    x = torch.randn(1, 5, 16)
    check_gate(ffn, lambda: owner(x))
    read = owner.layer_norm(x)[0]
    there = errors._output(ffn, Activations(read, read[:, :0], read), lambda _: owner.act_fn)
    assert_close(there, owner(x)[0], rel=1e-5, what="computed apart")
    from ffnkit.surgery.writer import resize

    with torch.no_grad():  # another width goes back in the same order
        before = owner(x)
        ffn.write(ffn.read())
        resize(ffn, ffn.read().take(torch.arange(24).flip(0)))
        assert_differs(owner(x), torch.zeros_like(before))
        check_gate(ffn, lambda: owner(x))
