"""Shared FFNs with device maps and under torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_tied_lora import output, tied
from tolerance import assert_close, assert_differs
from torch import nn

import ffnkit as fk
from ffnkit.checkpoint import placement
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns

LAYERS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}


def by_layer(model: nn.Module, layers: str, on_disk: set[int]) -> dict[str, str]:
    """A device map that puts some layers on disk and all else on the CPU."""
    found = {}
    for name, module in model.named_modules():
        outer = f"{name}." if name else ""
        if name == layers:
            found |= {f"{name}.{i}": "disk" if int(i) in on_disk else "cpu" for i, _ in module.named_children()}
        elif not layers.startswith(outer) and not any(name.startswith(f"{key}.") for key in (*found, layers)):
            found[name] = "cpu"
    return found


@pytest.mark.parametrize("on_disk", [set(), {1}, {0, 1}], ids=["cpu", "one layer", "both layers"])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_device_map_keeps_the_tie(name: str, on_disk: set[int], tmp_path: Path) -> None:
    model = tied(name)
    fk.save(model, tmp_path / "compact")
    device_map: Any = by_layer(model, LAYERS[name], on_disk) if on_disk else {"": "cpu"}
    opened = fk.load(tmp_path / "compact", device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert [list(f.owners) for f in ffns(opened)] == [list(f.owners) for f in ffns(model)]
    assert_close(output(name, opened), output(name, model), rel=1e-6)
    if not on_disk:
        with torch.no_grad():
            ffns(opened)[0].parameters()[0].mul_(2)  # the negative control: both layers use it
        assert_differs(output(name, opened), output(name, model))


def test_auto_keeps_the_tie(tmp_path: Path) -> None:
    fk.save(tied("llama"), tmp_path)
    opened = fk.load(tmp_path, device_map="auto")
    assert opened.model.layers[0].mlp is opened.model.layers[1].mlp
    assert_close(output("llama", opened.cpu()), output("llama", tied("llama")), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weights_on_disk_under_a_layer_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    model = tied(name)
    fk.save(model, tmp_path)
    with pytest.raises(FfnkitError, match="which shares its weights, to cpu") as caught:
        fk.load(tmp_path, device_map=by_layer(model, LAYERS[name], {0}), offload_folder=tmp_path / "offloaded")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_on_two_devices_use_one_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has no second device: what crosses comes back, and is counted."""
    model = tied(name)
    before, ffn = output(name, model), ffns(model)[0]
    model.hf_device_map = {"": "cpu"}
    assert placement.bridge(model) == []
    devices = {ffn.name: torch.device("cpu")}
    monkeypatch.setattr(placement, "_runs_on", lambda _, owner: devices.get(owner, torch.device("meta")))
    assert placement.bridge(model) == [ffn.name]
    shared: list[Any] = placement._shared(ffn)
    assert all(module._hf_hook.io_same_device for module in shared)
    assert len({id(owner) for owner in ffn.owners.values()}) == (2 if name == "bert" else 1)
    assert_close(output(name, model), before, rel=1e-6)


def test_where_a_module_computes() -> None:
    device_map = {"": "xpu:1", "model.layers.0": "xpu:0", "model.layers.2": "cpu", "model.layers.3": "disk"}
    found = [str(placement._runs_on(device_map, f"model.layers.{i}.mlp")) for i in range(4)]
    assert found == ["xpu:0", "xpu:1", "xpu:1", "xpu:1"]
    assert placement._runs_on({"": "cpu", "a": "disk"}, "a.b") == torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_and_the_gradient_is_the_sum(name: str, tmp_path: Path) -> None:
    model = tied(name)
    inputs = FAMILIES[name].inputs(model)

    def run(module: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = next(value for value in module(**inputs).values() if isinstance(value, torch.Tensor))
        out.float().square().mean().backward()
        owner = getattr(module, "_orig_mod", module)
        grads = {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}
        owner.zero_grad()
        return out.detach(), grads

    eager, gradients = run(model)
    torch._dynamo.reset()
    compiled, found = run(torch.compile(model, backend="aot_eager"))
    assert_close(compiled, eager)
    assert found.keys() == gradients.keys()
    for key, value in gradients.items():
        assert_close(found[key], value, rel=1e-5, what=key)
    fk.export(model, tmp_path)
    _, apart = run(type(model).from_pretrained(tmp_path).eval())
    ffn = ffns(model)[0]
    first, second = (f"{owner}.{ffn.path('up')}.weight" for owner in ffn.owners)
    assert_close(found[first], apart[first] + apart[second], rel=1e-5)
    assert_differs(found[first], apart[first])
