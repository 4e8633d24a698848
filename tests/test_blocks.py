"""Selecting layers, resolving widths, unknown architectures, shared weights."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.families.ffns import LAYOUTS, Layout
from ffnkit.model.finding import ffns
from ffnkit.model.targets import resolve_width, select
from ffnkit.settings import WhichLayers


def chosen(name: str, layers: str) -> list[tuple[str, int]]:
    return sorted({(f.stack, f.layer) for f in select(ffns(FAMILIES[name].model()), layers)})


def bert(layers: int = 6) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=layers, intermediate_size=24, vocab_size=50)
    )


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last:2", [4, 5]),
        ("first:2", [0, 1]),
        ("1-3", [1, 2, 3]),
        ("1,3, 5", [1, 3, 5]),
        ("0-1,5", [0, 1, 5]),
        ("last:1,0", [0, 5]),
        ("4", [4]),
        (4, [4]),
        ([1, 3], [1, 3]),
        ((3, 1), [1, 3]),
        (range(2, 5), [2, 3, 4]),
        (["0-1", 5, "last:2"], [0, 1, 4, 5]),
    ],
)
def test_layer_expressions(layers: WhichLayers, numbers: list[int]) -> None:
    assert [f.layer for f in select(ffns(bert()), layers)] == numbers


@pytest.mark.parametrize(
    "layers",
    ["6", "4-9", "last:7", "last:0", "5-2", "", "some", "encoder:1", "1,,2", "-1", "last:", 6, -1, [], [1, 6], [-1]],
)
def test_layers_that_do_not_exist_are_refused_and_named(layers: WhichLayers) -> None:
    with pytest.raises(FfnkitError, match="0-5") as error:
        select(ffns(bert()), layers)
    assert "\n" not in str(error.value)


def test_a_stack_before_the_layers_holds_for_what_follows() -> None:
    both = chosen("t5", "0")
    assert both == [("decoder", 0), ("encoder", 0)]
    assert chosen("t5", "encoder:0") == [("encoder", 0)]
    assert chosen("t5", "encoder:0,1") == [("encoder", 0), ("encoder", 1)]
    deepest = max(chosen("t5", "decoder:all"))
    assert chosen("t5", "encoder:0,decoder:last:1") == [deepest, ("encoder", 0)]


@pytest.mark.parametrize(("width", "expected"), [(1, 1), (24, 24), (0.5, 12), (1.0, 24), (0.01, 1)])
def test_widths_as_numbers_and_shares(width: float, expected: int) -> None:
    assert resolve_width(width, 24, "x") == expected


@pytest.mark.parametrize("width", [0, 25, -1, 0.0, 1.5, -0.5, True, "half", float("nan")])
def test_widths_that_do_not_fit_are_refused(width: float) -> None:
    with pytest.raises(FfnkitError, match=r"layer\.0.*Give"):
        resolve_width(width, 24, "layer.0")


class Unknown(nn.Module):
    """An architecture with an FFN of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            nn.Sequential(OrderedDict(inward=nn.Linear(8, 20), act=nn.ReLU(), outward=nn.Linear(20, 8)))
            for _ in range(2)
        )


def test_an_unknown_architecture_is_told_its_mirrored_linears_and_the_row_to_add() -> None:
    with pytest.raises(FfnkitError) as error:
        ffns(Unknown())
    message = str(error.value)
    assert "inward (8 -> 20)" in message and "outward (20 -> 8)" in message and "2 pairs" in message
    assert 'Layout("Unknown", up="inward", down="outward")' in message and "\n" not in message


def test_the_row_of_the_message_makes_it_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ffnkit.model.families.ffns.LAYOUTS", [*LAYOUTS, Layout("Unknown", up="inward", down="outward")]
    )
    assert [(f.layer, f.width, f.d) for f in ffns(Unknown())] == [(0, 20, 8), (1, 20, 8)]


def test_a_model_without_ffns_is_refused() -> None:
    with pytest.raises(FfnkitError, match="no pair of linears"):
        ffns(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_shared_ffns_are_one_with_twins() -> None:
    model = bert(3)
    layers = model.encoder.layer
    layers[2].intermediate, layers[2].output.dense = layers[0].intermediate, layers[0].output.dense
    found = ffns(model)
    assert [list(f.owners) for f in found] == [["encoder.layer.0", "encoder.layer.2"], ["encoder.layer.1"]]


def test_quantized_and_empty_weights_are_refused() -> None:
    import ffnkit as fk

    with torch.device("meta"):
        empty = bert()
    assert fk.inspect(empty).ffn_parameters > 0
    with pytest.raises(FfnkitError, match="meta device"):
        fk.plan(empty, fk.Fusion(width=0.5))
    broken = bert()
    with torch.no_grad():
        broken.encoder.layer[3].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(FfnkitError, match=r"layer\.3.*down holds NaN"):
        fk.plan(broken, fk.Fusion(width=0.5))


SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_what_works_between_up_and_down_is_refused() -> None:
    bitnet = transformers.BitNetModel(transformers.BitNetConfig(**SMALL, num_key_value_heads=2))
    with pytest.raises(FfnkitError, match="a norm, a convolution or"):
        ffns(bitnet)
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    with pytest.raises(FfnkitError, match="a norm, a convolution or"):
        ffns(transformers.SegformerModel(transformers.SegformerConfig(**sizes)))
    # No row is proposed for what it would not hold for; the control has the same names and no convolution.
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    patches = {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [4, 4]}
    for name in ("GLPN", "PvtV2"):
        shrink = {"sr_ratios": [2, 1]}
        config = getattr(transformers, f"{name}Config")(**sizes, **patches, **shrink)
        with pytest.raises(FfnkitError, match="a norm, a convolution or") as caught:
            ffns(getattr(transformers, f"{name}Model")(config))
        assert "LAYOUTS" not in str(caught.value)
    plain = transformers.PvtConfig(**sizes, **patches, sequence_reduction_ratios=[2, 1], image_size=32)
    assert [ffn.width for ffn in ffns(transformers.PvtModel(plain))] == [32, 64]
    # The controls: norms behind the FFN, in its output module, do no harm.
    query = transformers.InstructBlipQFormerConfig(**SMALL, encoder_hidden_size=16)
    assert len(ffns(transformers.InstructBlipQFormerModel(query))) == 2


def test_experts_of_an_unknown_form_are_named() -> None:
    sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "kv_channels": 8, "num_experts_per_tok": 2}
    config = transformers.JetMoeConfig(**sizes)
    with pytest.raises(FfnkitError, match="its experts lie in parameters of a form that is not known"):
        ffns(transformers.JetMoeModel(config))


def test_a_clamped_gate_is_not_linear_in_up() -> None:
    ffn = ffns(FAMILIES["mixtral"].model())[0]
    assert ffn.linear_in_up
    ffn.module.swiglu_limit = 7.0
    assert not ffn.linear_in_up
