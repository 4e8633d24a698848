"""Attention heads: where they lie in every family, and that removing them equals zeroing them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, GPT2
from family import Expect, Family
from methods import slow_but
from tolerance import assert_close, assert_differs, relative_error
from torch import nn

import ffnkit as fk
from ffnkit import methods
from ffnkit.edits import Mask, UpdateLinear
from ffnkit.edits.heads import keep_heads
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.heads import RemoveHeads, by_unit, removal
from ffnkit.model import probe
from ffnkit.model import trainable as parts
from ffnkit.model.attention import ROLES, Attention, attention_linears, attentions, places
from ffnkit.model.inspect import inspect
from ffnkit.model.linear import is_transposed, own_weight
from ffnkit.nn.pruned_attention import kept_heads
from ffnkit.plans import Plan
from ffnkit.surgery.description import description
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.surgery.writer import ModelWriter

INSEPARABLE = ("olmo2", "olmoe")  # a norm over the queries of all heads
ROTATES_IN_FLOAT32 = ("llama4",)
# Families whose config holds the width of a head apart: one number of heads in all layers needs no description.
STANDARD = (
    "phi", "starcoder2", "nemotron", "llama", "llama-bias", "mistral", "olmo", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3", "phi3", "glm", "granite", "smollm3", "cohere", "lfm2", "ernie4-5", "vit", "deit", "umt5", "mixtral",
    "qwen2-moe", "qwen2-moe-equal", "qwen3-moe", "granitemoe", "llama4", "aria", "gpt-oss", "phi3-8",
    "umt5-4", "apertus",
)  # fmt: skip


def _more(name: str, source: str, **more: Any) -> Family:
    family = FAMILIES[source]
    return dataclasses.replace(family, name=name, config_args=family.config_args | more)


# More heads, and the ways of laying them that the small families leave out.
WIDE = {
    family.name: family
    for family in (
        _more("bert-4", "bert", num_attention_heads=4),
        _more("deberta-4", "deberta", num_attention_heads=4),
        _more("deberta-v2-keys", "deberta-v2", num_attention_heads=4, share_att_key=False),
        _more("mpnet-4", "mpnet", num_attention_heads=4),
        _more("gpt2-4", "gpt2", n_head=4),
        _more("bigcode-4", "gpt-bigcode", n_head=4),
        _more("bigcode-all", "gpt-bigcode", n_head=4, multi_query=False),
        _more("codegen-8", "codegen", n_head=8, n_embd=32, rotary_dim=4),
        _more("neox-4", "gpt-neox", num_attention_heads=4),
        _more("bloom-4", "bloom", n_head=4),
        _more("falcon-4", "falcon", num_attention_heads=4),
        _more("falcon-all", "falcon", num_attention_heads=4, multi_query=False),
        _more(
            "falcon-new", "falcon", num_attention_heads=8, num_kv_heads=4, new_decoder_architecture=True, hidden_size=32
        ),
        _more("llama-8", "llama", num_attention_heads=8, num_key_value_heads=4),
        _more("phi3-8", "phi3", num_attention_heads=8, num_key_value_heads=4, hidden_size=32),
        _more("t5-4", "t5", num_heads=4, num_decoder_layers=2),
        _more("umt5-4", "umt5", num_heads=4, num_decoder_layers=2),
        Family(
            "mpt", "MptForCausalLM",
            {"d_model": 16, "n_heads": 4, "n_layers": 3, "vocab_size": 99, "max_seq_len": 30, "expansion_ratio": 2},
            (Expect(3, 32),),
        ),
    )
}  # fmt: skip
SEPARABLE = [name for name in FAMILIES if name not in INSEPARABLE]
ALL = {**FAMILIES, **WIDE}
EACH = pytest.mark.parametrize("name", [*SEPARABLE, *WIDE])
NONE_GOES = ("codegen",)  # its heads go by blocks of four, and it has four
BLOCKS = ("codegen", "codegen-8")
RAGGED = [name for name in [*SEPARABLE, *WIDE] if name not in NONE_GOES]
EACH_RAGGED = pytest.mark.parametrize("name", RAGGED)
# Each way of laying heads: apart, fused in all orders, shared keys and values, two stacks, experts, images.
LAYINGS = (
    "bert", "bert-4", "gpt2", "bigcode-4", "codegen-8", "neox-4", "bloom-4", "falcon-4", "falcon-new", "llama-8",
    "phi3-8", "t5-4", "umt5-4", "deberta-v2-keys", "bart", "mixtral", "clip", "albert", "lfm2",
)  # fmt: skip


def exact(name: str) -> float:
    return 1e-6 if name in ROTATES_IN_FLOAT32 else 1e-12


def zero_columns(attention: Attention, index: torch.Tensor) -> None:
    """The output linear takes nothing of these units any more."""
    linear = attention.linear("o")
    columns = attention.columns()[attention.members(index)["q"]].flatten()
    with torch.no_grad():
        linear.weight[(columns,) if is_transposed(linear) else (slice(None), columns)] = 0


def kept_units(attention: Attention, number: int) -> torch.Tensor:
    """The units that stay of the number-th attention, another one goes each time; all where none can."""
    count = attention.units
    if count - 1 < 1 or (attention.multiple > 1 and attention.heads <= attention.multiple):
        return torch.arange(count)
    gone = {(number + i) % count for i in range(attention.multiple)}
    return torch.tensor([unit for unit in range(count) if unit not in gone])


def gone_units(attention: Attention, stay: torch.Tensor) -> torch.Tensor:
    return torch.tensor([unit for unit in range(attention.units) if unit not in stay.tolist()], dtype=torch.long)


def ragged_plan(model: nn.Module) -> Plan:
    """One unit less in each attention but the second, another one each time."""
    edits = []
    for number, attention in enumerate(attentions(model)):
        stay = kept_units(attention, number)
        if number != 1 and len(stay) < attention.units:
            edits.append(removal(attention, stay))
    return plan_of(model, edits)


def plan_of(model: nn.Module, edits: list[Any]) -> Plan:
    return Plan("test", {}, type(model).__name__, tuple(edits), {}, sum(p.numel() for p in model.parameters()))


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy in which the heads that a plan removes give nothing."""
    other = copy.deepcopy(model)
    found = {attention.name: attention for attention in attentions(other)}
    for edit in plan.edits:
        zero_columns(found[edit.target], gone_units(found[edit.target], edit.index))
    return other


