"""DSEE's update: the layer against dense formulas, the plan, adapters, families, peft's LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import KINDS, slow_but
from test_sparsegrad import batches, trained
from tolerance import assert_close, assert_differs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ffnkit as fk
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.targets import query_value
from ffnkit.model.trainable import parts_of
from ffnkit.nn import dsee
from ffnkit.nn.adapter_layer import adapter_layers, fingerprint
from ffnkit.nn.dsee import SparseLowRank
from ffnkit.nn.sparsegrad import Bases, SparseGradLinear
from ffnkit.ops import entries
from ffnkit.ops.entries import Entries
from ffnkit.tune import quantizing, tuners

SMALL: dict[str, Any] = {"rank": 2, "nonzeros": 5}
PLAIN = ("bert", "gpt2", "llama", "t5", "vit", "albert")


def linear(transposed: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    """A linear of 10 x 7 and its weight (out, in)."""
    made = (Conv1D(10, 7) if transposed else nn.Linear(7, 10)).to(dtype)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    weight = made.weight.detach().clone()
    return made, weight.T if transposed else weight


def layer(transposed: bool = False, entries: int = 8, **more: Any) -> tuple[SparseLowRank, Tensor]:
    torch.manual_seed(0)
    plain, weight = linear(transposed)
    index = torch.randperm(70)[:entries].sort().values
    made = SparseLowRank(plain, **{"rank": 3, "alpha": 6.0, "index": index if entries else None} | more)
    for name in ("up", "values"):
        if getattr(made, name) is not None:
            nn.init.normal_(getattr(made, name))
    return made, weight


def dense(made: SparseLowRank, up: Any, down: Any, values: Any) -> Tensor:
    """The update, entry by entry."""
    total = torch.zeros(10, 7, dtype=torch.float64)
    if up is not None:
        rows = torch.arange(10) if made.rows is None else made.rows
        for place, row in enumerate(rows.tolist()):
            total = total.index_put((torch.tensor(row),), up[place] @ down, accumulate=True)
    if values is not None:
        for place, value in zip(made.index.tolist(), values, strict=True):
            at = (torch.tensor(place // 7), torch.tensor(place % 7))
            total = total.index_put(at, value, accumulate=True)
    return made.alpha / max(made.rank, 1) * total


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [3, 200])  # entries one by one, or in blocks of the weight
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"entries": 60},
        {"entries": 0},
        {"rank": 0},
        {"rows": torch.tensor([1, 4, 9])},
    ],
    ids=["both", "many entries", "low rank", "sparse", "some rows"],
)
def test_forward_and_gradients_are_those_of_the_formula(transposed: bool, tokens: int, more: dict[str, Any]) -> None:
    made, weight = layer(transposed, **more)
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, 10, dtype=torch.float64)
    y = made(x)
    y.backward(grad)
    own = {name: getattr(made, name) for name in ("up", "down", "values", "bias")}
    slow = {name: None if p is None else p.detach().clone().requires_grad_() for name, p in own.items()}
    x2 = x.detach().clone().requires_grad_()
    update = dense(made, slow["up"], slow["down"], slow["values"])
    wanted = x2 @ (weight + update).T + slow["bias"]
    wanted.backward(grad)
    assert_close(y, wanted, rel=1e-12)
    assert_close(x.grad, x2.grad, rel=1e-12, what="inputs")
    for name, parameter in own.items():
        if parameter is not None:
            assert_close(parameter.grad, slow[name].grad, rel=1e-12, what=name)
    assert made.base.grad is None and not made.base.requires_grad
    assert_close(made.update(), update.detach(), rel=1e-12)
    # the control: without the scale, or with S2 at other places, it is another layer
    assert_differs(y, x @ (weight + update / made.scale).T + made.bias)
    if made.values is not None:
        moved = copy.deepcopy(made)
        moved.index = (moved.index + 1) % 70
        assert_differs(moved(x), y)


def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block, at_once, many in ((256, 1 << 20, 0.01), (3, 1 << 20, 0.01), (3, 7, 2.0), (256, 150, 2.0)):
        monkeypatch.setattr(entries, "BLOCK", block)
        monkeypatch.setattr(entries, "AT_ONCE", at_once)
        monkeypatch.setattr(entries, "MANY", many)
        monkeypatch.setattr(entries, "TOKENS", 2 * block)
        for by_blocks, sampled in ((True, False), (False, False), (True, True)):
            monkeypatch.setattr(dsee, "_by_blocks", lambda layer, tokens, chosen=by_blocks: chosen)
            monkeypatch.setattr(Entries, "_by_sampling", lambda found, rows, chosen=sampled: chosen)
            made, _ = layer(entries=40)
            x = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
            y = made(x)
            y.square().sum().backward()
            results.append([y, x.grad, made.values.grad, made.up.grad, made.down.grad])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert_close(one, other, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampled", [True, False])
def test_few_entries_against_a_dense_matrix(dtype: torch.dtype, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "BLOCK", 4)
    monkeypatch.setattr(entries, "TOKENS", 9)
    monkeypatch.setattr(Entries, "_by_sampling", lambda found, rows: sampled)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 7, generator=draw, dtype=torch.float64).to(dtype)
    x, g = (torch.randn(20, size, generator=draw, dtype=torch.float64).to(dtype) for size in (7, 13))
    index = torch.randperm(91, generator=draw)[:30].sort().values.int()
    exact = torch.promote_types(dtype, torch.float32)
    few = Entries(index, torch.randn(30, generator=draw, dtype=torch.float64).to(exact), (13, 7), 0.5)
    dense = torch.zeros(91, dtype=torch.float64)
    dense[index.long()] = 0.5 * few.values.double()
    whole = (weight.to(exact) + dense.view(13, 7).to(exact)).to(dtype).double()
    rel = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert_close(few.product(x, weight).double(), x.double() @ whole.T, rel=rel)
    assert_close(few.product_back(g, weight).double(), g.double() @ whole, rel=rel)
    wanted = (g.double().T @ x.double()).flatten()[index.long()]
    found = few.gradient(g, x)
    assert found.dtype == exact
    assert_close(found.double(), wanted, rel=rel)
    assert_differs(found.double(), wanted.roll(1))  # the control: another order of the entries


def test_what_backward_keeps_is_what_lora_keeps() -> None:
    """Bytes that are no parameters: the inputs, and V x; nothing of the weight's size."""
    from peft import LoraConfig, inject_adapter_in_model

    def kept(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, tuple[int, ...]] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        y.sum().backward()
        return sorted(found.values())

    x = torch.randn(50, 96, requires_grad=True)
    model = nn.Sequential(nn.Linear(96, 80))
    model[0] = SparseLowRank(model[0], rank=4, index=torch.arange(0, 7000, 100))
    ours = kept(model, x)
    assert ours == [(50, 4), (50, 96)]
    peer = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), nn.Sequential(nn.Linear(96, 80)))
    assert sum(map(torch.Size.numel, map(torch.Size, ours))) <= sum(
        map(torch.Size.numel, map(torch.Size, kept(peer, x)))
    )
    wide = nn.Sequential(nn.Linear(96, 80))
    nn.init.zeros_(wide[0].weight)

    class Dense(nn.Module):  # the control: W + S2 formed
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.zeros(80, 96))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (wide[0].weight.detach() + self.s).T

    assert (96, 80) in kept(Dense(), x) or (80, 96) in kept(Dense(), x)


