"""What every method promises on every family: planning, applying, folding, saving and loading are exact."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CLAMPED, FAMILIES, GATED, NAMES, RESIZABLE
from family import Family, config_value
from methods import KINDS, METHODS, slow_but
from safetensors.torch import save_file
from tolerance import assert_close, relative_error
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops.neurons import Neurons

EXACT, RELOADED = 1e-12, 1e-5
Snapshot = dict[str, tuple[torch.Tensor, bool]]
# Each kind of FFN, the other families with the slow tests: test_compact_checkpoints_reload has one whole pass of each.
EACH = pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) if n in KINDS else pytest.param(m, n, marks=pytest.mark.slow) for m in METHODS for n in NAMES],
)
EACH_KIND = pytest.mark.parametrize("name", slow_but(KINDS, NAMES))


def snapshot(model: nn.Module) -> Snapshot:
    """Every tensor of the state with its bits and whether it trains."""
    trains = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: (value.clone(), name in trains) for name, value in model.state_dict().items()}


def same(first: Snapshot, second: Snapshot) -> bool:
    def equal(one: tuple[torch.Tensor, bool], two: tuple[torch.Tensor, bool]) -> bool:
        return one[1] == two[1] and one[0].dtype == two[0].dtype and torch.equal(one[0], two[0])

    return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)


LAST = "last:1"  # one narrow layer and the others at full width: ragged where there are several
FORMS = {"uniform": "all", "ragged": LAST}


@cache
def planned(name: str, method: str = "fusion", layers: str = "all") -> Any:
    """The plan for a family's model, made once: a plan is data, and the seeds make it the same every time."""
    return fk.plan(FAMILIES[name].model(), METHODS[method](layers=layers))


def applied(family: Family, method: str = "fusion", layers: str = "all") -> nn.Module:
    """A float32 model of the family with the method applied."""
    return fk.apply(family.model(), planned(family.name, method, layers))