def compare(family: Family, first: nn.Module, second: nn.Module, rel: float) -> None:
    one, two = family.outputs(first), family.outputs(second)
    for key, value in two.items():
        assert_close(one[key], value, rel=rel, what=f"{family.name} {key}")


def differ(family: Family, first: nn.Module, second: nn.Module) -> None:
    one, two = family.outputs(first), family.outputs(second)
    assert any(relative_error(one[key], two[key]) > 1e-3 for key in two), family.name


# Where heads lie -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *WIDE])
def test_every_family_has_attention(name: str) -> None:
    model = ALL[name].model()
    found = attentions(model)
    assert found
    reasons = {attention.why for attention in found}
    assert reasons == ({"q_norm.weight works on all heads together"} if name in INSEPARABLE else {""})
    inside = {id(p) for attention in found for role in (*ROLES, "o") for p in attention.linear(role).parameters()}
    left = [n for n in attention_linears(model) if id(model.get_submodule(n).weight) not in inside]
    follow = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")
    assert [n for n in left if not n.endswith(follow) and "vision_model.head" not in n] == [], "linears without a role"


@EACH
def test_permuted_heads_give_the_same_outputs(name: str) -> None:
    family = ALL[name]
    original = family.model().double()
    model, broken = copy.deepcopy(original), copy.deepcopy(original)
    for attention in attentions(model):
        order = torch.arange(attention.units).roll(1)
        keep_heads(ModelWriter(model), attention, attention.members(order))
    compare(family, model, original, exact(name))
    for attention in attentions(broken):  # the control: queries alone
        rows = attention.rows("q")
        weight = own_weight(attention.linear("q"))
        with torch.no_grad():
            weight[rows.flatten()] = weight[rows.roll(1, 0).flatten()].clone()
    differ(family, broken, original)


