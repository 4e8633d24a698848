"""What stays stands for what goes: a factor fitted to data, in weights that are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from methods import slow_but
from tolerance import assert_close, assert_differs
from torch import Tensor, nn

import ffnkit as fk
from ffnkit.calibration.batches import first_tensor
from ffnkit.calibration.reading import output_metric
from ffnkit.edits import Rescale, Tie
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop import layers
from ffnkit.methods.drop.layers import FfnDrop, LayerDrop
from ffnkit.methods.drop.standing import stand_ins
from ffnkit.methods.drop.writers import norm_offset
from ffnkit.model.finding import ffns
from ffnkit.surgery.temporary import temporarily


@pytest.fixture(autouse=True)
def every_factor_is_taken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Whatever it does to the model's end, and fitted to all rows; but where a test judges."""
    if "further" not in request.node.name:
        falling = itertools.count(0, -1)
        monkeypatch.setattr(layers, "Drift", lambda *_: lambda: float(next(falling)))
        monkeypatch.setattr(layers, "apart", lambda batches: (batches, batches))


STREAMS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma2": "model.layers", "gptj": "transformer.h"}


def loud(name: str) -> Any:
    """A model whose layers do much to what passes them."""
    model = FAMILIES[name].model()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def data(name: str, model: nn.Module) -> list[dict[str, Any]]:
    return [FAMILIES[name].inputs(model, seed=seed) for seed in range(3)]


def caught(model: nn.Module, module: nn.Module, batches: list[dict[str, Any]], *, entering: bool) -> Tensor:
    """What enters or leaves a module, of the tokens that count, one after the other."""
    rows: list[Tensor] = []
    mask: list[Tensor] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        value = args[0] if entering else first_tensor(output)
        rows.extend(row for row, counts in zip(value.flatten(0, 1), mask[-1].flatten(), strict=True) if counts)

    handle = module.register_forward_hook(note)
    for batch in batches:
        mask.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return torch.stack(rows).double()


def by_loop(x: Tensor, z: Tensor, *, each: bool, shift: bool) -> tuple[Tensor, Tensor]:
    """Factor and shift of least squares, one equation a token and dimension, each token by one over its size."""
    d = x.shape[1]
    if each:
        pairs = [by_loop(x[:, [j]], z[:, [j]], each=False, shift=shift) for j in range(d)]
        return torch.cat([f for f, _ in pairs]), torch.cat([s for _, s in pairs])
    rows, wanted = [], []
    for token in range(len(x)):
        size = SIZES[token]
        for j in range(d):
            one = torch.zeros(1 + d, dtype=torch.float64)
            one[0], one[1 + j] = x[token, j] / size, (1 / size if shift else 0.0)
            rows.append(one)
            wanted.append(z[token, j] / size)
    found = torch.linalg.lstsq(torch.stack(rows), torch.stack(wanted)[:, None], driver="gelsd").solution[:, 0]
    return found[:1], found[1:]


SIZES: list[Tensor] = []


@pytest.mark.parametrize(
    ("name", "layer_number", "each", "shift"),
    [
        pytest.param("llama", "1", False, False, marks=pytest.mark.slow),
        ("gpt2", "1", False, True),
        ("llama", "2", True, False),
        pytest.param("bert", "1", True, True, marks=pytest.mark.slow),
    ],
)
def test_the_factor_is_that_of_least_squares(name: str, layer_number: str, each: bool, shift: bool) -> None:
    model, number = loud(name), int(layer_number)
    batches = data(name, model)
    plan = fk.plan(model, LayerDrop(layers=layer_number, refit=True), data=batches)
    layer = model.get_submodule(ffns(model)[number].name.partition(f".{number}")[0] + f".{number}")
    if name == "llama" and each:  # behind the last layer the norm's own outputs count
        z = caught(model, model.model.norm, batches, entering=False)
        with temporarily(model, [edit for edit in plan.edits if not isinstance(edit, Rescale)]):
            x = caught(model, model.model.norm, batches, entering=False)
    else:
        x = caught(model, layer, batches, entering=True)
        z = caught(model, layer, batches, entering=False)
    last = ffns(model)[number]
    root = output_metric(model, [last], batches)[last.name].dimensions.double().sqrt()
    root = torch.ones_like(root) if each else root  # a norm's own outputs are what is read
    x, z = x * root, z * root
    SIZES[:] = [row.norm() for row in z]
    factor, moved = by_loop(x, z, each=each, shift=shift)
    [told] = plan.quantities.values()
    assert told["mean factor" if each else "factor"] == pytest.approx(float(factor.mean()), rel=1e-4)
    left = torch.stack([z[t] - factor * x[t] - (moved if shift else 0) for t in range(len(z))]).norm(dim=1)
    error = (left / torch.stack(SIZES)).square().mean().sqrt()
    assert told["output error on the data"] == pytest.approx(float(error), rel=1e-3)
    held = [edit for edit in plan.edits if isinstance(edit, Rescale)]
    if each:
        assert_close(held[0].factor, factor, rel=1e-4)
    else:
        divided = [float(edit.factor) for edit in held if edit.shift is None]
        assert divided == pytest.approx([1 / float(factor)] * 2, rel=1e-4)  # attention and FFN of the layer behind
    if shift:
        [own] = [edit.shift for edit in held if edit.shift is not None]
        assert_close(own, moved if each else moved / root / factor, rel=1e-3)