def test_entries_outside_of_the_support_stay_zero_and_the_state_is_small() -> None:
    made, weight = layer(rank=0)
    with torch.no_grad():
        made.values.zero_()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        made(torch.randn(20, 7, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    update = made.update().flatten()
    outside = torch.ones(70, dtype=torch.bool)
    outside[made.index.long()] = False
    assert int((update[outside] != 0).sum()) == 0 and bool((update[~outside] != 0).all())
    assert optimizer.state[made.values]["exp_avg"].numel() == 8
    assert torch.equal(made.restore().weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_float32_updates(dtype: torch.dtype) -> None:
    plain, weight = linear(dtype=dtype)
    made = SparseLowRank(plain, rank=2, index=torch.arange(0, 70, 9))
    assert {p.dtype for n, p in made.named_parameters() if n not in ("base", "bias")} == {torch.float32}
    nn.init.normal_(made.up)
    nn.init.normal_(made.values)
    x = torch.randn(300, 7)
    y = made(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), x @ (weight.float() + made.update()).T + made.bias.detach().float(), rel=2e-2)
    y.float().sum().backward()
    assert made.values.grad is not None and made.values.grad.dtype == torch.float32


@pytest.mark.parametrize("tokens", [3, 200])
def test_autocast_computes_in_its_dtype(tokens: int) -> None:
    made, _ = layer(rank=3)
    made.float()
    x = torch.randn(tokens, 7, requires_grad=True)
    grad = torch.randn(tokens, 10)
    made(x).backward(grad)
    wanted = [x.grad.clone(), *(p.grad.clone() for p in (made.up, made.down, made.values, made.bias))]
    x.grad = None
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    found = [x.grad, *(p.grad for p in (made.up, made.down, made.values, made.bias))]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, rel=2e-2)


def test_small_updates_are_not_lost_in_bf16() -> None:
    """Entries are added to the outputs: in a bf16 weight of ones, 1e-3 would be rounded away."""
    plain = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(plain.weight)
    made = SparseLowRank(plain, rank=0, alpha=1.0, index=torch.tensor([0]), values=torch.tensor([1e-3]))
    x = torch.tensor([[8.0, -8.0, 0.0, 0.0]]).repeat(50, 1).bfloat16()
    wanted = torch.zeros(50, 4)
    wanted[:, 0] = 8e-3
    assert_close(made(x).float(), wanted, rel=1e-2)
    assert float((x @ made.weight.T).abs().sum()) == 0  # the control


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([8, 0, 1, 5])])
@pytest.mark.parametrize("columns", [None, torch.tensor([6, 1, 2])])
@pytest.mark.parametrize("only", [None, torch.tensor([0, 3, 5, 7])])
def test_cutting_is_cutting_the_weight(transposed: bool, rows: Any, columns: Any, only: Any) -> None:
    made, _ = layer(transposed, entries=30, rows=only)
    whole, bias, base = made.weight, made.bias.detach().clone(), made.base.detach().clone()
    whole, base = (w.T if transposed else w for w in (whole, base))
    made.cut(rows, columns)
    kept = torch.arange(10) if rows is None else rows
    across = torch.arange(7) if columns is None else columns
    assert_close(made.weight.T if transposed else made.weight, whole[kept][:, across], rel=1e-12)
    assert torch.equal(made.base.T if transposed else made.base, base[kept][:, across])
    assert torch.equal(made.bias, bias[kept]) and made.features == (len(kept), len(across))
    assert made.index is not None and torch.equal(made.index, made.index.sort().values)
    x = torch.randn(5, len(across), dtype=torch.float64, requires_grad=True)
    y = made(x)
    y.sum().backward()
    assert made.values.grad.shape == made.index.shape
    folded = made.fold()
    assert_close(folded(x), y, rel=1e-12)
    if not transposed:
        assert (folded.out_features, folded.in_features) == (len(kept), len(across))