@pytest.mark.parametrize("order", ["stacked", "interleaved", "grouped", "blocks"])
def test_the_rows_of_a_fused_linear_are_each_named_once(order: Any) -> None:
    counts = {
        "q": 8,
        "k": 4 if order in ("grouped", "stacked") else 8,
        "v": 4 if order in ("grouped", "stacked") else 8,
    }
    found = places(order, ROLES, counts, 3)
    every = torch.cat([found[role].flatten() for role in ROLES])
    assert every.sort().values.tolist() == list(range(sum(counts.values()) * 3))


# Removing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_heads_of_some_go_by_blocks(name: str) -> None:
    model = ALL[name].model()
    assert all(attention.multiple > 1 for attention in attentions(model))
    assert (not ragged_plan(model).edits) == (name in NONE_GOES)


@EACH_RAGGED
def test_removing_equals_zeroing(name: str) -> None:
    family = ALL[name]
    model = family.model().double()
    plan = ragged_plan(model)
    assert plan.edits
    expected, original = zeroed(model, plan), copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    fk.apply(model, plan)
    compare(family, model, expected, max(1e-10, exact(name)))
    differ(family, model, original)
    assert sum(p.numel() for p in model.parameters()) == before - plan.saved_parameters
    others = [dataclasses.replace(edit, index=(edit.index + 1) % edit.units) for edit in plan.edits]
    differ(family, zeroed(original, plan_of(original, others)), model)  # the control: other heads


@pytest.mark.parametrize("name", ["bert-4", "gpt2-4", "bloom-4", "t5-4", "umt5-4", "phi3-8", "falcon-new", "mpnet-4"])
def test_heads_go_twice(name: str) -> None:
    family = ALL[name]
    model = family.model().double()
    once = copy.deepcopy(model)
    for attention in attentions(once):
        keep_heads(ModelWriter(once), attention, attention.members(torch.tensor([1, 3])))
    for attention in attentions(model):
        keep_heads(ModelWriter(model), attention, attention.members(torch.tensor([0, 1, 3])))
    for attention in attentions(model):
        keep_heads(ModelWriter(model), attention, attention.members(torch.tensor([1, 2])))
    compare(family, model, once, 1e-12)
    assert [a.kept for a in attentions(model)] == [a.kept for a in attentions(once)]


@pytest.mark.parametrize("name", ["llama-8", "gpt2-4", "t5-4", "bloom-4", "falcon-new", "phi3-8", "umt5-4"])
def test_generation_with_a_cache(name: str) -> None:
    family = ALL[name]
    model = family.model().double()
    plan = ragged_plan(model)
    expected = zeroed(model, plan)
    fk.apply(model, plan)
    given = {k: v for k, v in family.inputs(model).items() if k in ("input_ids", "attention_mask")}
    asked = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = expected.generate(**given, **asked)
    for use_cache in (True, False):
        got = model.generate(**given, **asked, use_cache=use_cache)
        assert torch.equal(got.sequences, want.sequences)
        assert_close(torch.cat(got.logits), torch.cat(want.logits), rel=1e-6)


@pytest.mark.parametrize("name", ["bert-4", "gpt2-4", "llama-8", "phi3-8", "t5-4", "vit", "bart", "falcon-new"])
def test_eager_and_sdpa_agree(name: str) -> None:
    family = ALL[name]
    model = family.model()
    fk.apply(model, ragged_plan(model))
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(family.outputs(model))
    for key in found[0]:
        assert_close(found[0][key], found[1][key], rel=1e-5)


