"""Bottleneck adapters and prefixes: what they compute, that they stay, are saved beside their base and opened again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_cli import good
from test_recipe_run import outcome, recipe_of, run, tiny
from tolerance import assert_close
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.nn.bottleneck import Bottleneck, bottlenecks
from ffnkit.recipe import unit as units
from ffnkit.report.measure import bytes_on_disk
from ffnkit.testing.contract import difference, snapshot
from ffnkit.tune import remove_added
from ffnkit.tune.lifecycle import undone
from ffnkit.tune.tuners import finish, prepare

BOTTLENECK, PREFIX = {"name": "bottleneck", "size": 3}, {"name": "prefix", "tokens": 2}
CASES = [("bert", BOTTLENECK), ("gpt2", BOTTLENECK), ("llama", BOTTLENECK), ("t5", BOTTLENECK), ("albert", BOTTLENECK)]
CASES += [("switch", BOTTLENECK), ("vit", BOTTLENECK), ("bert", PREFIX), ("gpt2", PREFIX), ("qwen2", PREFIX)]
IDS = [f"{tuner['name']}-{family}" for family, tuner in CASES]


def moved(model: nn.Module, tuner: dict[str, Any]) -> Any:
    """The finished model, with all that trains moved."""
    tuned = prepare(model, tuner)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fk.trainable_parameters(tuned):
            parameter.add_((0.3 * torch.randn(parameter.shape, generator=draw)).to(parameter))
    return finish(tuned, tuner).eval()


def outputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    return FAMILIES[name].outputs(model, FAMILIES[name].inputs(model))


@pytest.mark.parametrize(("name", "tuner"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_beside_the_base_and_opened_equal(name: str, tuner: dict[str, Any], dtype: Any, tmp_path: Path) -> None:
    model = FAMILIES[name].model().to(dtype)
    plain = outputs(name, model)
    done = moved(model, tuner)
    wanted = outputs(name, done)
    assert any(not torch.equal(wanted[key], plain[key]) for key in wanted)
    before = snapshot(done)
    fk.save(done, tmp_path / "out")
    assert not difference(before, snapshot(done))
    opened = fk.load(tmp_path / "out")
    found = outputs(name, opened)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert all(p.requires_grad for p in opened.parameters() if p.is_floating_point())
    size = bytes_on_disk(tmp_path / "out")
    assert size.weights == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    base = fk.load(tmp_path / "out" / "base")
    outputs(name, base)  # Switch casts its routers while it runs
    below = remove_added(opened)
    assert type(below) is type(base) and not difference(snapshot(base), snapshot(below), identity=False)


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "dsee", "sparsegrad", "peft", "none", "compact"])
def test_inspect_of_a_folder_counts_what_lies_beside_the_base(kind: str, tmp_path: Path) -> None:
    """As of the opened model, by the command too; a base alone is still read without its weights."""
    from ffnkit.io.architectures import empty_model

    model: Any = FAMILIES["gpt2"].model()
    if kind in ("bottleneck", "prefix"):
        model = moved(model, {"bottleneck": BOTTLENECK, "prefix": PREFIX}[kind])
        fk.save(model, tmp_path / "out")
    elif kind in ("dsee", "sparsegrad"):
        given = {"dsee": {"rank": 2, "nonzeros": 5}, "sparsegrad": {"count": 7, "basis": "none", "choose": "random"}}
        fk.apply(model, fk.plan(model, fk.methods.build(kind, **given[kind])))
        fk.save_apart(model, tmp_path / "out")
    elif kind == "peft":
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(tmp_path / "out")
        get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)).save_pretrained(
            tmp_path / "out"
        )
    else:
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
        (fk.save if kind == "compact" else fk.export)(model, tmp_path / "out")
    wanted = fk.inspect(fk.load(tmp_path / "out"))
    empty = empty_model(str(tmp_path / "out"))
    assert fk.inspect(empty) == wanted and (next(empty.parameters()).device.type == "meta") == (kind == "none")
    if kind in ("none", "compact"):
        assert wanted.added == 0 and "beside" not in str(wanted)
        return
    if kind == "peft":
        whole, plain = fk.load(tmp_path / "out"), FAMILIES["gpt2"].model()
    else:
        whole, plain = model, fk.load(tmp_path / "out" / "base")
    more = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in plain.parameters())
    assert wanted.added == more > 0 and wanted.parameters == sum(p.numel() for p in whole.parameters())
    assert f"updates and adapters of {more:,} parameters" in good("inspect", tmp_path / "out").output
    folder = tmp_path / "out" / "adapter"
    if kind != "peft":
        with pytest.raises(FfnkitError, match="an adapter without its model"):
            empty_model(str(folder))


def ends(names: Any) -> set[str]:
    return {name.split("layer.")[1][2:] for name in names}


def test_a_bottleneck_is_the_formula() -> None:
    model = FAMILIES["bert"].model()
    done = moved(model, BOTTLENECK | {"activation": "relu"})
    places = bottlenecks(done)
    assert len(places) == 6 and ends(places) == {"attention.output.dense", "output.dense"}
    x = torch.randn(2, 5, model.config.intermediate_size)
    layer = next(module for name, module in places.items() if "attention" not in name)
    h = layer.base_layer(x)
    inner = (h @ layer.down.weight.T + layer.down.bias).clamp_min(0)
    assert_close(layer(x), h + inner @ layer.up.weight.T + layer.up.bias)
    assert layer.weight is layer.base_layer.weight
    assert ends(bottlenecks(prepare(FAMILIES["bert"].model(), BOTTLENECK | {"behind": "ffn"}))) == {"output.dense"}


def test_counts_and_flops_are_those_of_the_adapters(tmp_path: Path) -> None:
    plain = FAMILIES["bert"].model()
    before = fk.inspect(plain)
    width = plain.config.hidden_size
    done = moved(plain, BOTTLENECK)
    each = 2 * width * 3 + width + 3
    assert sum(p.numel() for p in done.parameters()) == before.parameters + 6 * each
    assert fk.inspect(done).flops_per_token == before.flops_per_token + 6 * 2 * 2 * width * 3


def test_token_types_reach_a_model_with_a_prefix() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = moved(BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)), PREFIX)
    ids = torch.randint(1, 30, (2, 6))
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        told = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        other = ids.clone()
        other[1, 4:] = 7  # behind the mask
        same = model(input_ids=other, attention_mask=mask, token_type_ids=types).logits
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss
    assert not torch.equal(plain, told) and torch.equal(told, same) and loss.ndim == 0


def test_peft_opens_the_prefix(tmp_path: Path) -> None:
    from peft import PeftModel

    done = moved(FAMILIES["gpt2"].model(), PREFIX)
    fk.save(done, tmp_path)
    opened = PeftModel.from_pretrained(fk.load(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    found, wanted = outputs("gpt2", opened), outputs("gpt2", done)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_model_with_a_prefix_writes_as_a_slow_loop() -> None:
    done = moved(FAMILIES["gpt2"].model(), PREFIX)
    ids = torch.randint(3, 50, (1, 4), generator=torch.Generator().manual_seed(0))
    written = done.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for _ in range(5):
        with torch.no_grad():
            logits = done(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize("tuner", [BOTTLENECK, PREFIX], ids=["bottleneck", "prefix"])
def test_nothing_edits_a_model_below_what_stays(tuner: dict[str, Any], tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    before = snapshot(model)
    done = moved(model, tuner | {"head": False, "modules_to_train": ["norms"]})
    for refused in (
        lambda: fk.plan(done, fk.Fusion(width=0.5)),
        lambda: fk.export(done, tmp_path / "e"),
        lambda: fk.fold(done),
        lambda: prepare(done, "lora"),
        lambda: prepare(done, tuner),
    ):
        state = snapshot(done)
        with pytest.raises(FfnkitError, match=r"that no weight can hold. Edit before it comes, or take it off"):
            refused()
        assert not difference(state, snapshot(done))
    assert remove_added(done) is model
    own = {name: value for name, value in snapshot(model)["tensors"].items() if "norm" not in name.lower()}
    assert all(torch.equal(before["tensors"][name][1], bits) for name, (_, bits, _) in own.items())
    with pytest.raises(FfnkitError, match="no bottleneck or prefix is on it"):
        remove_added(model)
    assert fk.plan(model, fk.Fusion(width=0.5, restarts=1))


def test_abandoned_it_goes() -> None:
    for tuner in (BOTTLENECK, PREFIX):
        model = FAMILIES["bert"].model()
        before = snapshot(model)
        assert undone(prepare(model, tuner)) is model
        assert not difference(before, snapshot(model))


def test_what_stays_goes_over_a_compressed_model(tmp_path: Path) -> None:
    """Factors, masks, thin pairs stay below the adapters, and the base is saved in its compact form."""
    for method in (fk.Fusion(width=0.5, restarts=1), fk.Prune(sparsity=0.5), fk.methods.build("svd", width=0.5)):
        model = FAMILIES["bert"].model()
        fk.apply(model, fk.plan(model, method))
        done = moved(model, BOTTLENECK)
        wanted = outputs("bert", done)
        fk.save(done, tmp_path / method.name)
        found = outputs("bert", fk.load(tmp_path / method.name))
        for key, value in wanted.items():
            assert_close(found[key], value)


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    fk.save(moved(FAMILIES["bert"].model(), BOTTLENECK), tmp_path / "a")
    file, about = tmp_path / "a/adapter/bottleneck.safetensors", tmp_path / "a/adapter/bottleneck.json"
    tensors, told = load_file(file), json.loads(about.read_text())
    name = next(iter(tensors))
    for broken, match in (
        ({n: v for n, v in tensors.items() if n != name}, "holds no adapter|is not in both the file and the model"),
        (tensors | {name: tensors[name][:1]}, "holds no adapter|is not in both the file and the model"),
        (tensors | {"more": torch.ones(2)}, "is not in both the file and the model"),
    ):
        save_file(broken, file)
        with pytest.raises(FfnkitError, match=match):
            fk.load(tmp_path / "a")
    save_file(tensors, file)
    for change, match in (
        ({"size": -1}, "is damaged"),
        ({"size": "many"}, "is damaged"),
        ({"size": 1 << 60}, "holds no adapter of size"),
        ({"activation": "no_such"}, "there is no such one"),
        ({"activation": "prelu"}, "it has numbers of its own"),
        ({"places": ["bert.nowhere"]}, "holds no adapter of size 3 for bert.nowhere"),
        ({"more": 1}, "is damaged"),
    ):
        about.write_text(json.dumps(told | change))
        with pytest.raises(FfnkitError, match=match):
            fk.load(tmp_path / "a")
    about.write_text(json.dumps(told))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FfnkitError):
        fk.load(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("tuner", [BOTTLENECK, PREFIX], ids=["bottleneck", "prefix"])
def test_a_recipe_goes_on_behind_the_tuning(
    tuner: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the evaluation, the unit builds its model anew: places from the tuner, numbers from the file."""
    folder = tiny(tmp_path)
    arms = {"a": {"method": "fusion", "width": 0.5, "tuner": tuner}}
    recipe = recipe_of(folder, arms=arms, stages=["compress", "tune", "evaluate", "export"], measure={"latency": False})
    assert run(recipe, tmp_path / "whole").ok
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(units._Job, "evaluate", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        run(recipe, tmp_path / "cut")
    results = run(recipe, tmp_path / "cut")
    assert results.ok and outcome(tmp_path / "cut")["figures"] == outcome(tmp_path / "whole")["figures"]
    row = results.rows[0]
    assert row["bytes_on_disk_compact"] and row["bytes_on_disk_standard"] is None
    saved = [tmp_path / each / "units/a/seed-0/compact" for each in ("cut", "whole")]
    for file in saved[0].rglob("*.safetensors"):
        assert file.read_bytes() == (saved[1] / file.relative_to(saved[0])).read_bytes(), file
    assert "ffnkit.load(" in (saved[0] / "README.md").read_text()


def test_pruning_behind_what_stays_is_refused(tmp_path: Path) -> None:
    arms = {"a": {"tuner": BOTTLENECK, "prune": {"method": "prune"}}}
    with pytest.raises(FfnkitError, match="arms.a.prune: bottleneck stays on the model"):
        recipe_of(tmp_path, arms=arms, stages=["tune", "prune", "evaluate"])


@pytest.mark.slow
def test_a_fresh_process_opens_it(tmp_path: Path) -> None:
    for name, tuner in (("bert", BOTTLENECK), ("gpt2", PREFIX)):
        done = moved(FAMILIES[name].model(), tuner)
        inputs = FAMILIES[name].inputs(done)
        fk.save(done, tmp_path / name)
        with torch.no_grad():
            found = {"out": done(**inputs)[0].contiguous()}
        save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / f"{name}-in.safetensors")
        code = (
            "import sys, torch, ffnkit; from safetensors.torch import load_file, save_file\n"
            "with torch.no_grad(): out = ffnkit.load(sys.argv[1])(**load_file(sys.argv[1] + '-in.safetensors'))[0]\n"
            "save_file({'out': out.contiguous()}, sys.argv[1] + '-out.safetensors')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
        assert torch.equal(load_file(tmp_path / f"{name}-out.safetensors")["out"], found["out"])


def test_the_base_alone_is_a_checkpoint_of_plain_transformers(tmp_path: Path) -> None:
    fk.save(moved(FAMILIES["bert"].model(), BOTTLENECK), tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert not any(isinstance(module, Bottleneck) for module in plain.modules())
    with pytest.raises(Exception, match="config.json|Unrecognized|does not appear"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
