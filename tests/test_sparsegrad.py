"""SparseGrad: the layer against loops written from the formulas, the choice of entries, adapters, tuners."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import crossed
from tolerance import assert_close, assert_differs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import ffnkit as fk
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.trainable import parts_of
from ffnkit.nn import sparsegrad
from ffnkit.nn.adapter_layer import adapter_layers, fingerprint
from ffnkit.nn.selecting import largest
from ffnkit.nn.sparsegrad import Bases, SparseGradLinear
from ffnkit.ops import routes
from ffnkit.ops.bases import Grams, core_of, eigenbasis, top_share, turned
from ffnkit.ops.routes import route
from ffnkit.tune import tuners

SMALL = {"density": 0.1, "batches": 2, "core": 1.0}
PLAIN = ("bert", "gpt2", "llama", "t5", "vit", "albert")


def orthonormal(size: int, rows: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0][:rows].contiguous()


def layer(transposed: bool = False, seed: int = 0, **more: Any) -> tuple[SparseGradLinear, Tensor, Tensor, Tensor]:
    """A layer of 10 x 7 in a core of 6 x 5, its weight (out, in), V and U; float64."""
    torch.manual_seed(seed)
    linear = (Conv1D(10, 7) if transposed else nn.Linear(7, 10)).double()
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    weight = linear.weight.detach().clone()
    v, u = orthonormal(10, 6, 1), orthonormal(7, 5, 2)
    index = torch.randperm(30)[:8].sort().values
    given = {"index": index, "bases": Bases(v, u)} | more
    return SparseGradLinear(linear, **given), weight.T if transposed else weight, v, u


def dense(index: Tensor, values: Tensor, core: tuple[int, int]) -> Tensor:
    whole = torch.zeros(core[0] * core[1], dtype=values.dtype)
    for place, value in zip(index.tolist(), values, strict=True):
        whole[place] = value
    return whole.view(core)


def batches(name: str, model: Any, count: int = 2) -> list[dict[str, Any]]:
    """Inputs with labels, each batch another one."""
    inputs = FAMILIES[name].inputs(model)
    found = []
    for number in range(count):
        batch = {k: v.roll(number, 1) if k == "input_ids" else v for k, v in inputs.items()}
        with torch.no_grad():
            logits = model(**batch).logits
        if logits.ndim == 3 and "labels" not in batch:
            batch["labels"] = torch.randint(logits.shape[-1], logits.shape[:2])
        elif "labels" not in batch:
            batch["labels"] = torch.arange(len(logits)) % logits.shape[-1]
        found.append(batch)
    return found


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [2, 400])  # few tokens are turned, for many the weight is formed
def test_forward_and_gradients_are_those_of_the_formula(transposed: bool, tokens: int) -> None:
    made, weight, v, u = layer(transposed)
    with torch.no_grad():
        made.values.normal_()
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, 10, dtype=torch.float64)
    y = made(x)
    y.backward(grad)
    s = dense(made.index, made.values.detach(), (6, 5)).requires_grad_()
    x2, bias = x.detach().clone().requires_grad_(), made.bias.detach().clone().requires_grad_()
    wanted = x2 @ (weight + v.T @ s @ u).T + bias
    wanted.backward(grad)
    assert_close(y, wanted, rel=1e-12)
    assert_close(x.grad, x2.grad, rel=1e-12, what="inputs")
    assert_close(made.bias.grad, bias.grad, rel=1e-12, what="bias")
    assert_close(made.values.grad, s.grad.flatten()[made.index.long()], rel=1e-12, what="values")
    # the control: the input side's basis transposed, as the released code has it, is another gradient
    wrong = (grad @ v.T).T @ (x.detach() @ orthonormal(7, 7, 2).T[:5].T)
    assert not torch.allclose(made.values.grad, wrong.flatten()[made.index.long()])


def test_the_gradient_in_the_bases_is_the_core_of_the_hosvd() -> None:
    """u2, u3 from the unfoldings of the stack itself; the core's slices have orthogonal rows, and so have columns."""
    stack = torch.randn(5, 9, 6, dtype=torch.float64) * torch.linspace(1, 0.05, 9)[None, :, None]
    grams = Grams(9, 6)
    for gradient in stack:
        grams.add(gradient)
    left, right = grams.bases()
    u2 = torch.linalg.svd(stack.permute(1, 0, 2).reshape(9, -1))[0]
    u3 = torch.linalg.svd(stack.permute(2, 0, 1).reshape(6, -1))[0]
    assert_close((left.rows.double() @ u2).abs(), torch.eye(9, dtype=torch.float64), rel=1e-4)
    assert_close((right.rows.double() @ u3).abs(), torch.eye(6, dtype=torch.float64), rel=1e-4)
    core = torch.stack([turned(g, left.rows.double(), right.rows.double()) for g in stack])
    for unfolded in (core.permute(1, 0, 2).reshape(9, -1), core.permute(2, 0, 1).reshape(6, -1)):
        gram = unfolded @ unfolded.T
        off = gram - gram.diag().diag()
        assert float(off.abs().max()) < 1e-4 * float(gram.diag().max())
    # the control: with the wrong transpose nothing is orthogonal
    wrong = torch.stack([left.rows.double() @ g @ right.rows.double() for g in stack])
    gram = (flat := wrong.permute(2, 0, 1).reshape(6, -1)) @ flat.T
    assert float((gram - gram.diag().diag()).abs().max()) > 1e-2 * float(gram.diag().max())


