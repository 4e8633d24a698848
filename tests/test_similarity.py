"""How alike layers are: CKA against the definition, matched neurons, one pass over the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tolerance import assert_close
from torch import Tensor

import ffnkit as fk
from ffnkit.analysis.similarity import similarity
from ffnkit.calibration.features import Features, attention_outputs
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops.similarity import gram_cka, linear_cka, rbf_gram, unbiased_cka


def drawn(seed: int, n: int = 30, p: int = 7) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


def slow_cka(x: Tensor, y: Tensor) -> float:
    """tr(K H L H) / sqrt(tr(K H K H) tr(L H L H)) with n x n kernels, float64."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(a @ a.T @ centre @ b @ b.T @ centre))

    x, y = x.double(), y.double()
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


def slow_unbiased(x: Tensor, y: Tensor) -> float:
    """Song et al., equation 5, with n x n kernels."""
    n = len(x)
    one = torch.ones(n, dtype=torch.float64)

    def hsic(a: Tensor, b: Tensor) -> float:
        k, m = (t @ t.T * (1 - torch.eye(n, dtype=torch.float64)) for t in (a, b))
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return float((torch.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))

    x, y = x.double(), y.double()
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


def test_cka_is_the_definition() -> None:
    x, y = drawn(0), drawn(1, p=5) + drawn(0)[:, :5] + 100  # far from centred
    for fast, slow in ((linear_cka, slow_cka), (unbiased_cka, slow_unbiased)):
        found = torch.tensor(fast(x, y), dtype=torch.float64)
        assert_close(found, torch.tensor(slow(x, y), dtype=torch.float64), rel=1e-4, what=fast.__name__)


def test_cka_knows_rotations_and_the_unbiased_one_independence() -> None:
    x = drawn(2, n=200, p=6)
    rotation = torch.linalg.qr(drawn(3, n=6, p=6)).Q
    assert abs(linear_cka(x, 3 * x @ rotation) - 1) < 1e-5
    assert linear_cka(x, x @ drawn(4, n=6, p=6)) < 0.999
    few, other = drawn(5, n=12, p=40), drawn(6, n=12, p=40)
    assert linear_cka(few, other) > 0.5 and abs(unbiased_cka(few, other)) < 0.2
    assert linear_cka(x, torch.ones_like(x)) == 0


def slow_rbf(x: Tensor, y: Tensor) -> float:
    """CKA of exp(-d^2 / (2 median d^2)), entry by entry, float64."""

    def gram(z: Tensor) -> Tensor:
        squares = torch.tensor([[float((a - b).square().sum()) for b in z.double()] for a in z.double()]).double()
        return torch.exp(-squares / (2 * squares.flatten().median()))

    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = (centre @ gram(z) @ centre for z in (x, y))
    return float((k * m).sum() / (k.norm() * m.norm()))


def test_rbf_cka_is_the_definition() -> None:
    x, y = drawn(0), drawn(1, p=5) + drawn(0)[:, :5]
    found = gram_cka(rbf_gram(x), rbf_gram(y))
    assert found == pytest.approx(slow_rbf(x, y), rel=1e-5) and found != pytest.approx(slow_cka(x, y), rel=1e-2)
    assert gram_cka(rbf_gram(x), rbf_gram(torch.ones_like(x))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "marian", "switch"])
