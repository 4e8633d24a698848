"""Where the energy of gradients lies: against a slow loop, in right and wrong bases, over steps, and from the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_cli import bad, bert, good, llama, verbosity  # noqa: F401
from test_cli_analyze import data, notes  # noqa: F401
from tolerance import assert_close
from torch import Tensor, nn

from ffnkit.analysis.energy import Energy, gradient_energy
from ffnkit.analysis.energy_advice import _expression, _fewest, _rounded, advise
from ffnkit.analysis.energy_measure import SAMPLE, Measured, random_pair, top_shares
from ffnkit.analysis.gradient_pictures import SIDE, middle, pooled
from ffnkit.errors import FfnkitError
from ffnkit.ops.bases import Grams, turned

SHARES = (0.01, 0.1, 0.3)


def labelled(name: str, count: int, first: int = 0) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A tiny model and batches with labels."""
    family = FAMILIES[name]
    model = family.model()
    batches = [dict(family.inputs(model, seed=first + seed)) for seed in range(count)]
    for seed, batch in enumerate(batches):
        draw = torch.Generator().manual_seed(seed)
        batch["labels"] = torch.randint(4, batch["input_ids"].shape, generator=draw)
    return model, batches


def gradients(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The plain way: a backward pass a batch, (out, in) in float64."""
    found = []
    weight = model.get_submodule(name).weight
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        grad = weight.grad.double()  # type: ignore[union-attr]
        found.append(grad.T if type(model.get_submodule(name)).__name__ == "Conv1D" else grad)
    model.zero_grad()
    return found


def slow_top(squares: Tensor, share: float) -> float:
    """The largest entries, by sorting all."""
    ordered = sorted(squares.flatten().tolist(), reverse=True)
    return sum(ordered[: max(1, round(share * len(ordered)))]) / sum(ordered)


def slow_hosvd(stack: list[Tensor]) -> tuple[Tensor, Tensor]:
    """u2^T and u3^T of the stacked gradients, by singular values of the unfoldings."""
    u2 = torch.linalg.svd(torch.cat(stack, 1)).U
    u3 = torch.linalg.svd(torch.cat([g.T for g in stack], 1)).U
    return u2.T, u3.T


@pytest.mark.parametrize("name", ["xlm-roberta", "gpt2", "llama"])
def test_shares_are_those_of_a_slow_loop(name: str) -> None:
    model, batches = labelled(name, 9)
    seen, fresh = batches[:6], batches[6:]
    found = gradient_energy(model, seen, fresh, shares=SHARES, reach=1.0, core=1.0)
    assert len(found.layers) == sum(row.shape[0] > 0 for row in found.layers) >= 6
    for row in found.layers[:3]:
        before, after = (gradients(model, row.name, each) for each in (seen, fresh))
        alike = [other.name for other in found.layers if other.type == row.type]
        shared = slow_hosvd([g for other in alike for g in gradients(model, other, seen)])
        own = slow_hosvd(before)
        for kind, (left, right) in {
            "raw": (torch.eye(row.shape[0]).double(), torch.eye(row.shape[1]).double()),
            "shared": shared,
            "layer": own,
        }.items():
            squares = [(left @ g @ right.T).square() for g in after]
            mask = sum((left @ g @ right.T).square() for g in before)
            assert isinstance(mask, Tensor)
            order = mask.flatten().argsort(descending=True)
            for i, share in enumerate(SHARES):
                wanted = sum(slow_top(square, share) for square in squares) / len(squares)
                assert abs(row.energy[0][kind][i] - wanted) < 2e-3, (row.name, kind, share)
                count = max(1, round(share * len(order)))
                wanted = sum(float(s.flatten()[order[:count]].sum() / s.sum()) for s in squares) / len(squares)
                assert abs(row.energy[0][f"fixed {kind}"][i] - wanted) < 5e-3, (row.name, kind, share)
            half = row.half[0][f"fixed {kind}"]
            held = sum(s.flatten()[order].cumsum(0) / s.sum() for s in squares) / len(squares)
            assert isinstance(held, Tensor)
            assert held[half - 1] >= 0.5 - 5e-3 and (half == 1 or held[half - 2] < 0.5 + 5e-3)
        norm = sum(float(g.square().sum()) for g in after) / len(after)
        assert abs(row.norm[0] / norm - 1) < 1e-4
        assert row.energy[0]["fixed core"] == row.energy[0]["fixed shared"]  # a core of 1.0 confines nothing


def low_rank(count: int, seed: int = 0, out: int = 60, inner: int = 40) -> list[Tensor]:
    """Gradients as layers have them: few directions of each side, of falling size, in a basis that is hidden."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(out, out, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(inner, inner, generator=draw)).Q
    sizes = [0.6 ** torch.arange(n) for n in (out, inner)]
    return [
        left @ (torch.randn(out, inner, generator=draw) * sizes[0][:, None] * sizes[1]) @ right.T for _ in range(count)
    ]


def test_the_wrong_transpose_is_as_good_as_a_random_basis() -> None:
    *seen, fresh = low_rank(12)
    grams = Grams(60, 40)
    for gradient in seen:
        grams.add(gradient)
    left, right = (basis.rows for basis in grams.bases())
    counts = [24]

    def share(v: Tensor, u: Tensor) -> float:
        return top_shares(turned(fresh, v, u).square(), counts)[0]

    chance = share(*random_pair(60, 40, 0))  # type: ignore[arg-type]
    assert share(left, right) > 0.6 > 3 * chance
    assert share(left.T.contiguous(), right.T.contiguous()) < 1.5 * chance
    assert share(left, right.T.contiguous()) < 0.7 * share(left, right)  # one side alone does it too


def test_truncated_bases_say_what_they_leave_out() -> None:
    model, batches = labelled("gpt2", 6)
    whole = gradient_energy(model, batches[:4], batches[4:], shares=SHARES, reach=1.0)
    cut = gradient_energy(model, batches[:4], batches[4:], shares=SHARES, reach=0.9)
    for full, part in zip(whole.layers, cut.layers, strict=True):
        assert full.beyond[0]["shared"] < 1e-5 < part.beyond[0]["shared"]
        assert part.basis["shared"] < full.basis["shared"] and part.basis["raw"] == full.basis["raw"] == full.shape
        for a, b in zip(part.energy[0]["shared"], full.energy[0]["shared"], strict=True):
            assert a - 1e-5 <= b <= a + part.beyond[0]["shared"] + 1e-5
        assert part.core[0] <= part.basis["shared"][0] and part.core[1] <= part.basis["shared"][1]


def figures(found: Energy) -> Any:
    return [row.to_dict() for row in found.layers]


def test_runs_are_equal_whatever_is_held_at_a_time() -> None:
    model, batches = labelled("gpt2", 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = gradient_energy(model, batches[:3], batches[3:])
    assert figures(gradient_energy(model, batches[:3], batches[3:])) == figures(first)
    assert figures(gradient_energy(model, batches[:3], batches[3:], memory=1)) == figures(first)
    assert figures(gradient_energy(model, batches[:3], batches[2:4])) != figures(first)
    few = gradient_energy(model, batches[:3], batches[3:], layer_bases=False)
    assert "layer" not in few.kinds and few.layers[0].energy[0]["shared"] == first.layers[0].energy[0]["shared"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_over_steps_of_training_and_back(tmp_path: Path) -> None:
    model, batches = labelled("gpt2", 6)
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = torch.get_rng_state()
    settings: dict[str, Any] = {"training": batches[:4], "learning_rate": 1e-2}
    found = gradient_energy(model, batches[:4], batches[4:], steps=(3, 0, 6), **settings)
    assert found.steps == (0, 3, 6) and all(len(row.energy) == len(row.norm) == 3 for row in found.layers)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), start)
    assert all(p.grad is None for p in model.parameters())
    plain = gradient_energy(model, batches[:4], batches[4:])
    for row, other in zip(found.layers, plain.layers, strict=True):
        assert row.energy[0] == other.energy[0] and row.energy[1] != row.energy[0]
    again = gradient_energy(model, batches[:4], batches[4:], steps=(0, 3, 6), memory=1, **settings)
    assert figures(again) == figures(found)
    found.plot(tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes()[:4] == b"\x89PNG"
    found.plot_gradients(tmp_path / "gradients.svg")
    assert (tmp_path / "gradients.svg").read_text().count("after 6 steps") >= 1
    assert "after 6 steps" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_failure_puts_the_model_back() -> None:
    model, batches = labelled("gpt2", 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unlabelled = {key: value for key, value in batches[2].items() if key != "labels"}
    with pytest.raises(FfnkitError, match="no loss"):
        gradient_energy(model, batches[:2], [unlabelled], steps=(0, 4), learning_rate=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_random_bases_are_orthonormal_and_sampled() -> None:
    left, right = random_pair(40, SAMPLE + 88, 3)
    assert left is not None and right is not None
    assert left.shape == (40, 40) and right.shape == (SAMPLE, SAMPLE + 88)
    for basis in (left, right):
        assert_close(basis @ basis.T, torch.eye(len(basis)), rel=1e-5)
    assert torch.equal(left, random_pair(40, 40, 3)[0])  # type: ignore[arg-type]
    noise = torch.randn(40, SAMPLE + 88, generator=torch.Generator().manual_seed(0))
    sample = top_shares(turned(noise, left, right).square(), [round(0.01 * 40 * SAMPLE)])[0]
    assert abs(sample - top_shares(noise.square(), [round(0.01 * noise.numel())])[0]) < 0.01


def row(name: str, norm: float, raw: float, shared: float, layer: float, half: int) -> Measured:
    energy = {"fixed raw": [raw], "fixed shared": [shared], "fixed layer": [layer]}
    halves = {"fixed raw": half, "fixed shared": half + 1, "fixed layer": half + 2}
    return Measured(name, "t", (40, 16), [norm], [energy], [{}], [halves])


def test_advice_by_its_rules() -> None:
    model, _ = labelled("gpt2", 1)
    names = [f"transformer.h.{i}.mlp.{part}" for i in range(3) for part in ("c_fc", "c_proj")]

    def given(raw: float, shared: float, layer: float, least: float = 0.001, later: int | None = 0) -> Any:
        norms = (5.0, 4.0, 0.4, 0.4, 0.1, 0.1)
        rows = [
            row(name, norm, raw, shared, layer, 10 * i) for i, (name, norm) in enumerate(zip(names, norms, strict=True))
        ]
        if later != 0:  # a second step
            for each in rows:
                each.norm, each.energy, each.half = each.norm * 2, each.energy * 2, [*each.half, {}]
                each.half[1] = {} if later is None else {"fixed shared": later}
        return advise(model, rows, "ffn", (least,), 0)

    advice = given(0.3, 0.5, 0.54)
    assert advice.basis == "shared" and advice.layers == "0" and advice.linears == tuple(names[:2])
    assert advice.count[names[1]] == 11 and advice.density == _rounded((1 + 11) / (2 * 640))
    assert given(0.3, 0.5, 0.56).basis == "layer" and given(0.5, 0.5, 0.54).basis == "none"
    assert given(0.5, 0.5, 0.54).count[names[1]] == 10
    assert given(0.3, 0.5, 0.54, least=0.05).density == 0.05  # no less than what was measured
    after = given(0.3, 0.5, 0.54, later=40)
    assert after.count[names[0]] == 40 and after.density == _rounded(80 / (2 * 640))
    assert given(0.3, 0.5, 0.54, later=None).count[names[0]] is None
    assert 'layers="0"' in advice.lines()[-1]
    found = gradient_energy(*_three(labelled("gpt2", 3)), targets=r".*c_proj")
    assert found.advice.layers == "" and all(name.endswith("c_proj") for name in found.advice.linears)


def _three(made: tuple[nn.Module, list[dict[str, Tensor]]]) -> tuple[nn.Module, Any, Any]:
    return made[0], made[1][:2], made[1][2:]


def test_layers_and_shares_are_written_as_settings_take_them() -> None:
    assert _fewest({"a": 5.0, "b": 4.0, "c": 1.0}, 0.8) == {"a", "b"} and _fewest({"a": 9.0, "b": 1.0}, 0.8) == {"a"}
    assert _expression([("", 2), ("", 0), ("", 2)], False) == "0,2" and _expression([("", 0)], True) == "all"
    assert _expression([("encoder", 1), ("decoder", 0), ("decoder", 2)], False) == "decoder:0,2,encoder:1"
    assert _rounded(0.01234) == 0.013 and _rounded(0.012) == 0.012 and _rounded(0.998) == 1.0 and _rounded(0.0) == 0.0


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"shares": (0.1, 2.0)}, "2.0 is not above 0"),
        ({"shares": ()}, "there are none"),
        ({"reach": 0.0}, "reach"),
        ({"steps": (-1,)}, "steps"),
        ({"fresh": []}, "no fresh batches"),
        ({"memory": 0}, "memory"),
    ],
)
def test_bad_settings_in_one_line(wrong: dict[str, Any], line: str) -> None:
    model, batches = labelled("gpt2", 2)
    with pytest.raises(FfnkitError, match=line):
        gradient_energy(model, batches[:1], **{"fresh": batches[1:], **wrong})