def test_a_gpt2_decoder_beside_an_encoder() -> None:
    family = Family(
        "gpt2-cross", "GPT2LMHeadModel", GPT2 | {"n_head": 4, "add_cross_attention": True}, (Expect(3, 40),)
    )
    model = family.model().double()
    found = attentions(model)
    assert [attention.cross for attention in found] == [False, True] * 3
    given = family.inputs(model) | {"encoder_hidden_states": torch.randn(2, 5, 16).double()}
    plan = ragged_plan(model)
    expected = zeroed(model, plan)(**given).logits
    assert_close(fk.apply(model, plan)(**given).logits, expected, rel=1e-12)


# Special linears -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-4", "gpt2-4", "llama-8", "phi3-8"])
def test_masked_and_adapted_linears_lose_their_rows_too(name: str) -> None:
    family = ALL[name]
    model = family.model().double()
    edits: list[Any] = []
    for attention in attentions(model):
        for role in ("v", "o"):
            path = f"{attention.name}.{getattr(attention.layout, role)}"
            weight = own_weight(attention.linear(role))
            edits.append(Mask.of(path, "", torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5))
    fk.apply(model, plan_of(model, edits))
    adapted = [f"{a.name}.{a.layout.k}" for a in attentions(model) if a.layout.k != a.layout.v]
    given = {"rank": 2, "alpha": 4.0, "trained": 0}
    own = [UpdateLinear(path, layer="dsee", given=given, parts=drawn(model.get_submodule(path))) for path in adapted]
    fk.apply(model, plan_of(model, own))
    plan = ragged_plan(model)
    expected = zeroed(model, plan)
    fk.apply(model, plan)
    compare(family, model, expected, 1e-10)
    compare(family, fk.fold(model), expected, 1e-10)
    plain = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all(tuple(m.weight.shape) == (m.out_features, m.in_features) for m in plain.values())