@pytest.mark.parametrize("kind", ["bases", "index", "whole"])
def test_cutting_sparsegrad_is_cutting_the_weight(kind: str) -> None:
    torch.manual_seed(0)
    plain, _ = linear()
    bases = Bases(torch.randn(6, 10).double(), torch.randn(5, 7).double())
    index = torch.randperm(30 if kind == "bases" else 70)[:9].sort().values
    given: dict[str, Any] = {
        "bases": {"bases": bases, "index": index}, "index": {"index": index}, "whole": {"selection": "step", "count": 4}
    }[kind]  # fmt: skip
    made = SparseGradLinear(plain, **given)
    nn.init.normal_(made.values)
    rows, columns = torch.tensor([8, 0, 1, 5]), torch.tensor([6, 1, 2])
    wanted = made.weight[rows][:, columns]
    made.cut(rows, columns)
    assert_close(made.weight, wanted, rel=1e-12)
    assert made.bases is not bases and bases.left.shape == (6, 10)  # others may share them
    x = torch.randn(5, 3, dtype=torch.float64)
    y = made(x)
    y.sum().backward()
    assert made.values.grad.shape == made.values.shape
    assert_close(made.fold()(x), y, rel=1e-12)


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["svd", "grebsmo", "gradient", "magnitude", "random"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_support_has_exactly_so_many_entries(name: str, support: str) -> None:
    model = FAMILIES[name].model()
    method = fk.DSEE(**SMALL, support=support)
    data = batches(name, model)
    plan = fk.plan(model, method, data=data)
    assert fk.plan(model, method, data=data) == plan
    updates = {e.target: e for e in plan.edits if e.kind == "UpdateLinear"}
    assert set(updates) == set(query_value(model))
    for path, edit in updates.items():
        out, inner = FAMILIES[name].model().get_submodule(path).weight.shape[:: -1 if name == "gpt2" else 1]
        index, roles = edit.parts["index"].long(), query_value(model)[path]
        for rows in roles or [torch.arange(out)]:  # for query and value each
            assert int(torch.isin(index // inner, rows).sum()) == 5
        assert len(index) == 5 * max(1, len(roles)) and torch.equal(index, index.sort().values)
        updated = out if not roles else sum(map(len, roles))
        assert edit.trained == 2 * (updated + inner) + len(index)
    if support == "gradient":
        sums: dict[str, Tensor] = {}
        linears = {n: model.get_submodule(n) for n in updates}
        weight_gradients(model, data, linears, lambda n, g: sums.update({n: sums.get(n, 0) + g.double().square()}))
        path, edit = next(iter(updates.items()))
        for rows in query_value(model)[path] or [torch.arange(len(sums[path]))]:
            best = sums[path][rows].flatten().sort(descending=True).values[:5]
            mine = edit.parts["index"][torch.isin(edit.parts["index"].long() // sums[path].shape[1], rows)]
            assert_close(sums[path].flatten()[mine.long()].sort(descending=True).values, best, rel=1e-5)


def test_draws_do_not_depend_on_what_else_is_planned() -> None:
    model = FAMILIES["bert"].model()
    both = {e.target: e for e in fk.plan(model, fk.DSEE(**SMALL, support="random")).edits if e.kind == "UpdateLinear"}
    one = fk.plan(model, fk.DSEE(**SMALL, support="random", targets=r".*layer\.1.*value")).edits[0]
    assert one.given == both[one.target].given and torch.equal(one.parts["index"], both[one.target].parts["index"])
    assert len({e.given["seed"] for e in both.values()}) == len(both)
    other = fk.plan(model, fk.DSEE(**SMALL, support="random", seed=1)).edits[0]
    assert other.given["seed"] != both[other.target].given["seed"]


def test_targets_and_densities() -> None:
    model = FAMILIES["bert"].model()

    def names(**more: Any) -> set[str]:
        plan = fk.plan(model, fk.DSEE(**{**SMALL, **more}))
        return {e.target for e in plan.edits if e.kind == "UpdateLinear"}

    assert len(names()) == 6 and len(names(targets="ffn")) == 6 and len(names(targets="attention")) == 12
    assert len(names(targets="all")) == 18 and len(names(layers="last:1")) == 2
    assert names(targets=r".*layer\.0.*key") == {"bert.encoder.layer.0.attention.self.key"}
    plan = fk.plan(model, fk.DSEE(rank=0, density=0.1))
    assert all(e.trained == 26 for e in plan.edits if e.kind == "UpdateLinear")  # of 256
    assert "26 numbers train" in str(plan)
    low = fk.plan(model, fk.DSEE(rank=2, nonzeros=0))
    assert all(set(e.parts) == set() and e.trained == 64 for e in low.edits if e.kind == "UpdateLinear")


def test_what_does_not_fit_is_refused() -> None:
    model = FAMILIES["bert"].model()
    for settings, said in (
        ({"rank": 0, "nonzeros": 0}, "nothing would train"),
        ({"rank": -1}, "rank -1"),
        ({"alpha": 0}, "alpha"),
        ({"density": 2.0}, "density"),
        ({"support": "largest"}, "Choose one of svd"),
        ({"modules_to_train": "head"}, "modules_to_train"),
        ({"support": "gradient"}, "data|gradients"),
        ({"targets": "nothing"}, "no linear of the model matches"),
        ({"lora": "/nowhere"}, "adapter_config.json"),
    ):
        with pytest.raises(FfnkitError, match=said):
            fk.plan(model, fk.DSEE(**settings))
    with pytest.raises(FfnkitError, match="3-D parameter"):
        fk.plan(FAMILIES["mixtral"].model(), fk.DSEE(targets="ffn"))
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL)))
    with pytest.raises(FfnkitError, match="is on .* already"):
        fk.plan(model, fk.DSEE(**SMALL))
    broken = FAMILIES["bert"].model()
    with torch.no_grad():
        broken.get_submodule("bert.encoder.layer.0.attention.self.query").weight[0, 0] = float("nan")
    with pytest.raises(FfnkitError, match=r"layer\.0\.attention\.self\.query"):
        fk.plan(broken, fk.DSEE(**SMALL))


# --- in a model -------------------------------------------------------------------------------------------------------


def disturbed(model: Any, seed: int = 0) -> Any:
    """Updates that are not zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for made in adapter_layers(model).values():
            for parameter in (made.up, made.values):
                if parameter is not None:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("name", slow_but(KINDS, sorted(FAMILIES)))
def test_folded_equals_unfolded_in_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    before = family.outputs(model)
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL)))
    for key, value in family.outputs(model).items():
        assert_close(value, before[key], rel=1e-6, what=key)  # U and S2 start at zero
    after = family.outputs(disturbed(model))
    fk.fold(model)
    assert not adapter_layers(model)
    for key, value in family.outputs(model).items():
        assert_close(value, after[key], rel=1e-5, what=key)
    assert any(not torch.allclose(after[key], before[key], rtol=1e-3) for key in after)  # the control


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("sites", ["qv", "ffn"])
def test_a_plain_loop_trains_what_is_claimed(name: str, sites: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    data = batches(name, model)
    plan = fk.plan(model, fk.DSEE(**SMALL, targets=sites))
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan.save(tmp_path / "plan")
    assert fk.Plan.load(tmp_path / "plan") == plan
    fk.apply(model, plan)
    own = [p for made in adapter_layers(model).values() for p in (made.up, made.down, made.values)]
    claimed = {id(p) for p in own} | {id(p) for p in parts_of(model, ["head"])}
    assert {id(p) for p in fk.trainable_parameters(model)} == claimed
    assert sum(p.numel() for p in own) == sum(e.trained for e in plan.edits if e.kind == "UpdateLinear")
    trained(model, data)
    moved = [n for n, p in model.named_parameters() if n in untouched and not torch.equal(p, untouched[n])]
    assert all(id(dict(model.named_parameters())[n]) in claimed for n in moved)
    after = family.outputs(model)
    fk.save(model, tmp_path / "saved")
    fk.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        for key, value in family.outputs(fk.load(tmp_path / folder).eval()).items():
            assert_close(value, after[key], rel=1e-5, what=f"{folder} {key}")
    fk.fold(model)
    for key, value in family.outputs(model).items():
        assert_close(value, after[key], rel=1e-5, what=f"folded {key}")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapters_come_and_go_to_the_bit(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    data = batches(name, model)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL)))
    one = family.outputs(trained(model, data))
    fk.save_adapter(model, tmp_path / "one")
    two = family.outputs(trained(model, data))
    fk.save_adapter(model, tmp_path / "two")
    about = json.loads((tmp_path / "one" / "adapter.json").read_text())
    assert about["adapter"] == "dsee" and about["trained_beside"] == ["head"]
    for folder, wanted in (("one", one), ("two", two), ("one", one)):
        fk.load_adapter(model, tmp_path / folder)
        assert all(torch.equal(value, wanted[key]) for key, value in family.outputs(model).items()), folder
    fk.remove_adapter(model)
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[path]) and parameter.requires_grad, path
    fresh = fk.load_adapter(family.model(), tmp_path / "two")
    assert all(torch.equal(value, two[key]) for key, value in family.outputs(fresh).items())
    trained(fresh, data)  # it may train on
    other = family.model(seed=5)
    with pytest.raises(FfnkitError, match="another one than the update was made for"):
        fk.load_adapter(other, tmp_path / "one")


def test_state_dicts_show_the_sum_and_go_back() -> None:
    model = fk.apply(m := FAMILIES["bert"].model(), fk.plan(m, fk.DSEE(**SMALL)))
    disturbed(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    path, first = next(iter(adapter_layers(model).items()))
    assert torch.equal(state[f"{path}.weight"], first.weight) and f"{path}.base" not in state
    disturbed(model, seed=1)
    model.load_state_dict(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_tied_ffns_have_one_update() -> None:
    family = FAMILIES["llama"]
    model = family.model()
    data = batches("llama", model)
    fk.apply(model, fk.plan(model, fk.Merging(layers="all", match=False)))
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL, targets="ffn")))
    assert len(adapter_layers(model)) == 3  # up, gate and down of the one FFN
    after = family.outputs(trained(model, data))
    fk.fold(model)
    assert len(ffns(model)) == 1
    for key, value in family.outputs(model).items():
        assert_close(value, after[key], rel=1e-5)


@pytest.mark.parametrize("kind", ["checkpointing", "autocast", "copy"])
def test_what_trainers_do_works(kind: str) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL, targets="qv" if kind == "autocast" else "all"))).train()
    disturbed(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**data[0]).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**data[0]).loss.backward()
    elif kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**data[0]).loss
        loss.backward()
    else:
        model = copy.deepcopy(model)
        model(**data[0]).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(plain)
    for name, grad in found.items():
        assert_close(grad, plain[name], rel=0.25 if kind == "autocast" else 1e-5, what=name)


def test_the_tuner() -> None:
    family = FAMILIES["bert"]
    model = family.model()
    data = batches("bert", model)
    names = {n for n, _ in model.named_parameters()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuner = {"name": "dsee", "rank": 2, "nonzeros": 3}
    tuned = trained(tuners.prepare(model, tuner), data)
    after = family.outputs(tuned)
    plain = tuners.finish(tuned)
    assert {n for n, _ in plain.named_parameters()} == names and all(p.requires_grad for p in plain.parameters())
    assert_close(family.outputs(plain)["logits"], after["logits"], rel=1e-5)
    moved = {n for n, p in plain.named_parameters() if not torch.equal(p, kept[n])}
    assert all("query" in n or "value" in n or "classifier" in n or "pooler" in n for n in moved)
    assert len({n for n in moved if "query" in n or "value" in n}) == 6


# --- peft -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "phi3"])
def test_peft_opens_the_low_rank_part(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    family = FAMILIES[name]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL, alpha=5)))
    trained(model, batches(name, model))
    fk.save_lora(model, tmp_path / "lora")
    both = family.outputs(model)
    with torch.no_grad():
        for made in adapter_layers(model).values():
            made.values.zero_()
    alone = family.outputs(model)
    tuned = PeftModel.from_pretrained(family.model(), str(tmp_path / "lora")).eval()
    found = family.outputs(tuned)
    for key, value in alone.items():
        assert_close(found[key], value, rel=1e-5, what=key)
    assert any(not torch.allclose(both[key], alone[key], rtol=1e-4) for key in alone)  # S2 is not in it
    again = family.model()
    fk.apply(again, fk.plan(again, fk.DSEE(lora=str(tmp_path / "lora"), nonzeros=4)))
    for key, value in family.outputs(again).items():
        assert_close(value, alone[key], rel=1e-5, what=f"back {key}")
    for path, made in adapter_layers(again).items():
        assert (made.rank, made.alpha) == (2, 5.0)
        assert len(made.values) == 4 * max(1, len(query_value(family.model())[path]))


def test_an_adapter_of_pefts_own_is_the_start(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    family = FAMILIES["bert"]
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["query", "value"], use_rslora=True, init_lora_weights=False,
        alpha_pattern={"layer.1.attention.self.query": 2}, modules_to_save=["classifier"],
    )  # fmt: skip
    tuned = get_peft_model(family.model(), config).eval()
    nn.init.normal_(tuned.base_model.model.classifier.modules_to_save["default"].weight)
    wanted = family.outputs(tuned)
    tuned.save_pretrained(tmp_path)
    model = family.model()
    plan = fk.plan(model, fk.DSEE(lora=str(tmp_path), nonzeros=4))
    plan.save(tmp_path / "plan")
    fk.apply(model, fk.Plan.load(tmp_path / "plan"))
    for key, value in family.outputs(model).items():
        assert_close(value, wanted[key], rel=1e-5, what=key)
    with pytest.raises(FfnkitError, match="gets no update"):
        fk.plan(family.model(), fk.DSEE(lora=str(tmp_path), targets="ffn"))
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"use_dora": True}))
    with pytest.raises(FfnkitError, match="DoRA"):
        fk.plan(family.model(), fk.DSEE(lora=str(tmp_path)))


def test_what_pefts_form_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="no low-rank update"):
        fk.save_lora(model, tmp_path / "x")
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL, modules_to_train=("head", "norms"))))
    with pytest.raises(FfnkitError, match="norms trained too"):
        fk.save_lora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- quantized weights ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_updates_over_weights_in_few_bits(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if kind == "torchao" else "bitsandbytes")

    def quantize(model: Any, kind: str, keep: list[str]) -> None:
        if kind != "torchao":
            quantizing.quantize(model, kind, keep)
            return
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        def chosen(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and not name.startswith(tuple(keep))

        quantize_(model.requires_grad_(False), Int8WeightOnlyConfig(version=2), chosen)
        for part in keep:
            model.get_submodule(part).requires_grad_(True)

    family = FAMILIES["bert"]
    model = family.model()
    data = batches("bert", model)
    quantize(model, kind, keep=["classifier", "bert.pooler"])
    before = family.outputs(model)
    bits = {n: fingerprint(p) for n, p in model.named_parameters()}
    fk.apply(model, fk.plan(model, fk.DSEE(**SMALL)))
    assert len(adapter_layers(model)) == 6
    for key, value in family.outputs(model).items():
        assert_close(value, before[key], rel=1e-6, what=key)
    trained(model, data)
    after = family.outputs(model)
    assert_differs(after["logits"], before["logits"])
    fk.save_adapter(model, tmp_path / "one")
    fk.remove_adapter(model)
    assert {n: v.tolist() for n, v in bits.items()} == {n: fingerprint(p).tolist() for n, p in model.named_parameters()}
    fk.load_adapter(model, tmp_path / "one")
    assert_close(family.outputs(model)["logits"], after["logits"], rel=1e-6)
    fk.fold(model)
    query = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(query) is nn.Linear and query.weight.dtype == torch.float32
    assert_close(family.outputs(model)["logits"], after["logits"], rel=0.1 if kind == "int8" else 1e-4)
    again = family.model()
    quantize(again, kind, keep=["classifier", "bert.pooler"])
    with pytest.raises(FfnkitError, match="quantized"):
        fk.plan(again, fk.DSEE(**SMALL, support="gradient"), data=data)
