"""Blockwise: block by block gives what whole passes give, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from families import FAMILIES
from test_contract import same, snapshot
from test_layer_numbers import gemma3n, llava
from tolerance import assert_close, relative_error

import ffnkit as fk
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.methods.drop.layers import LayerDrop
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.running import FEW
from ffnkit.surgery.temporary import with_neurons

NAMES = ("bert", "gpt2", "llama", "t5", "bart", "albert", "clip", "whisper", "mixtral", "llama4", "switch", "vit")


SIZES = {"vocab_size": 99, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "d_model": 16}
STACKS = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = T.BartConfig(**SIZES, **STACKS, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=200)
T5 = T.T5Config(**SIZES, d_kv=8, d_ff=40, num_layers=3, num_heads=2)
ENDING = [(T.BartForSequenceClassification, BART), (T.T5ForSequenceClassification, T5)]


class Outputs:
    """What every FFN gave, in order."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {}

    def add(self, ffn: FFN, acts: Activations) -> None:
        self.parts.setdefault(ffn.name, []).append(acts.kept().output)

    def all(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


def replayed(model: Any, batches: list[Any], found: list[FFN]) -> dict[str, torch.Tensor]:
    outputs = Outputs()
    with Blockwise(model, batches, found) as blocks:
        for group in blocks.groups:
            blocks.watch(group, outputs.add)
            blocks.advance(group)
    return outputs.all()


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_equals_whole_passes(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    batches = [family.inputs(model, seed=seed) for seed in range(3)]
    before = snapshot(model)
    expected = Outputs()
    watch(model, batches, ffns(model), expected.add)
    wanted = expected.all()
    for found in (ffns(model), ffns(model)[-1:]):
        got = replayed(model, batches, found)
        for ffn in found:
            if ffn.name in wanted:  # few tokens may leave an expert out
                assert_close(got[ffn.name], wanted[ffn.name], rel=1e-5, what=ffn.name)
    assert same(snapshot(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_installed_ffn_changes_later_layers_and_goes_again() -> None:
    family = FAMILIES["llama"]
    model = family.model()
    batches = [family.inputs(model, seed=0)]
    found = ffns(model)
    plain = replayed(model, batches, found)
    identities = [id(p) for p in model.parameters()]
    outputs = Outputs()
    with Blockwise(model, batches, found) as blocks:
        for number, group in enumerate(blocks.groups):
            blocks.watch(group, outputs.add)
            if number == 0:
                blocks.install(group[0], group[0].read().take(torch.arange(3)))
            blocks.advance(group)
    changed = outputs.all()
    assert_close(changed[found[0].name], plain[found[0].name], rel=1e-6)
    assert relative_error(changed[found[1].name], plain[found[1].name]) > 1e-3
    assert [id(p) for p in model.parameters()] == identities
    again = replayed(model, batches, found)
    assert_close(again[found[-1].name], plain[found[-1].name], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_beside_a_pass_leaves_no_hook(name: str) -> None:
    """Where a layer itself holds the linears of its FFN (BERT), what lends it other neurons puts its hooks back too."""
    family = FAMILIES[name]
    model = family.model()
    batches = [family.inputs(model, seed=seed) for seed in range(2)]
    dense = [ffn for ffn in ffns(model) if not ffn.experts and ffn.active == 1]
    if not dense:
        pytest.skip("experts alone")
    few = dense[0].read().map(torch.Tensor.detach).take(torch.arange(3))
    outputs, wanted = Outputs(), Outputs()
    with with_neurons(dense[0], few):
        watch(model, batches, ffns(model), wanted.add)
    before = hooks(model)
    with Blockwise(model, batches, ffns(model), lambda: with_neurons(dense[0], few)) as blocks:
        for group in blocks.groups:
            blocks.watch(group, outputs.add)
            blocks.advance(group)
        blocks.finish(0)
    assert hooks(model) == before
    got = outputs.all()
    for ffn, values in wanted.all().items():
        assert_close(got[ffn], values, rel=1e-5, what=ffn)


def hooks(model: Any) -> dict[str, list[Any]]:
    found = {}
    for name, module in model.named_modules():
        found[name] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return found


@pytest.mark.parametrize(("given", "config"), ENDING, ids=["bart", "t5"])
def test_rows_that_end_with_a_token_are_not_cut_where_it_is_read(given: type, config: Any) -> None:
    """Classifiers of two stacks read the state of the token that ends a row; rows here are longer than few tokens."""
    torch.manual_seed(0)
    model = given(config).eval()
    ids = torch.randint(3, 99, (3, 2 * FEW + 7))
    ids[:, -1] = 2
    ids[1, FEW - 9 :] = 1
    ids[1, FEW - 10] = 2
    batches = [{"input_ids": ids, "attention_mask": ids.ne(1).long()}]
    found = ffns(model)
    expected = Outputs()
    watch(model, batches, found, expected.add)
    got = replayed(model, batches, found)
    for name, values in expected.all().items():
        assert_close(got[name], values, rel=1e-5, what=name)
    for method in (fk.FitTo(params=0.8, effort="fast"), LayerDrop(layers="1")):
        fk.plan(model, method, data=batches)


def test_a_block_that_stays_runs_once_and_gives_the_same() -> None:
    family = FAMILIES["bert"]
    model = family.model()
    batches = [family.inputs(model, seed=seed) for seed in range(2)]
    found = ffns(model)
    calls: list[str] = []
    handles = [ffn.linear("down").register_forward_hook(lambda *_, name=ffn.name: calls.append(name)) for ffn in found]
    runs = {}
    for last in (True, False):
        calls.clear()
        outputs = Outputs()
        with Blockwise(model, batches, found) as blocks:
            for group in blocks.groups:
                blocks.watch(group, outputs.add, last=last)
                blocks.advance(group)
        runs[last] = outputs.all(), calls.count(found[-1].name)
    for handle in handles:
        handle.remove()
    for name, output in runs[False][0].items():
        assert_close(runs[True][0][name], output, rel=1e-6, what=name)
    assert runs[True][1] == runs[False][1] - len(batches)


# States of the middle -------------------------------------------------------------------------------------------------

LAYERED = ("llava", "gemma3n")  # the language takes the last state but one; the last layers take keys of earlier ones


def layered(name: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model = llava(vision_feature_layer=-2) if name == "llava" else gemma3n(2)
    ids = torch.randint(5, 80, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    if name == "gemma3n":
        return model, [{"input_ids": each} for each in ids]
    images = torch.full((2, 16), 90)
    pixels = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model, [
        {"input_ids": torch.cat((images, each), 1), "pixel_values": own} for each, own in zip(ids, pixels, strict=True)
    ]


@pytest.mark.parametrize("name", LAYERED)
def test_states_of_the_middle_are_there_for_who_takes_them(name: str) -> None:
    model, batches = layered(name)
    expected = Outputs()
    watch(model, batches, ffns(model), expected.add)
    got = replayed(model, batches, ffns(model))
    for key, wanted in expected.all().items():
        assert_close(got[key], wanted, rel=1e-5, what=key)


def test_a_stack_behind_is_not_run_again_where_its_last_output_is_all() -> None:
    family = FAMILIES["bart"]
    model = family.model()
    runs = [0]
    model.model.encoder.layers[0].fc1.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    batches = [family.inputs(model, seed=seed) for seed in range(20)]
    with Blockwise(model, batches, ffns(model)) as blocks:
        for group in blocks.groups:
            blocks.watch(group, lambda *_: None, last=True)
            blocks.advance(group)
    assert runs[0] < 30  # once a batch, and what walking through the first one costs


def test_without_the_walk_the_wrong_states_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the last vision block gave would pass for what each of them gave."""
    monkeypatch.setattr(Blockwise, "_walk", lambda _: None)
    model, batches = layered("llava")
    expected = Outputs()
    watch(model, batches, ffns(model), expected.add)
    got, wanted = replayed(model, batches, ffns(model)), expected.all()
    assert max(relative_error(got[key], wanted[key]) for key in wanted) > 0.01
