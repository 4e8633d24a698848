"""Linears that are more than a weight and a bias: edited rightly or refused in one line, never saved wrongly."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import crossed
from tolerance import assert_close, assert_differs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.linear import (
    PLAIN,
    check_untouched,
    features,
    is_linear,
    linears,
    obstacle,
    stored_weight,
    true_weight,
    unwrapped,
)

NAMES = ("bert", "gpt2", "llama", "t5")

Change = Callable[[nn.Module, str], Any]
Undo = Callable[[nn.Module, str], Any]


def _linear(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _compiled(model: nn.Module, name: str) -> None:
    model.set_submodule(name, torch.compile(_linear(model, name), backend="eager"))


def _owner_compiled(model: nn.Module, name: str) -> None:
    owner = name.rpartition(".")[0]
    model.set_submodule(owner, torch.compile(_linear(model, owner), backend="eager"))


def _lora(model: nn.Module, name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(r=2, target_modules=[name], init_lora_weights=False), model)


def _added(model: Any, name: str) -> None:
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(LoraConfig(r=2, target_modules=[name], init_lora_weights=False))


def _merged(model: nn.Module, name: str) -> None:
    layer = _linear(model, name)
    layer.merge()
    model.set_submodule(name, layer.base_layer)
    model.__dict__.pop("peft_config", None)
    model.__dict__["_hf_peft_config_loaded"] = False


def _pruned(model: nn.Module, name: str) -> None:
    prune.l1_unstructured(_linear(model, name), "weight", amount=0.3)


def _pruned_bias(model: nn.Module, name: str) -> None:
    linear = _linear(model, name)
    if linear.bias is None:
        pytest.skip("this linear has no bias")
    prune.random_unstructured(linear, "bias", amount=0.5)


def _parametrized(kind: Callable[[nn.Module], Any]) -> Change:
    return lambda model, name: kind(_linear(model, name))


def _plain(model: nn.Module, name: str) -> None:
    parametrize.remove_parametrizations(_linear(model, name), "weight")


def _inside(model: nn.Module, name: str) -> None:
    model.set_submodule(name, _linear(model, name)._orig_mod)


def _owner_inside(model: nn.Module, name: str) -> None:
    owner = name.partition("._orig_mod")[0].rpartition(".")[0]
    model.set_submodule(owner, _linear(model, owner)._orig_mod)


# How a linear is made more than a weight and a bias, and the way back that the refusal names.
KINDS: dict[str, tuple[Change, Undo, str]] = {
    "weight_norm": (_parametrized(parametrizations.weight_norm), _plain, "remove_parametrizations"),
    "spectral_norm": (_parametrized(parametrizations.spectral_norm), _plain, "remove_parametrizations"),
    "orthogonal": (_parametrized(parametrizations.orthogonal), _plain, "remove_parametrizations"),
    "old weight_norm": (
        _parametrized(nn.utils.weight_norm),
        lambda model, name: nn.utils.remove_weight_norm(_linear(model, name)),
        "remove_weight_norm",
    ),
    "old spectral_norm": (
        _parametrized(nn.utils.spectral_norm),
        lambda model, name: nn.utils.remove_spectral_norm(_linear(model, name)),
        "remove_spectral_norm",
    ),
    "prune": (_pruned, lambda model, name: prune.remove(_linear(model, name), "weight"), "prune.remove"),
    "prune bias": (_pruned_bias, lambda model, name: prune.remove(_linear(model, name), "bias"), "prune.remove"),
    "inject_adapter_in_model": (_lora, _merged, "merge_and_unload"),
    "add_adapter": (_added, _merged, "merge_and_unload"),
    "compiled linear": (_compiled, _inside, "_orig_mod"),
    "compiled owner": (_owner_compiled, _owner_inside, "_orig_mod"),
}

METHODS: dict[str, Callable[[], Any]] = {
    "fusion": lambda: fk.Fusion(width=0.5),
    "magnitude": lambda: methods.Magnitude(width=0.5),
    "prune": lambda: fk.Prune(sparsity=0.5, targets="all"),
    "heads": lambda: fk.RemoveHeads(remove=1),
    "sparsegrad": lambda: fk.SparseGrad(density=0.1, basis="none", choose="random", modules_to_train=()),
    "dsee": lambda: fk.DSEE(rank=2, nonzeros=4, modules_to_train=()),
}


def down(model: nn.Module) -> str:
    """The path of the first FFN's down."""
    ffn = ffns(model)[0]
    return f"{ffn.name}.{ffn.path('down')}"


@functools.cache
def plans(name: str) -> list[fk.Plan]:
    """A plan of each method for the family's model as it was made."""
    model = FAMILIES[name].model()
    return [fk.plan(model, make()) for make in METHODS.values()]


def refused(call: Callable[[], Any], way: str) -> None:
    with pytest.raises(FfnkitError) as error:
        call()
    assert "\n" not in str(error.value)
    assert way in str(error.value)


