"""The proof of every row of the layouts: reading and writing the neurons of an FFN is exact, and it is the FFN."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import transformers
from families import CLAMPED, FAMILIES, GATED, NAMES
from family import Family, config_value
from tolerance import assert_close, assert_differs
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops.neurons import Neurons

EXACT = 1e-12


def permuted(neurons: Neurons, seed: int, *, only_up: bool = False) -> Neurons:
    """The neurons in another order, each expert's in its own; with ``only_up`` the rest stays where it was."""
    generator = torch.Generator().manual_seed(seed)
    shape = neurons.up.shape[:-1]
    order = torch.argsort(torch.rand(shape, generator=generator), dim=-1)

    def rows(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else torch.take_along_dim(value, order[..., None], dim=-2)

    def entries(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else torch.take_along_dim(value, order, dim=-1)

    up = dataclasses.replace(neurons, up=rows(neurons.up))
    if only_up:
        return up
    return dataclasses.replace(
        up,
        gate=rows(neurons.gate),
        up_bias=entries(neurons.up_bias),
        gate_bias=entries(neurons.gate_bias),
        down=torch.take_along_dim(neurons.down, order[..., None, :], dim=-1),
    )


def double(family: Family) -> nn.Module:
    return family.model().double()


@pytest.mark.parametrize("name", NAMES)
def test_ffns_are_found_as_expected(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    found = ffns(model)
    assert Counter((f.width, f.gated, f.experts) for f in found) == family.shapes
    if family.stacks:
        assert Counter(f.stack for f in found) == family.stacks
    assert len({f.name for f in found}) == len(found)
    for key, width in family.width_keys.items():
        assert config_value(model.config, key) in (width, None)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_agree_with_the_tensors(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    mine = {id(p) for p in model.parameters()}
    seen: set[int] = set()
    for ffn in ffns(model):
        neurons = ffn.read()
        assert neurons.up.shape[-2:] == (ffn.width, ffn.d)
        assert neurons.down.shape[-2:] == (ffn.d, ffn.width)
        assert (neurons.gate is not None) == ffn.gated
        assert neurons.up.ndim == (3 if ffn.experts else 2)
        parameters = ffn.parameters()
        assert (
            sum(p.numel() for p in parameters)
            == ffn.num_parameters
            == sum(t.numel() for t in neurons.tensors().values())
        )
        ids = {id(p) for p in parameters}
        assert ids <= mine, "an FFN's parameters are the model's"
        assert not ids & seen, "no parameter belongs to two FFNs"
        seen |= ids


@pytest.mark.parametrize("name", NAMES)
def test_read_then_write_changes_no_bit(name: str) -> None:
    model = FAMILIES[name].model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    for ffn in ffns(model):
        ffn.write(ffn.read())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [id(p) for p in model.parameters()] == parameters, "an equal shape is written in place"
    for ffn in ffns(model):  # the control: the comparison above sees a write
        ffn.write(ffn.read().map(lambda value: value + 1))
    assert not all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", NAMES)
def test_reading_gives_what_was_written(name: str) -> None:
    model = FAMILIES[name].model()
    for index, ffn in enumerate(ffns(model)):
        written = permuted(ffn.read().map(torch.clone), seed=index)
        ffn.write(written)
        read = ffn.read().tensors()
        assert read.keys() == written.tensors().keys()
        for key, value in written.tensors().items():
            assert torch.equal(read[key], value), f"{ffn.name} {key}"


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_neurons_is_free(name: str) -> None:
    family = FAMILIES[name]
    model = double(family)
    expected = family.outputs(model)
    for index, ffn in enumerate(ffns(model)):
        ffn.write(permuted(ffn.read().map(torch.clone), seed=index))
    for key, value in family.outputs(model).items():
        assert_close(value, expected[key], rel=EXACT, what=f"{name} {key}")


@pytest.mark.parametrize("name", NAMES)
def test_order_of_up_alone_is_not(name: str) -> None:
    """The control of the test above, for every FFN on its own."""
    family = FAMILIES[name]
    model = double(family)
    expected = family.outputs(model)
    for index, ffn in enumerate(ffns(model)):
        neurons = ffn.read().map(torch.clone)
        ffn.write(permuted(neurons, seed=index, only_up=True))
        assert_changed(family.outputs(model), expected, f"{name} {ffn.name}")
        ffn.write(neurons)


@pytest.mark.parametrize("name", [name for name in GATED if name not in CLAMPED])
def test_up_is_the_linear_side_of_a_gate(name: str) -> None:
    """(up, down) and (a up, down / a) are the same FFN for any a, of either sign; (gate, down) are not."""
    family = FAMILIES[name]
    model = double(family)
    expected = family.outputs(model)
    original = [ffn.read().map(torch.clone) for ffn in ffns(model)]
    for ffn, neurons in zip(ffns(model), original, strict=True):
        bias = None if neurons.up_bias is None else -2 * neurons.up_bias
        ffn.write(dataclasses.replace(neurons, up=-2 * neurons.up, up_bias=bias, down=-0.5 * neurons.down))
    for key, value in family.outputs(model).items():
        assert_close(value, expected[key], rel=EXACT, what=f"{name} {key}")
    for ffn, neurons in zip(ffns(model), original, strict=True):
        if neurons.gate is not None:
            ffn.write(dataclasses.replace(neurons, gate=-2 * neurons.gate, down=-0.5 * neurons.down))
            assert_changed(family.outputs(model), expected, f"{name} {ffn.name}")
        ffn.write(neurons)


@pytest.mark.parametrize("name", NAMES)
def test_every_ffn_matters(name: str) -> None:
    """Zeros in one ``down`` reach an output, and zeros in all of them change every output by more than 5 percent."""
    family = FAMILIES[name]
    model = double(family)
    expected = family.outputs(model)
    found = ffns(model)
    for ffn in found:
        neurons = ffn.read().map(torch.clone)
        ffn.write(dataclasses.replace(neurons, down=torch.zeros_like(neurons.down)))
        assert_changed(family.outputs(model), expected, f"{name} {ffn.name}")
        ffn.write(neurons)
    for ffn in found:
        neurons = ffn.read()
        ffn.write(dataclasses.replace(neurons, down=torch.zeros_like(neurons.down)))
    for key, value in family.outputs(model).items():
        assert_differs(value, expected[key], rel=0.05, what=f"{name} {key}")


@pytest.mark.parametrize("name", NAMES)
def test_rounding_stays_rounding(name: str) -> None:
    """No routing is near a tie and no norm near zero: a change of 1e-9 in the weights stays of that order."""
    family = FAMILIES[name]
    model = double(family)
    expected = family.outputs(model)
    for ffn in ffns(model):
        ffn.write(ffn.read().map(lambda value: value * (1 + 1e-9)))
    for key, value in family.outputs(model).items():
        assert_close(value, expected[key], rel=2e-7, what=f"{name} {key}")


def assert_changed(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    joined = [torch.cat([value.flatten() for value in found.values()]) for found in (outputs, expected)]
    assert_differs(*joined, rel=1e-4, what=what)


@pytest.mark.parametrize("adapters", [True, False])
def test_an_ffn_with_a_further_path_into_its_neurons_is_none(adapters: bool) -> None:
    """Zamba2's shared FFN adds a low-rank map of its own for each place that it stands in to what up gives."""
    config = transformers.Zamba2Config(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2,
        mamba_d_state=4, mamba_headdim=8, n_mamba_heads=4, mamba_ngroups=1, adapter_rank=2, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"], chunk_size=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Zamba2ForCausalLM(config)
    if adapters:
        with pytest.raises(FfnkitError, match="a further linear works on the hidden neurons"):
            ffns(model)
    else:  # the control: the same block without them
        for module in model.modules():
            module._modules.pop("gate_up_proj_adapter_list", None)
        assert [ffn.width for ffn in ffns(model)] == [24]
