"""What every method promises on every family: planning, applying, folding, saving and loading are exact."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, GATED, NAMES, RESIZABLE
from family import Family, config_value
from methods import METHODS
from safetensors.torch import save_file
from tolerance import assert_close, relative_error
from torch import nn

import ffnkit as fk
from ffnkit.blocks import ffns
from ffnkit.errors import FfnkitError
from ffnkit.ops.neurons import Neurons

EXACT, RELOADED = 1e-12, 1e-5
Snapshot = dict[str, tuple[torch.Tensor, bool]]
EACH = pytest.mark.parametrize(("method", "name"), [(m, n) for m in METHODS for n in NAMES])


def snapshot(model: nn.Module) -> Snapshot:
    """Every tensor of the state with its bits and whether it trains."""
    trains = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: (value.clone(), name in trains) for name, value in model.state_dict().items()}


def same(first: Snapshot, second: Snapshot) -> bool:
    def equal(one: tuple[torch.Tensor, bool], two: tuple[torch.Tensor, bool]) -> bool:
        return one[1] == two[1] and one[0].dtype == two[0].dtype and torch.equal(one[0], two[0])

    return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)


def applied(family: Family, method: str = "fusion", **settings: Any) -> nn.Module:
    """A float32 model of the family with the method applied."""
    model = family.model()
    return fk.apply(model, fk.plan(model, METHODS[method](**settings)))


def compare(family: Family, actual: nn.Module, expected: nn.Module, rel: float) -> None:
    outputs = family.outputs(expected)
    for key, value in family.outputs(actual).items():
        assert_close(value, outputs[key], rel=rel, what=f"{family.name} {key}")


def differ(family: Family, actual: nn.Module, expected: nn.Module) -> None:
    outputs = family.outputs(expected)
    errors = {key: relative_error(value, outputs[key]) for key, value in family.outputs(actual).items()}
    assert max(errors.values()) > 1e-3, f"{family.name}: outputs should differ, {errors}"


# Plans ---------------------------------------------------------------------------------------------------------------


@EACH
def test_planning_changes_nothing_and_is_deterministic(method: str, name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    next(model.parameters()).requires_grad_(False)
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    torch.manual_seed(1)
    plan = fk.plan(model, METHODS[method]())
    torch.manual_seed(2)
    again = fk.plan(model, METHODS[method]())
    assert same(snapshot(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert plan.edits and plan == again
    assert str(plan) == str(again) != ""
    assert plan != fk.plan(family.model(seed=family.seed + 1), METHODS[method]()), "other weights, another plan"
    fk.apply(model, plan)
    assert not same(snapshot(model), before)


@EACH
def test_a_saved_plan_applies_identically(method: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = fk.plan(model, METHODS[method]())
    plan.save(tmp_path / "plan")
    loaded = type(plan).load(tmp_path / "plan")
    assert loaded == plan
    assert str(loaded) == str(plan)
    first, second = fk.apply(copy.deepcopy(model), plan), fk.apply(copy.deepcopy(model), loaded)
    assert same(snapshot(first), snapshot(second))
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
    differ(family, first, model)


@pytest.mark.parametrize(("method", "name"), [(m, n) for m in METHODS for n in RESIZABLE])
def test_apply_refuses_a_plan_for_another_shape(method: str, name: str) -> None:
    family = FAMILIES[name]
    plan = fk.plan(family.model(), METHODS[method]())
    other = family.model(times=2)
    before = snapshot(other)
    with pytest.raises(FfnkitError):
        fk.apply(other, plan)
    assert same(snapshot(other), before), "a refused plan changes nothing"
    with pytest.raises(FfnkitError):  # once more to a model that has it already
        fk.apply(fk.apply(family.model(), plan), plan)


# Applying and folding ------------------------------------------------------------------------------------------------


@EACH
def test_apply_returns_the_model_and_fold_keeps_its_outputs(method: str, name: str) -> None:
    family = FAMILIES[name]
    original = family.model().double()
    model = copy.deepcopy(original)
    assert fk.apply(model, fk.plan(model, METHODS[method]())) is model
    differ(family, model, original)
    unfolded = copy.deepcopy(model)
    assert fk.fold(model) is model
    compare(family, model, unfolded, EXACT)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()], "fold leaves plain layers"
    assert list(model.state_dict()) == list(original.state_dict())
    fk.fold(model)  # there is nothing more to fold
    compare(family, model, unfolded, EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_the_counts_are_needed(name: str) -> None:
    """The control of the fold: without its counts a fused model is another one."""
    family = FAMILIES[name]
    model = applied(family)
    scales = [ffn.scale for ffn in ffns(model)]
    assert all(scale is not None and not scale.requires_grad for scale in scales)
    unfolded = copy.deepcopy(model)
    for ffn in ffns(model):
        assert ffn.scale is not None
        ffn.scale.fill_(1)
    differ(family, model, unfolded)


@pytest.mark.parametrize("name", NAMES)
def test_counts_sum_to_the_former_width(name: str) -> None:
    family = FAMILIES[name]
    widths = [ffn.width for ffn in ffns(family.model())]
    for ffn, width in zip(ffns(applied(family)), widths, strict=True):
        assert ffn.width == round(0.5 * width)
        assert ffn.scale is not None
        assert ffn.scale.min() >= 1, "no cluster is empty"
        assert torch.all(ffn.scale.sum(-1) == width)


@pytest.mark.parametrize("name", NAMES)
def test_fusing_to_the_full_width_changes_no_output(name: str) -> None:
    family = FAMILIES[name]
    original = family.model().double()
    for width in (1.0, max(family.shapes)[0] if len(family.shapes) == 1 else 1.0):
        model = copy.deepcopy(original)
        fk.apply(model, fk.plan(model, fk.Fusion(width=width, seed=0)))
        compare(family, model, original, EXACT)
    model = copy.deepcopy(original)
    less = min(width for width, *_ in family.shapes) - 1  # the control: one neuron less is seen
    differ(family, fk.apply(model, fk.plan(model, fk.Fusion(width=less, seed=0))), original)


def duplicated(neurons: Neurons, seed: int, *, factor: float = 1.0) -> Neurons:
    """Every neuron twice at half its output, in a random order; a gated copy's up times ``factor``, down by it."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * neurons.ff, generator=generator)
    up, down, bias = neurons.up, neurons.down / 2, neurons.up_bias
    twice = {
        "up": torch.cat([up, factor * up], dim=-2)[..., order, :],
        "down": torch.cat([down, down / factor], dim=-1)[..., order],
        "down_bias": neurons.down_bias,
    }
    if neurons.gate is not None:
        twice["gate"] = torch.cat([neurons.gate] * 2, dim=-2)[..., order, :]
    if neurons.gate_bias is not None:
        twice["gate_bias"] = torch.cat([neurons.gate_bias] * 2, dim=-1)[..., order]
    if bias is not None:
        twice["up_bias"] = torch.cat([bias, factor * bias], dim=-1)[..., order]
    return Neurons(**twice)