def test_encoder_to_decoder(name: str, tmp_path: Path) -> None:
    """Against means that hooks of the test take, text by text, without padding."""
    family = FAMILIES[name]
    model: Any = family.model()
    if name == "switch":
        with pytest.raises(FfnkitError, match="experts"):
            similarity(model, [family.inputs(model)])
        return
    batches = [family.inputs(model, seed=seed) for seed in range(4)]
    found = similarity(model, batches, rbf=True)
    (pair,) = found.across
    assert pair == "encoder to decoder" and found.texts == sum(len(b["input_ids"]) for b in batches)
    held: dict[str, list[Tensor]] = {}
    handles = [
        ffn.linear("down").register_forward_hook(
            lambda _, __, output, name=ffn.name: held.setdefault(name, []).append(output.detach())
        )
        for ffn in ffns(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()

    def means(name: str, mask: str) -> Tensor:
        rows = []
        for batch, output in zip(batches, held[name], strict=True):
            keep = batch[mask].bool() if mask in batch else torch.ones(output.shape[:2], dtype=torch.bool)
            rows += [row[kept].mean(0) for row, kept in zip(output, keep, strict=True)]
        return torch.stack(rows)

    encoder, decoder = found.layers["encoder"], found.layers["decoder"]
    sides = [means(encoder[1], "attention_mask"), means(decoder[2], "decoder_attention_mask")]
    for key, slow in (("cka_ffn", slow_cka), ("cka_ffn_unbiased", slow_unbiased), ("cka_ffn_rbf", slow_rbf)):
        matrix = found.across[pair][key]
        assert (len(matrix), len(matrix[0])) == (len(encoder), len(decoder))
        assert matrix[1][2] == pytest.approx(slow(*sides), rel=1e-3, abs=1e-5), key
    assert f"{pair}, CKA, FFN outputs (means of {found.texts} texts)" in str(found)
    found.plot(tmp_path / "maps.png")
    assert similarity(FAMILIES["bert"].model(), [FAMILIES["bert"].inputs(FAMILIES["bert"].model())]).across == {}


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart", "vit", "falcon"])
def test_matrices_of_every_stack(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    found = similarity(model, [family.inputs(model, seed=seed) for seed in range(4)])
    assert sum(len(names) for names in found.layers.values()) == family.count
    for stack, own in found.matrices.items():
        assert len(own) == 7
        for key, matrix in own.items():
            table = torch.tensor(matrix, dtype=torch.float64)
            assert table.shape == (len(found.layers[stack]),) * 2
            assert_close(table, table.T, rel=1e-9, what=key)
            assert_close(table.diagonal(), torch.ones(len(table), dtype=torch.float64), rel=1e-6, what=key)
            assert float((table - torch.eye(len(table), dtype=torch.float64)).abs().max()) < 0.999
    assert json.loads(json.dumps(found.to_dict()))["model"] == type(model).__name__
    lines = str(found).splitlines()
    assert len([line for line in lines if line.endswith("tokens)")]) == 7 * len(found.matrices)
    across = sum(len(matrix) for own in found.across.values() for matrix in own.values())
    assert (
        len([line for line in lines if line.startswith("    ")]) == 7 * family.count + 2 * len(found.matrices) + across
    )
    found.plot(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 5000


def test_copies_are_alike_and_padding_does_not_count() -> None:
    family = FAMILIES["bert"]
    model = family.model()
    for ffn in ffns(model)[1:]:
        ffn.write(ffns(model)[0].raw())
    inputs = [family.inputs(model, seed=seed) for seed in range(4)]
    other = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 7)} for b in inputs]
    first, second = (similarity(model, batches).matrices[""]["cka_ffn"] for batches in (inputs, other))
    assert_close(torch.tensor(first), torch.tensor(second), rel=1e-5, what="padding")


def test_the_attention_is_the_self_attention_of_the_layer() -> None:
    model = FAMILIES["bart"].model()
    names = {id(m): name for name, m in model.named_modules()}
    found = attention_outputs(model, FAMILIES["bart"].inputs(model), ffns(model))
    assert [names[id(m)] for m in found.values()] == [
        *(f"model.encoder.layers.{i}.self_attn.out_proj" for i in range(2)),
        *(f"model.decoder.layers.{i}.self_attn.out_proj" for i in range(3)),
    ]


def test_experts_are_refused() -> None:
    model = FAMILIES["mixtral"].model()
    with pytest.raises(FfnkitError, match="experts"):
        similarity(model, [FAMILIES["mixtral"].inputs(model)])


def test_the_most_alike_neighbours_where_widths_differ() -> None:
    model = FAMILIES["llama"].model()
    data = [FAMILIES["llama"].inputs(model, seed=seed) for seed in range(4)]
    found = similarity(model, data)
    (stack, names), nan = next(iter(found.layers.items())), float("nan")
    names[:] = ["a", "b", "c", "d"]

    def said(matched: list[float], cka: list[float]) -> str:
        for key, values in (("matched_neurons", matched), ("cka_ffn", cka)):
            matrix = [[1.0] * 4 for _ in range(4)]
            for place, value in enumerate(values):
                matrix[place][place + 1] = value
            found.matrices[stack][key] = matrix
        return str(found).rpartition("most alike neighbours: ")[2].splitlines()[0]

    assert said([nan, nan, nan], [0.1, 0.7, 0.3]) == "b and c"
    assert said([nan, 0.2, 0.8], [0.9, 0.1, 0.1]) == said([0.8, 0.2, nan][::-1], [0.9, 0.1, 0.1]) == "c and d"


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("tokens", [20, 10000])
def test_layers_that_share_an_ffn_are_compared_as_if_each_had_its_own(name: str, tokens: int) -> None:
    model, alone = (FAMILIES[name].model() for _ in range(2))
    data = [FAMILIES[name].inputs(model, seed=seed) for seed in range(4)]
    for each in (model, alone):
        ffns(each)[1].write(ffns(each)[0].raw())
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1", take="anchor")))
    assert ffns(model)[0].tied
    found, wanted = (similarity(each, data, tokens=tokens) for each in (model, alone))
    assert (found.layers, found.tokens) == (wanted.layers, wanted.tokens)
    for key, matrix in wanted.matrices[""].items():
        assert_close(torch.tensor(found.matrices[""][key]), torch.tensor(matrix), rel=1e-5, what=key)
    merging = fk.Merging(layers="0,2", features="up", tokens=tokens)
    first, second = (fk.plan(each, merging, data=data).quantities[ffns(model)[1].name] for each in (model, alone))
    assert first == pytest.approx(second, rel=1e-5)


def test_tokens_that_have_no_partners_are_refused_however_many_they_are() -> None:
    model = FAMILIES["bert"].model()
    first, second, *_ = ffns(model)
    second.module.register_forward_hook(lambda module, args, output: module.again(args[0]))  # runs twice in a pass
    second.module.again = second.module.forward
    data = [FAMILIES["bert"].inputs(model, seed=seed) for seed in range(4)]
    kinds = {each.name: ["output"] for each in (first, second)}
    with pytest.raises(FfnkitError, match="tokens where other layers"):
        Features(model, data, [first, second], kinds, 8)
