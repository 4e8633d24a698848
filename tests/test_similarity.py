"""How alike layers are: CKA against the definition, matched neurons, one pass over the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tolerance import assert_close
from torch import Tensor

from ffnkit.analysis.similarity import similarity
from ffnkit.calibration.features import attention_outputs
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops.similarity import linear_cka, unbiased_cka


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


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart", "vit", "falcon"])
def test_matrices_of_every_stack(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    found = similarity(model, [family.inputs(model, seed=seed) for seed in range(4)])
    assert sum(len(names) for names in found.layers.values()) == family.count
    for stack, own in found.matrices.items():
        assert len(own) == 5
        for key, matrix in own.items():
            table = torch.tensor(matrix, dtype=torch.float64)
            assert table.shape == (len(found.layers[stack]),) * 2
            assert_close(table, table.T, rel=1e-9, what=key)
            assert_close(table.diagonal(), torch.ones(len(table), dtype=torch.float64), rel=1e-6, what=key)
            assert float((table - torch.eye(len(table), dtype=torch.float64)).abs().max()) < 0.999
    assert json.loads(json.dumps(found.to_dict()))["model"] == type(model).__name__
    lines = str(found).splitlines()
    assert len([line for line in lines if line.endswith("tokens)")]) == 5 * len(found.matrices)
    assert len([line for line in lines if line.startswith("    ")]) == 5 * family.count
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