def widened(family: Family, narrow: nn.Module, *, factor: float = 1.0) -> nn.Module:
    """The same function as ``narrow`` at twice its width."""
    wide = family.model(times=2).to(next(narrow.parameters()).dtype)
    state = wide.state_dict()
    wide.load_state_dict({k: v if v.shape == state[k].shape else state[k] for k, v in narrow.state_dict().items()})
    for index, (target, source) in enumerate(zip(ffns(wide), ffns(narrow), strict=True)):
        target.write(duplicated(source.read(), index, factor=factor if source.gated else 1.0))
    return wide


@pytest.mark.parametrize("name", RESIZABLE)
def test_duplicated_neurons_fuse_without_a_change(name: str) -> None:
    family = FAMILIES[name]
    narrow = family.model().double()
    wide = widened(family, narrow)
    compare(family, wide, narrow, EXACT)
    fk.apply(wide, fk.plan(wide, fk.Fusion(width=0.5, seed=0)))
    assert [f.width for f in ffns(wide)] == [f.width for f in ffns(narrow)]
    compare(family, wide, narrow, EXACT)
    differ(family, fk.apply(narrow, fk.plan(narrow, fk.Fusion(width=0.5, seed=0))), wide)  # none are duplicates here


@pytest.mark.parametrize("name", sorted(set(GATED) & set(RESIZABLE)))
def test_duplicates_up_to_scale_and_sign_fuse_where_there_is_a_gate(name: str) -> None:
    family = FAMILIES[name]
    narrow = family.model().double()
    wide = widened(family, narrow, factor=-2.0)
    compare(family, wide, narrow, EXACT)
    fk.apply(wide, fk.plan(wide, fk.Fusion(width=0.5, seed=0)))
    compare(family, wide, narrow, EXACT)


# Gradients -----------------------------------------------------------------------------------------------------------


def reached(family: Family, model: nn.Module) -> set[str]:
    """Names of the parameters that a loss on every output sends a gradient to."""
    outputs = family.outputs(model, grad=True)
    generator = torch.Generator().manual_seed(0)
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in outputs.values()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@EACH
def test_gradients_reach_what_is_claimed(method: str, name: str) -> None:
    family = FAMILIES[name]
    original = family.model()
    expected = reached(family, original)
    model = applied(family, method)
    claimed = {id(p) for p in fk.trainable_parameters(model)}
    assert claimed == {id(p) for p in model.parameters() if p.requires_grad}
    names = [n for n, _ in original.named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names, "compressing renames nothing"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in original.named_parameters() if p.requires_grad
    }
    got = reached(family, model)
    routed = {n for n in names if ".expert_" in n}  # narrower FFNs may send tokens to other experts
    assert got - routed == expected - routed
    counts = [n for n in model.state_dict() if n not in original.state_dict()]
    assert counts and all(n in dict(model.named_buffers()) for n in counts), "the counts are saved, and not trained"