def fused(model: nn.Module, width: int | float) -> nn.Module:
    """The model fused to a width of its own."""
    return fk.apply(model, fk.plan(model, METHODS["fusion"](width=width)))


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
    again = planned(name, method)
    assert same(snapshot(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert plan.edits and plan == again
    assert str(plan) == str(again) != ""
    fk.apply(model, plan)
    assert not same(snapshot(model), before)


@pytest.mark.parametrize("method", METHODS)
@EACH_KIND
def test_other_weights_have_another_plan(method: str, name: str) -> None:
    family = FAMILIES[name]
    other = fk.plan(family.model(seed=family.seed + 1), METHODS[method]())
    assert other != planned(name, method) and len(other.edits) == len(planned(name, method).edits)


@pytest.mark.parametrize("method", METHODS)
@EACH_KIND
def test_a_saved_plan_applies_identically(method: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = planned(name, method)
    plan.save(tmp_path / "plan")
    loaded = type(plan).load(tmp_path / "plan")
    assert loaded == plan
    assert str(loaded) == str(plan)
    first, second = fk.apply(copy.deepcopy(model), plan), fk.apply(copy.deepcopy(model), loaded)
    assert same(snapshot(first), snapshot(second))
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
    differ(family, first, model)
    for value in [*first.parameters(), *first.buffers()]:  # what a model does to its weights is not the plan's affair
        value.data.zero_()
    assert plan == loaded
    assert same(snapshot(fk.apply(copy.deepcopy(model), plan)), snapshot(second))


@pytest.mark.parametrize("name", slow_but(set(KINDS) & set(RESIZABLE), RESIZABLE))
@pytest.mark.parametrize("method", METHODS)
def test_apply_refuses_a_plan_for_another_shape(method: str, name: str) -> None:
    family = FAMILIES[name]
    plan = planned(name, method)
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
    assert fk.apply(model, planned(name, method)) is model
    differ(family, model, original)
    unfolded = copy.deepcopy(model)
    assert fk.fold(model) is model
    compare(family, model, unfolded, EXACT)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()], "fold leaves plain layers"
    assert list(model.state_dict()) == list(original.state_dict())
    fk.fold(model)  # there is nothing more to fold
    compare(family, model, unfolded, EXACT)


@EACH_KIND
def test_the_counts_are_needed(name: str) -> None:
    """The control of the fold: without its counts a fused model is another one."""
    family = FAMILIES[name]
    model = applied(family)
    scales = [ffn.scale for ffn in ffns(model)]
    assert all(scale is not None and not scale.requires_grad for scale in scales)
    unfolded = copy.deepcopy(model)
    for ffn in ffns(unfolded):
        assert ffn.scale is not None
        ffn.scale.fill_(1)
    differ(family, unfolded, model)


@EACH_KIND
def test_counts_sum_to_the_former_width(name: str) -> None:
    family = FAMILIES[name]
    widths = [ffn.width for ffn in ffns(family.model())]
    for ffn, width in zip(ffns(applied(family)), widths, strict=True):
        assert ffn.width == round(0.5 * width)
        assert ffn.scale is not None
        assert ffn.scale.min() >= 1, "no cluster is empty"
        assert torch.all(ffn.scale.sum(-1) == width)


@EACH_KIND
def test_fusing_to_the_full_width_changes_no_output(name: str) -> None:
    family = FAMILIES[name]
    original = family.model().double()
    for width in (1.0, max(family.shapes)[0] if len(family.shapes) == 1 else 1.0):
        compare(family, fused(copy.deepcopy(original), width), original, EXACT)
    less = min(width for width, *_ in family.shapes) - 1  # the control: one neuron less is seen
    differ(family, fused(copy.deepcopy(original), less), original)


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


BOTH = set(GATED) & set(RESIZABLE)


def widened(family: Family, narrow: nn.Module, *, factor: float = 1.0) -> nn.Module:
    """The same function as ``narrow`` at twice its width."""
    wide = family.model(times=2).to(next(narrow.parameters()).dtype)
    state = wide.state_dict()
    wide.load_state_dict({k: v if v.shape == state[k].shape else state[k] for k, v in narrow.state_dict().items()})
    for index, (target, source) in enumerate(zip(ffns(wide), ffns(narrow), strict=True)):
        target.write(duplicated(source.read(), index, factor=factor if source.gated else 1.0))
    return wide


@pytest.mark.parametrize("name", slow_but(set(KINDS) & set(RESIZABLE), RESIZABLE))
def test_duplicated_neurons_fuse_without_a_change(name: str) -> None:
    family = FAMILIES[name]
    narrow = family.model().double()
    wide = widened(family, narrow)
    compare(family, wide, narrow, EXACT)
    fused(wide, 0.5)
    assert [f.width for f in ffns(wide)] == [f.width for f in ffns(narrow)]
    compare(family, wide, narrow, EXACT)
    differ(family, fk.apply(narrow, planned(name)), wide)  # the control: here none are duplicates


@pytest.mark.parametrize(
    "name", slow_but({*KINDS, "modernbert"} & BOTH, sorted(BOTH - {*CLAMPED}))
)  # the latter has biases
def test_duplicates_up_to_scale_and_sign_fuse_where_there_is_a_gate(name: str) -> None:
    family = FAMILIES[name]
    narrow = family.model().double()
    wide = widened(family, narrow, factor=-2.0)
    compare(family, wide, narrow, EXACT)
    fused(wide, 0.5)
    compare(family, wide, narrow, EXACT)


# Gradients -----------------------------------------------------------------------------------------------------------


def reached(family: Family, model: nn.Module) -> set[str]:
    """Names of the parameters that a loss on every output sends a gradient to."""
    outputs = family.outputs(model, grad=True)
    generator = torch.Generator().manual_seed(0)
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in outputs.values()).backward()
    largest = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.grad is not None}
    # No gradient but rounding: of attention to one token (CLIP's first under its causal mask), of biases of keys.
    rounding = 1e-6 * max(largest.values())
    return {name for name, value in largest.items() if value > rounding}


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