def drawn(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """The tensors of an update of rank 2 with some single entries."""
    draw = torch.Generator().manual_seed(0)
    out, inner = linear.weight.shape
    index = torch.randperm(out * inner, generator=draw)[:20].sort().values
    shapes = {"up": (out, 2), "down": (2, inner), "values": (20,)}
    return {"index": index.int()} | {k: 0.3 * torch.randn(s, generator=draw).double() for k, s in shapes.items()}


def test_what_trained_before_trains_again() -> None:
    model = FAMILIES["bert"].model()
    parts.train_only(model, lambda parameter: False)
    fk.apply(model, ragged_plan(model))
    assert not any(p.requires_grad for p in model.parameters())
    parts.train_as_before(model)
    assert all(p.requires_grad for p in model.parameters())


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_copy_knows_what_trained_before_and_a_model_can_go_to_a_file(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    model.classifier.requires_grad_(False)
    parts.train_only(model, lambda parameter: False)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")  # as users may: nothing in it may hinder
    restored = torch.load(tmp_path / "model.pt", weights_only=False)
    del model
    parts.train_as_before(other)
    assert {n for n, p in other.named_parameters() if not p.requires_grad} == {"classifier.weight", "classifier.bias"}
    parts.train_as_before(restored)
    assert not any(p.requires_grad for p in restored.parameters())


def eager(model: nn.Module, family: Family) -> nn.Module:
    if family.has_experts:
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("name", slow_but(LAYINGS, RAGGED))
def test_compact_checkpoints_reload(name: str, tmp_path: Path) -> None:
    family = ALL[name]
    model = family.model()
    plan = ragged_plan(model)
    fk.apply(model, plan)
    state = copy.deepcopy(model.state_dict())
    fk.save(model, tmp_path / "compact")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "saving changes nothing"
    rows = json.loads((tmp_path / "compact/config.json").read_text()).get("quantization_config", {})
    # the configuration alone can say it where there is no second attention that kept its heads
    said = len(attentions(model)) == 1 and name in STANDARD
    assert set(rows.get("attention", {})) == (set() if said else {edit.target for edit in plan.edits})
    assert_equal(family, eager(fk.load(tmp_path / "compact"), family), model)


@pytest.mark.parametrize("name", slow_but(LAYINGS, RAGGED))
def test_standard_exports_reload(name: str, tmp_path: Path) -> None:
    family = ALL[name]
    model = family.model()
    plan = ragged_plan(model)
    fk.apply(model, plan)
    state = copy.deepcopy(model.state_dict())
    report = fk.export(model, tmp_path / "standard")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "saving changes nothing"
    standard = eager(getattr(transformers, family.model_class).from_pretrained(tmp_path / "standard"), family)
    assert "quantization_config" not in json.loads((tmp_path / "standard/config.json").read_text())
    compare(family, standard, model, 1e-5)
    said = len(attentions(model)) == 1 and name in STANDARD
    assert set(report.padded_heads) == (set() if said else {edit.target for edit in plan.edits})
    assert ("padded with heads of zeros" in str(report)) == (not said)


def assert_equal(family: Family, loaded: nn.Module, model: nn.Module) -> None:
    assert type(loaded) is type(model)
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert [kept_heads(m) for m in loaded.modules()] == [kept_heads(m) for m in model.modules()]
    compare(family, loaded, model, 1e-6)  # equal bits; the order of sums may follow their place in memory


@pytest.mark.parametrize("name", slow_but(LAYINGS, RAGGED))
def test_transformers_own_classes_open_compact_checkpoints_and_what_they_open_is_saved_again(
    name: str, tmp_path: Path
) -> None:
    family = ALL[name]
    model = family.model()
    fk.apply(model, ragged_plan(model))
    fk.save(model, tmp_path / "compact")
    loaded = eager(getattr(transformers, family.model_class).from_pretrained(tmp_path / "compact"), family)
    assert_equal(family, loaded, model)
    fk.save(loaded, tmp_path / "again")
    assert_equal(family, eager(fk.load(tmp_path / "again"), family), model)


@pytest.mark.parametrize(
    "name", slow_but(set(LAYINGS) - set(BLOCKS), [name for name in [*SEPARABLE, *WIDE] if name not in BLOCKS])
)
def test_one_number_of_heads_in_all_layers_where_the_config_can_say_it(name: str, tmp_path: Path) -> None:
    family = ALL[name]
    model = family.model()
    found = attentions(model)
    assert all(attention.multiple == 1 for attention in found)
    plan = plan_of(model, [removal(a, torch.arange(1, a.units)) for a in found])
    whole = copy.deepcopy(model)
    fk.apply(model, plan)
    assert (description(model) is None) == (name in STANDARD)
    if name not in STANDARD:
        return
    expected = zeroed(whole, plan)
    assert all(attention.kept is None for attention in attentions(model))
    fk.save(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = eager(getattr(transformers, family.model_class).from_pretrained(tmp_path), family)
    compare(family, loaded, expected, 1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bloom", "t5"])
def test_a_reloaded_model_trains(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    fk.apply(model, ragged_plan(model))
    fk.save(model, tmp_path)
    loaded = fk.load(tmp_path).train()
    assert all(p.requires_grad for n, p in loaded.named_parameters() if "embed_positions" not in n)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    sum(v.square().mean() for v in family.outputs(loaded, grad=True).values()).backward()
    grads = {n: p.grad for n, p in loaded.named_parameters() if p.grad is not None}
    names = [f"{a.name}.{a.layout.o}.weight" for a in attentions(loaded)]
    assert all(n in grads and grads[n].abs().max() > 0 for n in names)
    optimizer.step()
    fk.save(loaded, tmp_path / "more")
    compare(family, fk.load(tmp_path / "more").eval(), loaded.eval(), 1e-6)


def test_a_body_of_a_saved_model(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    fk.apply(model, ragged_plan(model))
    fk.save(model, tmp_path / "whole")
    body = transformers.BertModel.from_pretrained(tmp_path / "whole")
    assert [a.kept for a in attentions(body)] == [a.kept for a in attentions(model)]
    fk.save(body, tmp_path / "body")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "body")
    assert [a.kept for a in attentions(again)] == [a.kept for a in attentions(model)]


WORKER = """
import json, sys
from pathlib import Path

root, source = Path(sys.argv[1]), sys.argv[2]
sys.modules["ffnkit"] = None  # importing it raises
import torch
from families import FAMILIES
from safetensors.torch import load_file
import transformers

transformers.logging.set_verbosity_error()


def look():
    found = {}
    for folder in sorted(root.iterdir()):
        family = FAMILIES[folder.name]
        for form in ("compact", "standard"):
            try:
                opened = getattr(transformers, family.model_class).from_pretrained(folder / form).eval()
                outputs, expected = family.outputs(opened), load_file(folder / "outputs.safetensors")
                found[f"{folder.name}/{form}"] = max(
                    ((outputs[k] - v).norm() / v.norm()).item() for k, v in expected.items()
                )
            except Exception as error:
                found[f"{folder.name}/{form}"] = type(error).__name__
    return found


plain = look()
assert not [name for name in sys.modules if name.startswith("ffnkit.")]
del sys.modules["ffnkit"]
sys.path.insert(0, source)
import ffnkit
print(json.dumps({"plain": plain, "ffnkit": look()}))
"""


FRESH = ("bert", "bloom", "gpt2", "llama", "t5")


@pytest.fixture(scope="module")
def reopened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process, first without ffnkit and then with it, finds in folders of some families in both forms."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("shelf")
    for name in FRESH:
        model = FAMILIES[name].model()
        fk.apply(model, ragged_plan(model))
        fk.save(model, root / name / "compact")
        fk.export(model, root / name / "standard")
        outputs = {k: v.contiguous() for k, v in FAMILIES[name].outputs(model).items()}
        save_file(outputs, root / name / "outputs.safetensors")
    command = [sys.executable, "-c", WORKER, str(root), str(Path(fk.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ffnkit", "plain"])
def test_fresh_processes(kind: str, reopened: dict[str, Any]) -> None:
    """With ffnkit imported both forms open; without it the standard one does, and the compact one raises."""
    found = reopened[kind]
    for name in FRESH:
        assert found[f"{name}/standard"] <= 1e-5, found
        compact = found[f"{name}/compact"]
        if kind == "ffnkit":
            assert compact <= 1e-5, found
        else:
            assert isinstance(compact, str), found


# Plans, trials, inspection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-4", "gpt2-4", "llama-8", "t5-4", "bloom-4", "phi3-8", "deberta-4"])
def test_a_trial_leaves_everything_as_it_was(name: str) -> None:
    family = ALL[name]
    model = family.model()
    plan = ragged_plan(model)
    before = (family.outputs(model), {n: id(p) for n, p in model.named_parameters()}, facts(model))
    trial = TemporaryPlan(model, plan.edits)
    with trial:
        inside = family.outputs(model)
    after = family.outputs(model)
    assert all(torch.equal(after[key], value) for key, value in before[0].items())
    assert {n: id(p) for n, p in model.named_parameters()} == before[1]
    assert facts(model) == before[2]
    assert any(relative_error(inside[key], before[0][key]) > 1e-3 for key in inside)
    fk.apply(model, plan)
    applied = family.outputs(model)
    assert all(torch.equal(applied[key], value) for key, value in inside.items())
    assert facts(model) != before[2], "the control: the facts tell the two apart"


def facts(model: nn.Module) -> list[Any]:
    own = [{k: v for k, v in vars(m).items() if type(v) in (int, float, tuple)} for m in model.modules()]
    return [*own, [type(m) for m in model.modules()], [kept_heads(m) for m in model.modules()]]


def test_a_plan_says_what_goes(tmp_path: Path) -> None:
    family = WIDE["llama-8"]
    model = family.model()
    plan = fk.plan(model, RemoveHeads(remove=0.25))
    text = str(plan)
    assert "model.layers.0.self_attn  8 heads  ->  6 (4 -> 3 groups)" in text
    assert plan.saved_parameters == sum(edit.parameters for edit in plan.edits)
    assert f"{plan.parameters - plan.saved_parameters:,} parameters" in text
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and str(loaded) == text
    first, second = fk.apply(copy.deepcopy(model), plan), fk.apply(copy.deepcopy(model), loaded)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert f"{family.name}" not in text


def test_inspect_shows_heads() -> None:
    model = WIDE["llama-8"].model()
    before = inspect(model)
    assert "layers 0-2 attention: 8 heads of 2, 4 of key and value" in str(before)
    fk.apply(model, ragged_plan(model))
    after = inspect(model)
    assert "layers 0,2 attention: 6 of 8 heads of 2, 3 of key and value" in str(after)
    linears = sum(row.parameters for row in before.attention) - sum(row.parameters for row in after.attention)
    assert linears == before.parameters - after.parameters
    assert before.flops_per_token - after.flops_per_token == 2 * linears
    olmo = str(inspect(FAMILIES["olmo2"].model()))
    assert "heads cannot be removed: q_norm.weight works on all heads together" in olmo


def test_heads_and_fused_ffns_in_one_plan(tmp_path: Path) -> None:
    family = WIDE["bert-4"]
    model = family.model()
    given = [{"method": "heads", "remove": 0.25}, {"method": "fusion", "width": 0.5}]
    fk.apply(model, fk.plan(model, methods.build("combined", methods=given)))
    assert [a.heads for a in attentions(model)] == [3, 3, 3]
    fk.save(model, tmp_path / "compact")
    compare(family, fk.load(tmp_path / "compact").eval(), model, 1e-6)
    fk.export(model, tmp_path / "standard")
    compare(family, transformers.BertForSequenceClassification.from_pretrained(tmp_path / "standard"), model, 1e-5)


def test_layers_are_dropped_after_heads(tmp_path: Path) -> None:
    family = WIDE["llama-8"]
    model = family.model()
    fk.apply(model, ragged_plan(model))
    fk.apply(model, fk.plan(model, methods.build("layer-drop", layers="0")))
    assert [a.heads for a in attentions(model)] == [8, 6]
    fk.save(model, tmp_path)
    compare(family, fk.load(tmp_path).eval(), model, 1e-6)


# The method ----------------------------------------------------------------------------------------------------------


def test_the_heads_with_the_smallest_weights_go() -> None:
    model = WIDE["bert-4"].model()
    attention = attentions(model)[0]
    with torch.no_grad():
        for role in ("q", "v"):
            linear = attention.linear(role)
            linear.weight[attention.rows(role)[2]] *= 0.01
    edit = fk.plan(model, RemoveHeads(remove=1, layers="0")).edits[0]
    assert edit.index.tolist() == [0, 1, 3]
    expected = [
        sum(attention.linear(r).weight[4 * h : 4 * h + 4].abs().sum().item() for r in ("q", "v")) for h in range(4)
    ]
    assert by_unit(attention).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_score_of_the_update_is_that_of_query_and_value() -> None:
    model = WIDE["bert-4"].model().double()
    paths = [f"{a.name}.{getattr(a.layout, r)}" for a in attentions(model) for r in ("q", "v")]
    given = {"rank": 2, "alpha": 4.0, "trained": 0}
    own = [UpdateLinear(p, layer="dsee", given=given, parts=drawn(model.get_submodule(p))) for p in paths]
    fk.apply(model, plan_of(model, own))
    for score in ("update", "both"):
        plan = fk.plan(model, RemoveHeads(remove=0.25, by=score))
        for attention, edit in zip(attentions(model), plan.edits, strict=True):
            sizes = torch.zeros(4).double()
            for role in ("q", "v"):
                linear = attention.linear(role)
                size = (linear.update() if score == "update" else linear.weight).abs()
                sizes += size.view(4, -1).sum(1)
            gone = sorted(set(range(4)) - set(edit.index.tolist()))
            assert gone == [int(sizes.argmin())]
    weight = [e.index.tolist() for e in fk.plan(model, RemoveHeads(remove=0.25)).edits]
    fk.fold(model)
    both = [e.index.tolist() for e in plan.edits]
    assert [e.index.tolist() for e in fk.plan(model, RemoveHeads()).edits] == both
    assert weight != both, "the control: the update matters"


def test_by_name_and_by_number() -> None:
    model = WIDE["llama-8"].model()
    names = [a.name for a in attentions(model)]
    plan = fk.plan(model, RemoveHeads(remove={names[0]: 2, names[2]: 0.25}, by="random", seed=3))
    assert {e.target: len(e.index) for e in plan.edits} == {names[0]: 2, names[2]: 3}
    again = fk.plan(model, RemoveHeads(remove={names[0]: 2, names[2]: 0.25}, by="random", seed=3))
    assert again == plan
    assert fk.plan(model, RemoveHeads(remove={names[0]: 2, names[2]: 0.25}, by="random", seed=4)) != plan


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"remove": 1.0}, "below 1"),
        ({"remove": 4}, "0 to 3"),
        ({"remove": 0.05}, "none would go"),
        ({"remove": True}, "no number"),
        ({"remove": {"nowhere": 1}}, "no attention of that name"),
        ({"by": "size"}, "no such choice"),
        ({"by": "update"}, "carries an update"),
        ({"layers": "9"}, "layer 9"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FfnkitError, match=words):
        fk.plan(WIDE["bert-4"].model(), RemoveHeads(**settings))


def test_what_cannot_go_is_refused_and_nothing_changed() -> None:
    model = WIDE["bert-4"].model()
    found = attentions(model)
    before = {n: id(p) for n, p in model.named_parameters()}
    good = removal(found[0], torch.arange(3))
    bad = [
        (dataclasses.replace(good, target=found[1].name, index=torch.tensor([], dtype=torch.int32)), "none is left"),
        (dataclasses.replace(good, target=found[1].name, index=torch.tensor([2, 1])), "no places"),
        (dataclasses.replace(good, target=found[1].name, index=torch.tensor([1, 4])), "no places"),
        (dataclasses.replace(good, target="nowhere"), "no such attention"),
        (dataclasses.replace(good, target=found[1].name, heads=8), "was made for 8"),
        (good, "twice"),
    ]
    for edit, words in bad:
        with pytest.raises(FfnkitError, match=words):
            fk.apply(model, plan_of(model, [good, edit]))
        assert {n: id(p) for n, p in model.named_parameters()} == before
    with pytest.raises(FfnkitError, match="all heads together"):
        fk.plan(FAMILIES["olmo2"].model(), RemoveHeads(remove=0.5))
    with pytest.raises(FfnkitError, match="multiple of 4"):
        codegen = WIDE["codegen-8"].model()
        fk.apply(codegen, plan_of(codegen, [removal(attentions(codegen)[0], torch.arange(6))]))


def test_a_share_leaves_whole_blocks() -> None:
    model = WIDE["codegen-8"].model()
    assert [len(e.index) for e in fk.plan(model, RemoveHeads(remove=0.5)).edits] == [4, 4, 4]
    with pytest.raises(FfnkitError, match="none would go"):
        fk.plan(model, RemoveHeads(remove=0.25))


def test_an_update_of_the_real_small_models(models_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "stories260K")
    plan = fk.plan(model, RemoveHeads(remove=0.25))
    expected = zeroed(model, plan)
    given = probe.inputs(model)
    assert given is not None
    want = expected(**given).logits
    assert_close(fk.apply(model, plan)(**given).logits, want, rel=1e-5)
    assert_differs(model(**given).logits, want.roll(1, -1))