def test_bases_are_the_same_again_and_cut_where_asked() -> None:
    gram = (x := torch.randn(20, 8)).T @ x
    one, two = eigenbasis(gram.double()), eigenbasis(gram.double())
    assert torch.equal(one.rows, two.rows)
    cut = eigenbasis(gram.double(), reach=0.5)
    assert 0 < len(cut.rows) < 8 and torch.equal(cut.rows, one.rows[: len(cut.rows)])
    assert float(cut.sizes.sum()) >= 0.5 * cut.total > float(cut.sizes[:-1].sum())


def test_no_dense_gradient_and_no_weight_is_kept() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    made, *_ = layer()
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x)
    y.sum().backward()
    way = route(10, 7, 6, 5, 50)
    tokens, thin = (50, 7 if way.gradient == "early" else 5), (10, 5) if way.thin == "left" else (6, 7)
    assert sorted(kept) == sorted([(8,), tokens, thin])  # the values, tokens, the thin factor with the values in it
    assert made.base.grad is None and not made.base.requires_grad


MEETS = ("tokens", "weight")
WAYS = list(product(("left", "right"), MEETS, ("turned", "late", "early"), MEETS))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_order_of_the_products_gives_the_same_and_takes_what_it_says(
    monkeypatch: pytest.MonkeyPatch, way: Any, transposed: bool
) -> None:
    made, weight, v, u = layer(transposed)
    with torch.no_grad():
        made.values.normal_()
    monkeypatch.setattr(routes, "PASS", 0)
    chosen = routes._route(10, 7, 6, 5, 30, *way)
    monkeypatch.setattr(sparsegrad, "route", lambda *_: chosen)
    x = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(30, 10, dtype=torch.float64)
    own = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        y = made(x)
        y.backward(grad)
    s = dense(made.index, made.values.detach(), (6, 5))
    assert_close(y, x @ (weight + v.T @ s @ u).T + made.bias, rel=1e-12)
    assert_close(x.grad, grad @ (weight + v.T @ s @ u), rel=1e-12, what="inputs")
    wanted = (v @ grad.T @ x @ u.T).flatten()[made.index.long()]
    assert_close(made.values.grad, wanted, rel=1e-12, what="values")
    assert counter.get_total_flops() // 2 == chosen.cost + 2 * 30 * 10 * 7  # those of the frozen weight


def test_the_cheapest_way_is_taken() -> None:
    shape = (3072, 768, 960, 112)
    for tokens in (8, 512, 8192):
        costs = [routes._route(*shape, tokens, *way).cost for way in WAYS]
        assert route(*shape, tokens).cost == min(costs) < max(costs)
    assert route(*shape, 8).forward == "tokens" and route(*shape, 8192).forward == "weight"