# Checkpoints ---------------------------------------------------------------------------------------------------------

LAST = {"layers": "last:1"}  # one narrow layer and the others at full width: ragged where there are several


def eager(model: nn.Module) -> nn.Module:
    """As families.py builds them; a model from a checkpoint starts with another implementation of the experts."""
    if any(ffn.experts for ffn in ffns(model)):
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("settings", [{}, LAST], ids=["uniform", "ragged"])
@EACH
def test_compact_checkpoints_reload(method: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = applied(family, method, **settings)
    before = snapshot(model)
    fk.save(model, tmp_path / "compact")
    assert same(snapshot(model), before), "saving changes nothing"
    loaded = eager(fk.load(tmp_path / "compact"))
    assert same(snapshot(loaded), before)
    assert type(loaded) is type(model)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    compare(family, loaded, model, 0.0)
    hooked = eager(getattr(transformers, family.model_class).from_pretrained(tmp_path / "compact"))
    assert same(snapshot(hooked), before), "with ffnkit imported from_pretrained opens it too"


@pytest.mark.parametrize("settings", [{}, LAST], ids=["uniform", "ragged"])
@EACH
def test_standard_exports_reload(method: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = applied(family, method, **settings)
    before = snapshot(model)
    report = fk.export(model, tmp_path / "standard")
    assert str(report)
    assert same(snapshot(model), before), "exporting leaves the model as it was"
    plain = eager(getattr(transformers, family.model_class).from_pretrained(tmp_path / "standard"))
    assert list(plain.state_dict()) == list(family.model().state_dict())
    compare(family, plain, model, RELOADED)
    assert "quantization_config" not in json.loads((tmp_path / "standard" / "config.json").read_text())
    widths = {ffn.width for ffn in ffns(model)}
    if len(family.shapes) == 1 and family.width_keys:
        assert {config_value(plain.config, key) for key in family.width_keys} == {max(widths)}


# A fresh process -----------------------------------------------------------------------------------------------------

WORKER = """
import json, sys
from pathlib import Path

root, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "plain":
    sys.modules["ffnkit"] = None  # importing it raises
import torch, transformers
from families import FAMILIES
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
if kind == "ffnkit":
    import ffnkit as fk


def opened(family, folder):
    if kind == "ffnkit":
        return fk.load(folder)
    return getattr(transformers, family.model_class).from_pretrained(folder)


def error(family, folder):
    try:
        outputs = family.outputs(opened(family, folder).eval())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    expected = load_file(folder.parent / "outputs.safetensors")
    return max(((outputs[k] - expected[k]).norm() / expected[k].norm()).item() for k in expected)


found = {}
for case in sorted(root.iterdir()):
    family = FAMILIES[case.name.split("@")[0]]
    for form in ("compact", "standard"):
        if (kind, form) != ("ffnkit", "standard"):
            found[f"{case.name}/{form}"] = error(family, case / form)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def reopened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, float | str]]]:
    """What a fresh process with ffnkit and one without it find in the folders of every family."""
    root = tmp_path_factory.mktemp("reopened")
    for family in FAMILIES.values():
        for form, settings in (("uniform", {}), ("ragged", LAST)):
            folder = root / f"{family.name}@{form}"
            folder.mkdir()
            model = applied(family, **settings)
            fk.save(model, folder / "compact")
            fk.export(model, folder / "standard")
            save_file({k: v.contiguous() for k, v in family.outputs(model).items()}, folder / "outputs.safetensors")
    yield {kind: worker(root, kind) for kind in ("ffnkit", "plain")}


def worker(root: Path, kind: str) -> dict[str, float | str]:
    source = Path(fk.__file__).parents[1]
    path = os.pathsep.join([str(Path(__file__).parent), *([str(source)] if kind == "ffnkit" else [])])
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(root), kind],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["uniform", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_opens_compact_with_ffnkit(name: str, form: str, reopened: dict[str, Any]) -> None:
    found = reopened["ffnkit"][f"{name}@{form}/compact"]
    assert isinstance(found, float) and found <= RELOADED, found


@pytest.mark.parametrize("form", ["uniform", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_without_ffnkit_opens_standard(name: str, form: str, reopened: dict[str, Any]) -> None:
    found = reopened["plain"][f"{name}@{form}/standard"]
    assert isinstance(found, float) and found <= RELOADED, found


@pytest.mark.parametrize("form", ["uniform", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_without_ffnkit_refuses_compact(name: str, form: str, reopened: dict[str, Any]) -> None:
    found = reopened["plain"][f"{name}@{form}/compact"]
    assert isinstance(found, str), f"opened without ffnkit, relative error {found}"