def eager(model: nn.Module) -> nn.Module:
    """As family.py builds them; a model from a checkpoint starts with another implementation of the experts."""
    if any(ffn.experts for ffn in ffns(model)):
        model.set_experts_implementation("eager")
    return model.eval()


def reloadable(model: nn.Module) -> Snapshot:
    """The snapshot, without telling of sinusoidal positions whether they train: transformers' loading forgets it."""
    return {k: (v, trains and "embed_positions" not in k) for k, (v, trains) in snapshot(model).items()}


@dataclass
class Saved:
    """A family's fused model in a folder of its own, and the snapshot of it from before it was saved."""

    family: Family
    model: nn.Module
    folder: Path
    before: Snapshot
    report: Any = None  # of the export

    @cached_property
    def compact(self) -> Path:
        fk.save(self.model, self.folder / "compact")
        assert same(snapshot(self.model), self.before), "saving leaves the model as it was"
        return self.folder / "compact"

    @cached_property
    def standard(self) -> Path:
        self.report = fk.export(self.model, self.folder / "standard")
        assert same(snapshot(self.model), self.before), "exporting leaves the model as it was"
        return self.folder / "standard"

    def plainly(self, folder: Path) -> Any:
        """The folder opened by transformers' own class."""
        return getattr(transformers, self.family.model_class).from_pretrained(folder)


class Shelf:
    """Saves each family's model once, when it is first asked for; a failure is that family's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saved = cache(self._save)

    def _save(self, name: str, form: str) -> Saved:
        folder = self.root / f"{name}@{form}"
        folder.mkdir()
        model = applied(FAMILIES[name], layers=FORMS[form])
        return Saved(FAMILIES[name], model, folder, snapshot(model))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def each_form(first: str | None) -> pytest.MarkDecorator:
    """Each kind of FFN in both forms, every family in the first one where it is given, the others with the slow tests.

    A compact checkpoint has more to say where layers differ.
    """
    cases = [(name, form) for name in NAMES for form in FORMS]
    fast = [name in KINDS or form == first for name, form in cases]
    marked = [c if f else pytest.param(*c, marks=pytest.mark.slow) for c, f in zip(cases, fast, strict=True)]
    return pytest.mark.parametrize(("name", "form"), marked)


@each_form("ragged")
def test_compact_checkpoints_reload(name: str, form: str, shelf: Shelf) -> None:
    saved = shelf.saved(name, form)
    loaded = eager(fk.load(saved.compact))
    assert type(loaded) is type(saved.model)
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in saved.model.modules()]
    assert same(reloadable(loaded), reloadable(saved.model))
    compare(saved.family, loaded, saved.model, 1e-6)  # equal bits; the order of sums may follow their place in memory


@pytest.mark.parametrize("form", FORMS)
@EACH_KIND
def test_transformers_own_classes_open_compact_checkpoints_too(name: str, form: str, shelf: Shelf) -> None:
    """With ffnkit imported."""
    saved = shelf.saved(name, form)
    loaded, hooked = eager(fk.load(saved.compact)), eager(saved.plainly(saved.compact))
    assert same(snapshot(hooked), snapshot(loaded))
    assert [type(m) for m in hooked.modules()] == [type(m) for m in loaded.modules()]


@each_form(None)
def test_standard_exports_reload(name: str, form: str, shelf: Shelf) -> None:
    saved = shelf.saved(name, form)
    plain = eager(saved.plainly(saved.standard))
    widths = {ffn.name: ffn.width for ffn in ffns(saved.model)}
    padded = saved.report.padded
    assert (f"{len(padded)} FFNs padded with zeros" in str(saved.report)) == bool(padded)
    original = saved.family.model()
    assert list(plain.state_dict()) == list(original.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    compare(saved.family, plain, saved.model, RELOADED)
    assert "quantization_config" not in json.loads((saved.standard / "config.json").read_text())
    if len(saved.family.shapes) == len(saved.family.width_keys) == 1:
        assert [config_value(plain.config, key) for key in saved.family.width_keys] == [max(widths.values())]
        assert padded == tuple(n for n, width in widths.items() if width < max(widths.values()))


# A fresh process -----------------------------------------------------------------------------------------------------

WORKER = """
import json, sys
from pathlib import Path