@pytest.mark.parametrize("name", slow_but({"gemma2"}, STREAMS))
@pytest.mark.parametrize("method", [LayerDrop, pytest.param(FfnDrop, marks=pytest.mark.slow)])
def test_a_plain_checkpoint_gives_what_the_factor_in_the_stream_gives(name: str, method: Any, tmp_path: Path) -> None:
    model = loud(name)
    plan = fk.plan(model, method(layers="1", refit=True), data=data(name, model))
    [told] = plan.quantities.values()
    rest = [edit for edit in plan.edits if not isinstance(edit, Rescale) or edit.shift is not None]
    layer = model.get_submodule(f"{STREAMS[name]}.{0 if method is LayerDrop else 1}")
    with temporarily(model, rest):
        plain = FAMILIES[name].outputs(model)
        handle = layer.register_forward_hook(lambda _, __, output: multiplied(output, told["factor"]))
        wanted = FAMILIES[name].outputs(model)
        handle.remove()
    plan.save(tmp_path / "plan")
    fk.apply(model, fk.Plan.load(tmp_path / "plan"))
    fk.export(model, tmp_path / "plain")
    found = FAMILIES[name].outputs(type(model).from_pretrained(tmp_path / "plain").eval())
    for key, value in found.items():
        assert_close(value, wanted[key], rel=1e-4, what=key)
        assert_differs(plain[key], wanted[key], rel=1e-3, what=key)


def multiplied(output: Any, factor: float) -> Any:
    return output * factor if isinstance(output, Tensor) else (output[0] * factor, *output[1:])


@pytest.mark.slow
def test_gaps_go_one_after_the_other() -> None:
    """The second factor is fitted to what arrives once the first gap is closed."""
    model = loud("llama")
    batches = data("llama", model)
    both = fk.plan(model, FfnDrop(layers="0-1", refit=True), data=batches)
    first, second = both.quantities.values()
    z = caught(model, model.model.layers[1], batches, entering=False)
    gone = [edit for edit in both.edits if not isinstance(edit, Rescale)]
    with temporarily(model, gone):
        handle = model.model.layers[0].register_forward_hook(lambda _, __, y: multiplied(y, first["factor"]))
        x = caught(model, model.model.layers[1], batches, entering=False)
        handle.remove()
    last = ffns(model)[1]
    root = output_metric(model, ffns(model)[:2], batches)[last.name].dimensions.double().sqrt()
    x, z = x * root, z * root
    weights = 1 / z.square().sum(1)
    factor = float(((x * z).sum(1) * weights).sum() / ((x * x).sum(1) * weights).sum())
    assert second["factor"] == pytest.approx(factor * first["factor"], rel=1e-4)


@pytest.mark.slow
def test_an_output_bias_gives_the_mean_of_the_ffn_that_went() -> None:
    model = loud("bert")
    batches = data("bert", model)
    mean = caught(model, model.bert.encoder.layer[1].output.dense, batches, entering=False).mean(0)
    plan = fk.plan(model, FfnDrop(layers="1", refit=True), data=batches)
    fk.apply(model, plan)
    assert_close(model.bert.encoder.layer[1].output.dense.bias, mean, rel=1e-5)
    assert not fk.plan(loud("bert"), FfnDrop(layers="1")).edits[0].down_bias.any()