def test_command_line(bert: Path, llama: Path, data: Path, notes: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ("analyze", bert, "--energy", "--task", "sst2", "--data-dir", data, "--batches", 3, "--fresh", 2)
    words = (*words, "--batch-size", 4, "--out", tmp_path / "out")
    report = json.loads(good(*words, "--json", "--steps", "0,2").stdout)
    folder = tmp_path / "out"
    assert json.loads((folder / "energy.json").read_text()) == report
    for name in ("energy.png", "energy.gradients.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (folder / "energy.gradients.svg").read_text()
    assert report["steps"] == [0, 2] and report["conditions"]["rows"] == 20 and report["advice"]["basis"]
    text = good(*words).stdout
    assert "fk.SparseGrad(" in text and "fixed core" in text
    small = ("--tokenizer", bert, "--max-length", 8, "--batches", 2, "--fresh", 1, "--batch-size", 2)
    text = good("analyze", llama, "--energy", "--text", notes, *small, "--layers", "0").stdout
    assert "gate_proj" in text
    assert "Lower --batches" in bad(*words, "--batches", 30)
    assert "not numbers" in bad(*words, "--shares", "a")
    assert "Leave it out" in bad(*words, "--methods", "svd") and "one of them" in bad(*words, "--similarity")


def test_tables_show_the_share_that_is_nearest_to_one_percent() -> None:
    model, batches = labelled("gpt2", 2)
    found = gradient_energy(model, batches[:1], batches[1:], shares=(0.001, 0.012, 0.5), layer_bases=False)
    assert found.reference == 1 and "in 1.2% of its entries" in str(found)


def test_pictures_are_of_the_gradient_and_of_the_turned_one() -> None:
    model, batches = labelled("gpt2", 4)
    found = gradient_energy(model, batches[:3], batches[3:])
    for row in found.layers:
        (pictures,) = row.pictures
        assert_close(pictures["raw"].double(), gradients(model, row.name, batches[3:])[0].abs(), rel=1e-4)
        for kind in ("shared", "layer"):  # of an orthonormal basis: another picture of the same energy
            assert_close(pictures[kind].square().sum(), pictures["raw"].square().sum(), rel=1e-4)
            assert not torch.allclose(pictures[kind], pictures["raw"], rtol=0.1)
        top = top_shares(pictures["shared"].square(), [max(1, pictures["shared"].numel() // 100)])[0]
        assert top == pytest.approx(row.energy[0]["shared"][found.reference], rel=1e-3)
    wide = pooled(torch.ones(1000, 30))
    assert wide.shape == (SIDE, 30) and torch.allclose(wide, torch.ones(()))
    assert [row.name for row in middle(found)] == [found.layers[2].name, found.layers[3].name]