root, source = Path(sys.argv[1]), sys.argv[2]
sys.modules["ffnkit"] = None  # importing it raises
import torch, transformers
from families import FAMILIES
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def error(family, folder, opened):
    try:
        outputs = family.outputs(opened(folder).eval())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    expected = load_file(folder.parent / "outputs.safetensors")
    return max(((outputs[k] - expected[k]).norm() / expected[k].norm()).item() for k in expected)


cases = [(case, FAMILIES[case.name.split("@")[0]]) for case in sorted(root.iterdir())]
found = {"plain": {}, "ffnkit": {}}
for case, family in cases:
    for form in ("compact", "standard"):
        plainly = getattr(transformers, family.model_class).from_pretrained
        found["plain"][f"{case.name}/{form}"] = error(family, case / form, plainly)
assert not [name for name in sys.modules if name.startswith("ffnkit.")]
del sys.modules["ffnkit"]
sys.path.insert(0, source)
import ffnkit as fk

for case, family in cases:
    found["ffnkit"][f"{case.name}/compact"] = error(family, case / "compact", fk.load)
print(json.dumps(found))
"""


class Reopened:
    """What fresh processes find in the folders of the families asked for, each first without ffnkit and then with it.

    One process opens some of them, when the first of those is asked for: all of the full product would take minutes.
    """

    AT_ONCE = 20

    def __init__(self, cases: list[tuple[str, str]], root: Path) -> None:
        self.root = root
        self.groups = [cases[i : i + self.AT_ONCE] for i in range(0, len(cases), self.AT_ONCE)]
        self.opened = cache(self._opened)

    def found(self, kind: str, name: str, form: str, folder: str) -> float | str:
        """The relative error of the outputs, or what was raised."""
        group = next(i for i, cases in enumerate(self.groups) if (name, form) in cases)
        return self.opened(group)[kind][f"{name}@{form}/{folder}"]

    def _opened(self, group: int) -> dict[str, dict[str, float | str]]:
        root = self.root / str(group)
        root.mkdir()
        shelf = Shelf(root)
        for name, form in self.groups[group]:
            with contextlib.suppress(Exception):  # told by the tests above, and by the missing folder below
                saved = shelf.saved(name, form)
                outputs = {k: v.contiguous() for k, v in saved.family.outputs(saved.model).items()}
                save_file(outputs, saved.folder / "outputs.safetensors")
                _ = saved.compact, saved.standard
        command = [sys.executable, "-c", WORKER, str(root), str(Path(fk.__file__).parents[1])]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, dict[str, float | str]] = json.loads(done.stdout.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def reopened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reopened:
    items = [item for item in request.session.items if item.module is request.module]
    asked = [item.callspec.params for item in items if "reopened" in item.fixturenames]
    cases = sorted({(params["name"], params["form"]) for params in asked})
    return Reopened(cases, tmp_path_factory.mktemp("reopened"))


@pytest.mark.parametrize("form", FORMS)
@EACH_KIND
def test_a_fresh_process_opens_compact_with_ffnkit(name: str, form: str, reopened: Reopened) -> None:
    found = reopened.found("ffnkit", name, form, "compact")
    assert isinstance(found, float) and found <= RELOADED, found


@pytest.mark.parametrize("form", FORMS)
@EACH_KIND
def test_a_fresh_process_without_ffnkit_opens_standard(name: str, form: str, reopened: Reopened) -> None:
    found = reopened.found("plain", name, form, "standard")
    assert isinstance(found, float) and found <= RELOADED, found


@pytest.mark.parametrize("form", FORMS)
@EACH_KIND
def test_a_fresh_process_without_ffnkit_refuses_compact(name: str, form: str, reopened: Reopened, shelf: Shelf) -> None:
    assert (shelf.saved(name, form).compact / "config.json").is_file()
    found = reopened.found("plain", name, form, "compact")
    assert isinstance(found, str), f"opened without ffnkit, relative error {found}"