@torch.no_grad()
def test_each_expert_gives_the_mean_of_its_tokens_weighed_as_they_are_routed() -> None:
    model, seen = loud("gpt-oss").eval(), []
    batches, ffn = data("gpt-oss", model), ffns(model)[1]
    hook = ffn.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    for batch in batches:
        model(**batch)
    hook.remove()
    plan = fk.plan(model, FfnDrop(layers="1", refit=True), data=batches)
    sums, counts = torch.zeros(ffn.experts, ffn.d), torch.zeros(ffn.experts, 1)
    for values, batch in zip(seen, batches, strict=True):
        tokens, index, weights = (value.flatten(0, -2) for value in values)
        for row in batch["attention_mask"].flatten().nonzero().flatten().tolist():
            for number, share in zip(index[row].tolist(), weights[row].tolist(), strict=True):
                alone = torch.full((1, 1), number), torch.ones(1, 1)
                sums[number] += share**2 * ffn.module(tokens[row][None], *alone)[0]
                counts[number] += share**2
    bias = plan.edits[0].down_bias
    assert_close(bias, sums / counts.clamp_min(1e-30), rel=1e-4)
    assert_differs(bias[0], bias[1])
    fk.apply(model, plan)
    assert torch.equal(ffn.module.down_proj_bias, bias)


@pytest.mark.parametrize("method", [LayerDrop, FfnDrop])
@pytest.mark.parametrize("refit", [False, True])
def test_no_window_where_each_stack_has_one_ffn(method: Any, refit: bool) -> None:
    model = loud("albert")
    with pytest.raises(FfnkitError, match="no two FFNs of the model lie in one stack"):
        fk.plan(model, method(window=1, refit=refit), data=data("albert", model))


def test_where_no_weight_can_hold_a_factor_it_is_said() -> None:
    for name, method in (("olmo2", LayerDrop(layers="1", refit=True)), ("albert", FfnDrop(layers="0", refit=True))):
        model = loud(name)
        with pytest.raises(FfnkitError, match="refitting what stays without") as caught_:
            fk.plan(model, method, data=data(name, model))
        assert "\n" not in str(caught_.value)
    with pytest.raises(FfnkitError, match="it measures activations"):
        fk.plan(loud("llama"), LayerDrop(layers="1", refit=True))


@pytest.mark.slow
@pytest.mark.parametrize("extras", [False, True])
def test_a_shared_ffn_on_both_sides_of_a_gap(extras: bool) -> None:
    """With a scale of their own each member takes its own factor; else there is no place for two."""
    model = loud("gpt2")
    batches = data("gpt2", model)
    merging: Callable[..., Any] = fk.CalibratedMerging
    fk.apply(model, fk.plan(model, merging(groups=[[0, 2]], refine=0, extras=extras), data=batches))
    assert any(ffn.tied for ffn in ffns(model))
    if not extras:
        with pytest.raises(FfnkitError, match="shares its weights with layers before it"):
            fk.plan(model, LayerDrop(layers="1", refit=True), data=batches)
        return
    plan = fk.plan(model, LayerDrop(layers="1", refit=True), data=batches)
    [told] = plan.quantities.values()
    with temporarily(model, [edit for edit in plan.edits if not isinstance(edit, Rescale) or edit.shift is not None]):
        handle = model.transformer.h[0].register_forward_hook(lambda _, __, output: multiplied(output, told["factor"]))
        wanted = FAMILIES["gpt2"].outputs(model)
        handle.remove()
    fk.apply(model, plan)
    assert not any(isinstance(edit, Tie) for edit in plan.edits) and any(ffn.tied for ffn in ffns(model))
    for key, value in FAMILIES["gpt2"].outputs(model).items():
        assert_close(value, wanted[key], rel=1e-4, what=key)


@pytest.mark.slow
def test_a_factor_that_moves_the_model_further_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud("llama")
    batches = data("llama", model)
    for after, taken in ((2.0, False), (0.5, True)):
        told = itertools.cycle((1.0, after))
        monkeypatch.setattr(layers, "Drift", lambda *_, told=told: lambda: next(told))
        plan = fk.plan(model, LayerDrop(layers="1", refit=True), data=batches)
        assert any(isinstance(edit, Rescale) for edit in plan.edits) == taken
        assert plan.quantities["model.layers.1.mlp"]["moved with it"] == after


def test_what_norms_add_to_their_weight() -> None:
    norms = {"llama": 0, "gemma2": 1, "bert": 0}
    for name, offset in norms.items():
        model = loud(name)
        norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
        assert norm_offset(norm) == offset

    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    assert norm_offset(Odd(4)) is None
    assert stand_ins(model, data("bert", model), []) == ([], {})


@pytest.mark.slow
def test_a_model_that_does_not_run_without_the_layer_is_one_line() -> None:
    """Of Qwen3-Next the only layer with keys and values: refitting runs the model without it."""
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    shape |= {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    shape |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    config = transformers.Qwen3NextConfig(vocab_size=99, shared_expert_intermediate_size=8, **shape)
    model: Any = transformers.Qwen3NextForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(5, 90, (2, 6))}]
    with pytest.raises(FfnkitError, match="does not run"):
        fk.plan(model, LayerDrop(layers="last:1", refit=True), data=batches)