@pytest.fixture(autouse=True)
def _collected() -> Any:
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), crossed(KINDS, NAMES))
def test_it_is_refused_in_one_line_by_all_that_edits_and_saves(kind: str, name: str, tmp_path: Path) -> None:
    change, undo, way = KINDS[kind]
    model: Any = FAMILIES[name].model()
    before = model.state_dict().keys()
    path = down(model)
    change(model, path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for make in METHODS.values():
        refused(lambda make=make: fk.plan(model, make()), way)  # type: ignore[misc]
    for plan in plans(name):
        refused(lambda plan=plan: fk.apply(model, plan), way)  # type: ignore[misc]
    refused(lambda: fk.fold(model), way)
    refused(lambda: fk.save(model, tmp_path / "compact"), way)
    refused(lambda: fk.export(model, tmp_path / "standard"), way)
    assert not list(tmp_path.iterdir())
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    undo(model, path)  # the control: without it everything works again
    assert model.state_dict().keys() == before
    fk.apply(model, fk.plan(model, METHODS["fusion"]()))
    if name != "gpt2":  # one family's files are enough
        return
    with torch.no_grad():
        inputs = FAMILIES[name].inputs(model)
        fk.save(model, tmp_path / "compact")
        given = FAMILIES[name].outputs(model, inputs)
        again = FAMILIES[name].outputs(fk.load(tmp_path / "compact").eval(), inputs)
    for key in given:
        assert_close(again[key], given[key], what=key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_linear_of_attention_counts_too(name: str, method: str) -> None:
    from ffnkit.model.attention import attentions

    model: Any = FAMILIES[name].model()
    first = attentions(model)[0]
    path = f"{first.name}.{first.layout.o}"
    parametrizations.weight_norm(model.get_submodule(path))
    refused(lambda: fk.plan(model, METHODS[method]()), "remove_parametrizations")
    _plain(model, path)
    fk.apply(model, fk.plan(model, METHODS[method]()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_model_is_refused(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = FAMILIES[name].model()
    wrapped: Any = torch.compile(model, backend="eager")
    for call in (lambda: fk.plan(wrapped, METHODS["fusion"]()), lambda: fk.save(wrapped, tmp_path / "compact")):
        refused(call, "model._orig_mod")
    path = down(model)
    parallel = nn.DataParallel(model)
    refused(lambda: fk.plan(parallel, METHODS["fusion"]()), "model.module")
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules=[path]))
    for call in (lambda: fk.plan(tuned, METHODS["fusion"]()), lambda: fk.save(tuned, tmp_path / "compact")):
        refused(call, "merge_and_unload")
    plain = tuned.merge_and_unload()
    fk.apply(plain, fk.plan(plain, METHODS["fusion"]()))


def test_a_sharded_model_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = FAMILIES["llama"].model()
    plan = fk.plan(model, METHODS["fusion"]())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (1,)))
        refused(lambda: fk.apply(model, plan), "shard after")
        assert len(ffns(model)) == 3
    finally:
        dist.destroy_process_group()


def test_convolutions_of_a_familys_own_are_no_obstacle() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    check_untouched(model, "editing")
    with pytest.raises(FfnkitError, match="0 is parametrized"):
        check_untouched(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "editing")
    prune.random_unstructured(model[0].parametrizations.weight, "original1", amount=0.5)  # no family prunes its own
    with pytest.raises(FfnkitError, match="prune"):
        check_untouched(model, "editing")


# --- what stands behind it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_found_and_its_true_weight_is_what_it_multiplies_by(kind: str, name: str) -> None:
    model: Any = FAMILIES[name].model().double()
    path = down(model)
    shape, count, plain = features(_linear(model, path)), len(ffns(model)), true_weight(_linear(model, path)).clone()
    names = [n for n, _ in linears(model)]
    KINDS[kind][0](model, path)
    if kind != "compiled owner":
        linear = _linear(model, path)
        assert is_linear(linear) and features(linear) == shape and obstacle(linear) is not None
        assert [n for n, _ in linears(model)] == names
        assert isinstance(unwrapped(linear), PLAIN) and isinstance(stored_weight(linear), nn.Parameter)
        stored = unwrapped(linear)
        bias = 0 if stored.bias is None else stored.bias
        for parameter in (p for p in linear.parameters() if p.ndim == 2 and p.requires_grad):
            parameter.data += 0.1 * torch.randn_like(parameter)  # hooks compute the weight in the next forward only
        weight = true_weight(linear).detach().clone()
        x = torch.randn(3, shape[1], dtype=torch.float64)
        assert tuple(weight.shape) == shape
        assert_close(x @ weight.mT + bias, linear(x), rel=1e-12)
        if "bias" not in kind:
            assert_differs(weight, plain)
    assert len(ffns(model)) == count or kind == "compiled owner"


def test_what_a_subclass_holds_beside_weight_and_bias_is_no_plain_linear() -> None:
    class Low(nn.Linear):
        def __init__(self, *sides: int) -> None:
            super().__init__(*sides)
            self.lora_A = nn.Parameter(torch.zeros(2, sides[0]))

    model: Any = FAMILIES["llama"].model()
    made = Low(24, 16)
    model.model.layers[1].mlp.down_proj = made
    with pytest.raises(FfnkitError, match="lora_A beside weight and bias"):
        fk.plan(model, fk.Fusion(width=0.5))
    assert obstacle(nn.Linear(3, 3)) is None
    fk.plan(model, fk.Fusion(width=0.5, layers="0"))