def slow_adam(grads: Iterator[Tensor], lr: float) -> Iterator[Tensor]:
    """Adam's steps for a stream of gradients, as Kingma and Ba write them."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        yield -lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_a_fixed_selection_has_the_trajectory_of_the_papers_own_form() -> None:
    """The paper keeps V W U^T, turns tokens into the bases and back, and steps on the chosen entries (section 3)."""
    made, weight, v, u = layer(
        index=torch.randperm(70)[:9].sort().values, bases=Bases(orthonormal(10, 10), orthonormal(7, 7, 3))
    )
    v, u = orthonormal(10, 10), orthonormal(7, 7, 3)
    rotated, bias = v @ weight @ u.T, made.bias.detach().clone()
    optimizer = torch.optim.Adam([made.values], lr=0.05)
    chosen = torch.zeros(70, dtype=torch.bool)
    chosen[made.index.long()] = True
    m = s = torch.zeros(10, 7, dtype=torch.float64)
    for t in range(1, 7):
        x, target = torch.randn(30, 7, dtype=torch.float64), torch.randn(30, 10, dtype=torch.float64)
        loss = (made(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # the paper's: X~ = X U^T, Y = X~ W~^T V + b; gY~ = gY V^T, gW~ = gY~^T X~
        y = (x @ u.T) @ rotated.T @ v + bias
        gy = 2 * (y - target) / y.numel()
        g = ((gy @ v.T).T @ (x @ u.T)) * chosen.view(10, 7)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        rotated = rotated - 0.05 * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8) * chosen.view(10, 7)
        assert_close(made.weight, v.T @ rotated @ u, rel=1e-10, what=f"weight after step {t}")
    assert not torch.allclose(made.weight, weight)


def test_a_masked_gradient_is_what_it_says() -> None:
    made, weight, v, u = layer(index=None, selection="masked-gradient", count=4)
    optimizer = torch.optim.Adam([made.values], lr=0.05)
    s = torch.zeros(6, 5, dtype=torch.float64)
    m = n = torch.zeros(6, 5, dtype=torch.float64)
    for t in range(1, 5):
        halves = [(torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 10, dtype=torch.float64)) for _ in range(2)]
        g = torch.zeros(6, 5, dtype=torch.float64)
        for x, target in halves:  # accumulated over two batches, then chosen
            (made(x) - target).square().sum().backward()
            y = x @ (weight + v.T @ s @ u).T + made.bias.detach()
            g += (2 * (y - target) @ v.T).T @ (x @ u.T)
        optimizer.step()
        assert int((made.values.grad != 0).sum()) == 4
        optimizer.zero_grad()
        cut = g.abs().flatten().sort(descending=True).values[3]
        g = torch.where(g.abs() >= cut, g, 0)
        m, n = 0.9 * m + 0.1 * g, 0.999 * n + 0.001 * g * g
        s = s - 0.05 * (m / (1 - 0.9**t)) / ((n / (1 - 0.999**t)).sqrt() + 1e-8)
        assert_close(made.values, s, rel=1e-10, what=f"step {t}")


def test_a_refresh_moves_on_and_takes_the_optimizer_along() -> None:
    made, weight, v, u = layer(selection="refresh", every=3)
    optimizer = torch.optim.Adam([made.values], lr=0.1)
    first = made.index.clone()
    for number in range(6):
        before = made.weight.clone()
        state = {k: s.clone() for k, s in optimizer.state[made.values].items()} if number else {}
        old = made.index.clone()
        x = torch.randn(30, 7, dtype=torch.float64)
        made(x).square().mean().backward()
        grad = made.values.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            assert not torch.equal(made.index, first), "the control: nothing was chosen anew"
            assert float(made.settled.abs().sum()) > 0
            m = 0.9 * state["exp_avg"] + 0.1 * grad
            for place, value in zip(old.tolist(), m, strict=True):
                if place in made.index.tolist():
                    where = made.index.tolist().index(place)
                    assert_close(optimizer.state[made.values]["exp_avg"][where], value, rel=1e-12)
            fresh = [i for i, place in enumerate(made.index.tolist()) if place not in old.tolist()]
            assert fresh and all(float(optimizer.state[made.values]["exp_avg"][i]) == 0 for i in fresh)
            # entries that left keep what they had
            assert_close(made.weight, weight + v.T @ made.entries() @ u, rel=1e-12)
        assert not torch.equal(made.weight, before)
    copied = copy.deepcopy(made)
    twin = torch.optim.Adam([copied.values], lr=0.1)
    for _ in range(3):
        copied(torch.randn(30, 7, dtype=torch.float64)).square().mean().backward()
        twin.step()
    assert int(copied.steps) == 9, "a copy is seen to as well"


def test_largest_counts_over_all_tensors() -> None:
    one, two = torch.tensor([1.0, -9.0]), torch.tensor([[3.0, 0.0], [-4.0, 2.0]])
    assert [mask.tolist() for mask in largest([one, two], 3)] == [[0, 1], [[1, 0], [1, 0]]]


def test_sums_of_small_updates_do_not_drown_in_bf16() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False).bfloat16()
    start = linear.weight.detach().float().clone()
    naive = linear.weight.detach().clone()
    made = SparseGradLinear(linear, index=torch.arange(256))
    with torch.no_grad():
        for _ in range(300):
            made.values += 1e-4
            naive += 1e-4
    wanted = start + 0.03
    assert_close(made.weight.float(), wanted.bfloat16().float(), rel=1e-6)
    assert float((naive.float() - wanted).norm()) > 0.1 * float((wanted - start).norm())  # the control
    assert torch.equal(made.restore().weight.float(), start)


def test_fingerprints_tell_weights_apart() -> None:
    weight = torch.randn(40, 30)
    moved = weight.clone()
    moved[0, 0], moved[0, 1] = weight[0, 1], weight[0, 0]
    assert torch.equal(fingerprint(weight), fingerprint(weight.clone()))
    assert not torch.equal(fingerprint(weight), fingerprint(moved))
    assert not torch.equal(fingerprint(weight), fingerprint(weight.bfloat16()))


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_core_is_the_cheapest_that_holds_enough() -> None:
    energies = torch.outer(torch.logspace(0, -3, 40), torch.logspace(0, -4, 24))
    rows, columns = core_of(energies, 30, 0.9, 400, 24)
    assert top_share(energies[:rows, :columns], 30) >= 0.9 * top_share(energies, 30)
    assert rows < 40 and columns < 24
    assert core_of(energies, 30, 1.0, 40, 24)[0] >= rows
    wide = core_of(energies, 30, 0.9, 24, 4000)
    assert wide[1] <= columns  # dear columns: fewer of them


def test_the_core_is_judged_by_other_gradients() -> None:
    torch.manual_seed(0)
    shape = torch.outer(torch.logspace(0, -2, 48), torch.logspace(0, -2, 40))
    one, two = (shape * torch.randn(48, 40).square() for _ in range(2))
    flattered = core_of(one, 60, 0.9, 48, 40)
    rows, columns = core_of(one, 60, 0.9, 48, 40, fresh=two)

    def held(r: int, c: int) -> float:
        chosen = torch.topk(one[:r, :c].flatten(), 60).indices
        return float(two[:r, :c].flatten()[chosen].sum())

    assert held(rows, columns) >= 0.9 * held(48, 40)
    assert (rows, columns) != flattered  # the control


@pytest.mark.parametrize("name", PLAIN)
def test_chosen_entries_hold_the_most_energy(name: str) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model)
    plan = fk.plan(model, fk.SparseGrad(**SMALL, basis="layer"), data=data)
    updates = {e.target: e for e in plan.edits if e.kind == "UpdateLinear"}
    gradients: dict[str, list[Tensor]] = {}
    linears = {n: model.get_submodule(n) for n in updates}
    weight_gradients(model, data, linears, lambda n, g: gradients.setdefault(n, []).append(g.double()))
    assert set(gradients) == set(updates)
    for path, edit in updates.items():
        left, right = (edit.parts[key].double() for key in ("left", "right"))
        energy = sum(turned(g, left, right).square() for g in gradients[path])
        assert isinstance(energy, Tensor)
        kept = float(energy.flatten()[edit.parts["index"].long()].sum())
        assert math.isclose(kept, top_share(energy, len(edit.parts["index"])), rel_tol=1e-4)
        draw = torch.randperm(energy.numel())[: len(edit.parts["index"])]
        assert kept > float(energy.flatten()[draw].sum())  # the control
        out, inner = (v.shape[1] for v in (left, right))
        assert len(edit.parts["index"]) == round(0.1 * out * inner)
    again = fk.plan(model, fk.SparseGrad(**SMALL, basis="layer"), data=data)
    assert again == plan


def test_large_sums_lie_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    wanted = fk.plan(model, fk.SparseGrad(**SMALL, basis="layer"), data=data)
    monkeypatch.setattr("ffnkit.methods.update.sparsegrad.IN_MEMORY", 0)
    assert fk.plan(model, fk.SparseGrad(**SMALL, basis="layer"), data=data) == wanted


def test_gradients_are_the_models_own() -> None:
    model = FAMILIES["gpt2"].model()
    data = batches("gpt2", model)
    linears = {f"{f.name}.{f.path(s)}": f.linear(s) for f in ffns(model) for s in f.sites}
    found: dict[str, Tensor] = {}
    flags = [p.requires_grad for p in model.parameters()]
    assert weight_gradients(model, data[:1], linears, lambda n, g: found.update({n: g.clone()})) == 1
    assert all(p.grad is None for p in model.parameters()) and flags == [p.requires_grad for p in model.parameters()]
    model(**data[0]).loss.backward()
    for name, linear in linears.items():
        assert_close(found[name], linear.weight.grad.T, rel=1e-5, what=name)
    with pytest.raises(FfnkitError, match="no loss"):
        weight_gradients(model, [{k: v for k, v in data[0].items() if k != "labels"}], linears, lambda n, g: None)
    with pytest.raises(FfnkitError, match="no batches"):
        weight_gradients(model, [], linears, lambda n, g: None)


@pytest.mark.parametrize("choose", ["random", "magnitude"])
def test_masks_of_the_weights_own_entries(choose: str) -> None:
    model = FAMILIES["bert"].model()
    plan = fk.plan(model, fk.SparseGrad(density=0.05, basis="none", choose=choose))
    for edit in plan.edits:
        if edit.kind == "UpdateLinear":
            weight = model.get_submodule(edit.target).weight.detach()
            index = edit.parts["index"].long()
            assert len(index) == len(set(index.tolist())) == round(0.05 * weight.numel())
            if choose == "magnitude":
                chosen = weight.abs().flatten()[index]
                assert float(chosen.min()) >= float(weight.abs().flatten().sort(descending=True).values[len(index) - 1])


def test_one_count_for_all_layers() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    plan = fk.plan(model, fk.SparseGrad(**SMALL, by="all"), data=data)
    whole = sum(model.get_submodule(e.target).weight.numel() for e in plan.edits if e.kind == "UpdateLinear")
    counts = [len(e.parts["index"]) for e in plan.edits if e.kind == "UpdateLinear"]
    assert sum(counts) == pytest.approx(0.1 * whole, rel=0.01) and len(set(counts)) > 1


# --- in a model -------------------------------------------------------------------------------------------------------


def planned(name: str, **more: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    model = FAMILIES[name].model()
    data = batches(name, model)
    return model, fk.plan(model, fk.SparseGrad(**SMALL | more), data=data), data


def trained(model: Any, data: list[dict[str, Any]], steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW(fk.trainable_parameters(model), lr=0.02)
    for number in range(steps):
        model(**data[number % len(data)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("name", "selection"), crossed(PLAIN, ["fixed", "refresh", "step", "masked-gradient"]))
def test_a_plain_loop_trains_what_is_claimed(name: str, selection: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, plan, data = planned(name, selection=selection, every=2)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = family.outputs(model)
    plan.save(tmp_path / "plan")
    assert fk.Plan.load(tmp_path / "plan") == plan
    fk.apply(model, plan)
    for key, value in family.outputs(model).items():
        assert_close(value, before[key], rel=1e-5, what=key)  # the update starts at zero
    values = {id(layer.values) for layer in adapter_layers(model).values()}
    claimed = values | {id(p) for p in parts_of(model, ["head"])}
    assert {id(p) for p in fk.trainable_parameters(model)} == claimed
    trained(model, data)
    moved = [n for n, p in model.named_parameters() if n in untouched and not torch.equal(p, untouched[n])]
    assert all(id(dict(model.named_parameters())[n]) in claimed for n in moved)
    after = family.outputs(model)
    assert any(not torch.equal(after[key], before[key]) for key in after)
    fk.save(model, tmp_path / "saved")
    fk.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        for key, value in family.outputs(fk.load(tmp_path / folder).eval()).items():
            assert_close(value, after[key], rel=1e-5, what=f"{folder} {key}")
    fk.fold(model)
    assert not adapter_layers(model) and all(p.requires_grad for p in model.parameters())
    for key, value in family.outputs(model).items():
        assert_close(value, after[key], rel=1e-5, what=f"folded {key}")


@pytest.mark.parametrize("selection", ["fixed", "refresh", "step"])
def test_adapters_come_and_go(selection: str, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model, plan, data = planned("bert", selection=selection, every=2)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    fk.apply(model, plan)
    trained(model, data)
    one = family.outputs(model)
    fk.save_adapter(model, tmp_path / "one")
    trained(model, data)
    two = family.outputs(model)
    fk.save_adapter(model, tmp_path / "two")
    about = json.loads((tmp_path / "one" / "adapter.json").read_text())
    assert about["adapter"] == "sparsegrad" and about["trained_beside"] == ["head"]
    for folder, wanted in (("one", one), ("two", two), ("one", one)):
        fk.load_adapter(model, tmp_path / folder)
        for key, value in family.outputs(model).items():
            assert_close(value, wanted[key], rel=0.0 if selection == "fixed" else 1e-6, what=f"{folder} {key}")
            assert_differs(value, (two if folder == "one" else one)[key], rel=1e-4, what=f"{folder} {key}")
    fk.remove_adapter(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[name]) and parameter.requires_grad, name
    fresh = FAMILIES["bert"].model()
    fk.load_adapter(fresh, tmp_path / "two")
    for key, value in family.outputs(fresh).items():
        assert_close(value, two[key], rel=1e-6, what=key)
    merged = fk.fold(fresh)
    assert_close(family.outputs(merged)["logits"], two["logits"], rel=1e-5)


def test_an_adapter_refuses_another_base(tmp_path: Path) -> None:
    model, plan, data = planned("bert")
    fk.save_adapter(trained(fk.apply(model, plan), data), tmp_path / "one")
    other = FAMILIES["bert"].model(seed=5)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    with pytest.raises(FfnkitError, match="another one than the update was made for"):
        fk.load_adapter(other, tmp_path / "one")
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in other.named_parameters())
    with pytest.raises(FfnkitError, match=r"no adapter\.safetensors"):
        fk.load_adapter(model, tmp_path)
    with pytest.raises(FfnkitError, match="no update is on it"):
        fk.save_adapter(other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bases_are_held_once() -> None:
    model, plan, _ = planned("bert")
    fk.apply(model, plan)
    layers = list(adapter_layers(model).values())
    assert len({id(layer.bases) for layer in layers}) == 2 < len(layers)  # one for each type of linear
    model.to(torch.float64)
    assert len({layer.bases.left.data_ptr() for layer in layers}) == 2
    copied = copy.deepcopy(model)
    assert len({id(layer.bases) for layer in adapter_layers(copied).values()}) == 2


def test_state_dicts_show_the_sum_and_go_back() -> None:
    model, plan, data = planned("bert")
    fk.apply(model, plan)
    trained(model, data)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    path, first = next(iter(adapter_layers(model).items()))
    assert torch.equal(state[f"{path}.weight"], first.weight) and f"{path}.base" not in state
    base = first.base.detach().clone()
    trained(model, data)
    model.load_state_dict(state)
    assert torch.equal(first.base, base)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    other = fk.apply(FAMILIES["bert"].model(seed=3), dataclasses.replace(plan, weights={}))
    with pytest.raises(RuntimeError, match="another weight"):
        other.load_state_dict(state)


def test_tied_ffns_train_once() -> None:
    model = FAMILIES["llama"].model()
    data = batches("llama", model)
    fk.apply(model, fk.plan(model, fk.Merging(layers="all", match=False)))
    fk.apply(model, fk.plan(model, fk.SparseGrad(**SMALL), data=data))
    assert len(adapter_layers(model)) == 3  # up, gate and down of the one FFN
    before = FAMILIES["llama"].outputs(model)
    trained(model, data)
    after = FAMILIES["llama"].outputs(model)
    fk.fold(model)
    assert len(ffns(model)) == 1
    for key, value in FAMILIES["llama"].outputs(model).items():
        assert_close(value, after[key], rel=1e-5)
        assert not torch.allclose(value, before[key])


def test_what_does_not_fit_is_refused() -> None:
    model, plan, data = planned("bert")
    with pytest.raises(FfnkitError, match="density"):
        fk.plan(model, fk.SparseGrad(density=0.0), data=data)
    with pytest.raises(FfnkitError, match="modules_to_train"):
        fk.plan(model, fk.SparseGrad(modules_to_train=["heads"]), data=data)
    with pytest.raises(FfnkitError, match="gradients|data"):
        fk.plan(model, fk.SparseGrad())
    with pytest.raises(FfnkitError, match="3-D parameter"):
        fk.plan(FAMILIES["mixtral"].model(), fk.SparseGrad(), data=data)
    fk.apply(model, plan)
    with pytest.raises(FfnkitError, match="is on .* already"):
        fk.plan(model, fk.SparseGrad(), data=data)
    with pytest.raises(FfnkitError, match="Fold the model first"):
        fk.plan(model, fk.Fusion(width=0.5))


@pytest.mark.parametrize(
    "kind", ["checkpointing", "autocast", pytest.param("compile", marks=pytest.mark.slow), "scaler"]
)
def test_what_trainers_do_works(kind: str) -> None:
    family = FAMILIES["bert"]
    if kind == "compile":  # each layer takes seconds, and is compiled like the first
        family = dataclasses.replace(family, config_args=family.config_args | {"num_hidden_layers": 1})
    model = family.model()
    data = batches("bert", model)
    fk.apply(model, fk.plan(model, fk.SparseGrad(**SMALL), data=data)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**data[0]).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tolerance = 1e-5
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**data[0]).loss.backward()
    elif kind == "autocast":
        tolerance = 5e-2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**data[0]).loss
        loss.backward()
    elif kind == "compile":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, where the graph is cut
            torch.compile(model, backend="aot_eager")(**data[0]).loss.backward()
    else:
        (model(**data[0]).loss * 1024).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(plain)
    for name, grad in found.items():
        assert_close(grad, plain[name], rel=tolerance, what=name)


# --- tuners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tuner",
    [
        {"name": "mask", "density": 0.1},
        {"name": "mask", "choose": "magnitude", "modules_to_train": ("norms",)},
        {"name": "meprop", "density": 0.1},
        {"name": "meprop", "of": "outputs", "density": 0.2},
        {"name": "head", "modules_to_train": ("biases",)},
    ],
    ids=lambda tuner: "-".join(str(v) for v in tuner.values()),
)
def test_tuners_without_data(tuner: dict[str, Any]) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    data = batches("bert", model)
    names = {n for n, _ in model.named_parameters()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = tuners.prepare(model, tuner)
    trained(tuned, data)
    after = family.outputs(tuned)
    plain = tuners.finish(tuned, tuner)
    assert {n for n, _ in plain.named_parameters()} == names and all(p.requires_grad for p in plain.parameters())
    assert_close(family.outputs(plain)["logits"], after["logits"], rel=1e-5)
    moved = {n for n, p in plain.named_parameters() if not torch.equal(p, kept[n])}
    head = {n for n in names if "classifier" in n or "pooler" in n}
    norms, biases = {n for n in names if "LayerNorm" in n}, {n for n in names if n.endswith("bias")}
    weights = {n for n in names if n.endswith(("intermediate.dense.weight", "output.dense.weight"))}
    weights -= {n for n in weights if "attention" in n}
    wanted = head | (norms if "norms" in tuner.get("modules_to_train", ()) else set())
    wanted |= biases if "biases" in tuner.get("modules_to_train", ()) else set()
    wanted |= weights if tuner["name"] != "head" else set()
    assert moved <= wanted and moved & head and (tuner["name"] == "head" or moved & weights)


def test_meprop_cuts_each_tokens_gradient() -> None:
    from ffnkit.tune.meprop import _Cut

    y = torch.randn(3, 10, requires_grad=True)
    grad = torch.randn(3, 10)
    _Cut.apply(y, 2).backward(grad)
    for row, given in zip(y.grad, grad, strict=True):
        kept = given.abs().topk(2).indices
        assert set(row.nonzero()[:, 0].tolist()) == set(kept.tolist())
        assert torch.equal(row[kept], given[kept])


def test_lora_lets_further_parts_train() -> None:
    model = FAMILIES["bert"].model()
    tuned = tuners.prepare(model, {"name": "lora", "modules_to_train": ["norms"]})
    free = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert any("LayerNorm" in n for n in free) and not any(n.endswith("base_layer.weight") for n in free)


def test_gradients_of_one_direction_leave_enough_to_choose_from() -> None:
    """Where one direction holds nearly all, the bases still have room for every entry that is to train."""
    grams = Grams(40, 30)
    for _ in range(3):
        grams.add(torch.outer(torch.randn(40), torch.ones(30)) + 1e-6 * torch.randn(40, 30))
    left, right = grams.bases(0.995, 100)
    assert len(left.rows) * len(right.rows) >= 400
    assert len(eigenbasis(grams.right, 0.995).rows) == 1  # the control
    whole = grams.bases(0.995, 1200)
    assert (len(whole[0].rows), len(whole[1].rows)) == (40, 30)
