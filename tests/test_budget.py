"""Widths by layer under one budget: exact choice, true parameters, widths that follow what the layers hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_cli import bad, bert, good, llama, verbosity  # noqa: F401
from test_contract import same, snapshot
from test_recipe_run import folder  # noqa: F401
from tolerance import assert_close

import ffnkit as fk
from ffnkit import methods
from ffnkit.budget.allocation import narrowing_costs
from ffnkit.budget.sizes import room
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops import knapsack as solve
from ffnkit.ops.curves import output_curve, tail_curve
from ffnkit.ops.knapsack import cheapest
from ffnkit.ops.subset import choose

KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "bart", "switch", "mixtral", "qwen2-moe", "albert", "clip")


def batches(name: str, model: Any, count: int = 3) -> list[Any]:
    return [FAMILIES[name].inputs(model, seed=seed) for seed in range(count)]


# ------------------------------------------------------------------------------------------------ the choice
def instance(seed: int, mixed: bool) -> tuple[list[list[int]], list[list[float]], int]:
    draw = torch.Generator().manual_seed(seed)
    sizes, costs = [], []
    for _ in range(4):
        unit = int(torch.randint(2, 9, (), generator=draw)) if mixed else 3
        sizes.append([unit * k for k in range(1, 6)])
        costs.append(torch.rand(5, generator=draw).sort(descending=True).values.tolist())
    return sizes, costs, sum(row[2] for row in sizes) - 1


def brute(sizes: list[list[int]], costs: list[list[float]], budget: int) -> float:
    totals = []
    for pick in itertools.product(*(range(len(row)) for row in sizes)):
        if sum(row[k] for row, k in zip(sizes, pick, strict=True)) <= budget:
            totals.append(sum(row[k] for row, k in zip(costs, pick, strict=True)))
    return min(totals)


def greedy(sizes: list[list[int]], costs: list[list[float]], budget: int) -> float:
    """Widen, one step at a time, what gains most a parameter: not exact where costs are not convex."""
    pick = [0] * len(sizes)
    while True:
        left = budget - sum(row[k] for row, k in zip(sizes, pick, strict=True))
        gains = [
            ((c[k] - c[k + 1]) / (s[k + 1] - s[k]), i)
            for i, (s, c, k) in enumerate(zip(sizes, costs, pick, strict=True))
            if k + 1 < len(s) and s[k + 1] - s[k] <= left
        ]
        if not gains:
            return sum(row[k] for row, k in zip(costs, pick, strict=True))
        pick[max(gains)[1]] += 1


@pytest.mark.parametrize("mixed", [False, True])
def test_the_choice_is_the_cheapest_of_all(mixed: bool) -> None:
    short = 0
    for seed in range(25):
        sizes, costs, budget = instance(seed, mixed)
        pick = cheapest(sizes, costs, budget)
        assert sum(row[k] for row, k in zip(sizes, pick, strict=True)) <= budget
        found = sum(row[k] for row, k in zip(costs, pick, strict=True))
        assert found == pytest.approx(brute(sizes, costs, budget), abs=1e-12)
        short += greedy(sizes, costs, budget) > found + 1e-9
    assert short > 5  # the control: a greedy choice often is not


def test_rounded_sizes_keep_the_budget_and_nearly_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "CELLS", 200)
    for seed in range(10):
        sizes, costs, budget = instance(seed, True)
        sizes, budget = [[size * 1009 + 1 for size in row] for row in sizes], budget * 1009
        pick = cheapest(sizes, costs, budget)
        assert sum(row[k] for row, k in zip(sizes, pick, strict=True)) <= budget
        found = sum(row[k] for row, k in zip(costs, pick, strict=True))
        assert brute(sizes, costs, budget) - 1e-12 <= found <= brute(sizes, costs, budget - 4 * (budget // 200 + 1))


def test_equal_costs_go_to_the_narrower() -> None:
    assert cheapest([[1, 2, 3]], [[0.0, 0.0, 0.0]], 3) == [0]
    with pytest.raises(ValueError, match="smallest"):
        cheapest([[2], [2]], [[0.0], [0.0]], 3)
    with pytest.raises(ValueError, match="NaN"):
        cheapest([[2]], [[float("nan")]], 3)


# ------------------------------------------------------------------------------------------------ the curves
def activations(n: int, ff: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(n, 12, generator=draw) @ torch.randn(12, ff, generator=draw) + torch.randn(n, ff, generator=draw)
    return h.double(), torch.randn(d, ff, generator=draw).double()


@pytest.mark.parametrize(("ff", "ridge"), [(24, 0.0), (24, 1e-2), (600, 1e-2)])
def test_a_curve_is_what_regression_leaves(ff: int, ridge: float) -> None:
    h, down = activations(4 * ff, ff, 6)
    gram = h.T @ h / len(h)
    curve = output_curve(gram, down, ridge)
    assert sorted(curve.order.tolist()) == list(range(ff)) and curve.lost[-1] == 0
    raised = gram + ridge * gram.diagonal().mean() * torch.eye(ff, dtype=torch.float64)
    for width in (0, 1, 5, ff // 2, ff - 1):
        kept = curve.order[:width]
        rest = raised - raised[:, kept] @ torch.linalg.solve(raised[kept][:, kept], raised[kept])
        assert_close(curve.lost[width], torch.einsum("di,ij,dj->", down, rest, down), rel=1e-6, what=f"width {width}")
    assert bool((curve.lost.diff() <= 1e-9).all())
    rough = output_curve(gram.float(), down.float(), ridge) if ridge else curve
    assert_close(rough.lost[: ff // 2], curve.lost[: ff // 2], rel=2e-2)


def test_narrow_curves_are_those_of_the_greedy_choice() -> None:
    h, down = activations(200, 24, 6)
    gram = h.T @ h
    curve, chosen = output_curve(gram, down, 1e-2), choose(gram, down, 24, 1e-2)
    assert curve.order.tolist() == chosen.order.tolist()
    assert_close(curve.lost[:-1], chosen.remains[:-1], rel=1e-8)
    assert choose(gram, down.flip(1), 24, 1e-2).order.tolist() != chosen.order.tolist()  # the control


def test_tails() -> None:
    curve = tail_curve(torch.tensor([1.0, 5.0, 2.0]))
    assert curve.order.tolist() == [1, 2, 0] and curve.lost.tolist() == [8.0, 3.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------ true parameters
def neurons(model: Any) -> int:
    """Parameters of all FFNs, output biases left out."""
    total = 0
    for ffn in ffns(model):
        bias = ffn.raw().down_bias
        total += ffn.num_parameters - (bias.numel() if bias is not None else 0)
    return total


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_applied_model_keeps_the_budget(name: str, measured: bool) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model) if measured else None
    whole, before = neurons(model), snapshot(model)
    widths = {ffn.name: ffn.width for ffn in ffns(model)}
    found = fk.allocate(model, 0.6, data=data, multiple=4)
    assert same(snapshot(model), before), "the model is left as it was"
    assert not any("forward" in vars(module) for module in model.modules())
    assert list(found) == list(widths)
    assert all(width % 4 == 0 and 4 <= width <= widths[ffn] for ffn, width in found.items())
    step = max(4 * row.parameters / row.after for row in found.rows)
    fk.apply(model, fk.plan(model, methods.build("magnitude", width=found)))
    assert 0.6 * whole - step <= neurons(model) <= 0.6 * whole
    assert found.left == sum(ffn.num_parameters for ffn in ffns(model))
    assert found == fk.allocate(FAMILIES[name].model(), 0.6, data=data, multiple=4), "deterministic"


def test_a_number_of_parameters_counts_output_biases_and_chosen_layers_only() -> None:
    model = FAMILIES["bert"].model()
    found = fk.allocate(model, 2000, layers="last:2", multiple=4)
    assert list(found) == ["bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert found.left <= 2000 < found.left + 4 * 33
    assert found.left == sum(width * 33 + 16 for width in found.values())
    fk.apply(model, fk.plan(model, fk.Fusion(width=found, layers="last:2", restarts=1)))
    assert [ffn.width for ffn in ffns(model)] == [40, *found.values()]


def test_multiples_suit_the_width() -> None:
    assert room(FAMILIES["bert"].model(), 0.5).widths[0] == [8, 16, 24, 32, 40]
    assert room(FAMILIES["bert"].model(), 0.5, multiple=16).widths[0] == [16, 32, 40]
    assert room(FAMILIES["bert"].model(times=32), 0.5).widths[0] == list(range(64, 1281, 64))


@pytest.mark.parametrize("name", ["bert", "bart", "clip", "qwen2-moe"])
def test_uniform_is_one_width_and_the_largest(name: str) -> None:
    model = FAMILIES[name].model()
    space = room(model, 0.5, multiple=2)
    found = fk.allocate(model, 0.5, multiple=2, uniform=True)
    by_width: dict[int, set[int]] = {}
    for row in found.rows:
        by_width.setdefault(row.before, set()).add(row.after)
    assert all(len(group) == 1 for group in by_width.values())
    assert space.left(list(found.values())) <= space.budget
    wider = {row.name: row.after + 2 for row in found.rows}
    assert space.left(list(wider.values())) > space.budget
    fk.apply(model, fk.plan(model, methods.build("random", width=found)))


# ------------------------------------------------------------------------------------------------ what layers hold
def doubled(layer: int) -> Any:
    """A BERT whose FFN in one layer is five neurons, eight times over."""
    model = FAMILIES["bert"].model()
    ffn = ffns(model)[layer]
    ffn.write(ffn.read().take(torch.arange(40) % 5))
    return model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_of_duplicates_is_narrowed_first(layer: int) -> None:
    model = doubled(layer)
    found = fk.allocate(model, 0.6, data=batches("bert", model, 8), multiple=4)
    widths = list(found.values())
    assert widths[layer] <= 12, found
    assert min(width for number, width in enumerate(widths) if number != layer) >= 24
    other = FAMILIES["bert"].model()  # the control: without duplicates the layer gets its share
    assert list(fk.allocate(other, 0.6, data=batches("bert", other, 8), multiple=4).values())[layer] >= 16


def test_an_ffn_that_adds_nothing_gets_the_least() -> None:
    model = FAMILIES["bert"].model()
    ffn = ffns(model)[1]
    ffn.linear("down").weight.data.zero_()  # type: ignore[union-attr]
    for data in (None, batches("bert", model)):
        assert fk.allocate(model, 0.5, data=data, multiple=4)["bert.encoder.layer.1"] == 4


def test_costs_are_those_at_the_end_of_the_model() -> None:
    """Equal errors count by what later layers make of them: the last layer's output is damped, its widths go."""
    model = FAMILIES["llama"].model()
    data = batches("llama", model, 6)
    plain = list(fk.allocate(model, 0.5, data=data, multiple=2).values())
    last = ffns(model)[-1]
    with torch.no_grad():
        last.linear("down").weight.mul_(0.02)  # type: ignore[union-attr]
    damped = list(fk.allocate(model, 0.5, data=data, multiple=2).values())
    assert damped[-1] < plain[-1] and damped[-1] == min(damped)


def test_padding_does_not_count() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    other = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in data]
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 50
    first, second = (fk.allocate(model, 0.5, data=given, multiple=2) for given in (data, other))
    assert [row.cost for row in first.rows] == pytest.approx([row.cost for row in second.rows], rel=1e-4)
    for batch in other:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    third = fk.allocate(model, 0.5, data=other, multiple=2)  # the control
    assert [row.cost for row in first.rows] != pytest.approx([row.cost for row in third.rows], rel=1e-4)


# ------------------------------------------------------------------------------------------------ as a setting
@pytest.mark.parametrize("name", [m.name for m in methods.METHODS if "width" in m.__dataclass_fields__])
def test_methods_take_it_and_plans_keep_it(name: str, tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    found = fk.allocate(model, 0.5, multiple=4)
    data = batches("bert", model)
    plan = fk.plan(model, methods.build(name, width=found), data=data)
    plan.save(tmp_path / "plan")
    loaded = fk.Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.settings["width"] == dict(found)
    assert "by layer" in str(plan)
    fk.apply(model, loaded)
    assert json.loads(json.dumps(found.to_dict()))["widths"] == dict(found)


def test_it_prints_a_table() -> None:
    found = fk.allocate(FAMILIES["bert"].model(), 0.5)
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found) and "cost" in lines[0]
    assert "40" in lines[1] and "encoder.layer.0" in lines[1]
    assert "cost" not in str(fk.allocate(FAMILIES["bert"].model(), 0.5, uniform=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 1.0}, "below 1"),
        ({"budget": 0.0}, "above 0"),
        ({"budget": "half"}, "no number"),
        ({"budget": True}, "no number"),
        ({"budget": 10**6}, "parameters"),
        ({"budget": 0.05}, "smallest|multiple"),
        ({"budget": 0.5, "multiple": 0}, "multiple"),
        ({"budget": 0.5, "layers": "last:9"}, "last:9"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FfnkitError, match=words) as raised:
        fk.allocate(FAMILIES["bert"].model(), **settings)
    assert "BertForSequence" in str(raised.value) and "\n" not in str(raised.value)


def test_edited_ffns_are_refused() -> None:
    model = FAMILIES["bert"].model()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    with pytest.raises(FfnkitError, match="Fold"):
        fk.allocate(model, 0.5)


# ------------------------------------------------------------------------------------------------ the command line
@pytest.mark.slow
def test_compress_with_a_budget(bert: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "notes.txt").write_text("good film\n\nbad meal day\n\nfine book\n\nawful film day\n" * 4)
    words = ("compress", bert, "--budget", "0.5", "--multiple", "4")
    shown = good(*words, "--text", tmp_path / "notes.txt", "--set", "refine=2", "--out", tmp_path / "out")
    assert "widths by layer" in shown.stdout and "calibrated-fusion(width=by layer" in shown.stdout
    found = [ffn.width for ffn in ffns(fk.load(tmp_path / "out"))]
    assert sum(found) <= 60 and all(width % 4 == 0 for width in found)
    seen = json.loads(good(*words, "-m", "magnitude", "--dry-run", "--json").stdout)
    assert seen["budget"]["widths"] == seen["plan"]["settings"]["width"]
    assert seen["budget"]["left"] <= seen["budget"]["parameters"] / 2 + 3 * 16
    measured = json.loads(
        good(*words, "-m", "magnitude", "--text", tmp_path / "notes.txt", "--dry-run", "--json").stdout
    )
    assert measured["budget"]["measure"] != seen["budget"]["measure"]


def test_a_standard_checkpoint_gets_one_width(llama: Path, tmp_path: Path) -> None:  # noqa: F811
    good("compress", llama, "-m", "magnitude", "--budget", "0.5", "--form", "standard", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 8  # three FFNs of 24: half is 12, the next multiple below is 8


def test_bad_budgets_on_the_command_line(bert: Path, tmp_path: Path) -> None:  # noqa: F811
    start = ("compress", bert, "-m", "fusion", "--dry-run")
    assert "--set width" in bad(*start, "--budget", "0.5", "--set", "width=0.5")
    assert "--budget" in bad(*start, "--multiple", "8", "--set", "width=0.5")
    assert "between 0 and 1" in bad(*start, "--budget", "1.5")
    assert "multiple" in bad(*start, "--budget", "0.5", "--multiple", "40")
    good(*start, "--set", "width=0.5", "--plan-out", tmp_path / "plan")
    assert "--budget" in bad("compress", bert, "--plan", tmp_path / "plan", "--budget", "0.5", "--dry-run")
    (tmp_path / "notes.txt").write_text("good film")
    uniform = ("--budget", "0.5", "--form", "standard", "--text", tmp_path / "notes.txt")
    assert "no data" in bad(*start, *uniform)


# ------------------------------------------------------------------------------------------------ recipes
def plain(folder: Path, **arm: Any) -> dict[str, Any]:  # noqa: F811
    files = {"train": str(folder / "train.csv"), "validation": str(folder / "validation.csv")}
    return {
        "name": "budgets",
        "model": str(folder / "model"),
        "task": {**files, "text": "text", "label": "label"},
        "stages": ["compress", "evaluate"],
        "export": "none",
        "measure": {"latency": False},
        "arms": {"narrow": arm},
    }


def test_an_arm_with_a_budget_runs(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from ffnkit.recipe import run
    from ffnkit.recipe.schema import recipe_from

    arm = {"method": "calibrated-fusion", "budget": 0.5, "multiple": 4, "refine": 0}
    recipe = recipe_from(plain(folder, **arm))
    assert recipe_from(recipe.to_dict()) == recipe
    result = run(recipe, tmp_path / "out", progress=False, isolate=False)
    assert result.ok, result.failed
    row = result.rows[0]
    marker = json.loads((tmp_path / "out" / "units" / "narrow" / "seed-0" / "compress.json").read_text())
    assert sum(marker["widths"].values()) <= 24 and all(width % 4 == 0 for width in marker["widths"].values())
    assert row["settings"]["budget"] == 0.5 and "width" not in row["settings"]
    assert row["ffn_parameters"] == sum(width * 33 + 16 for width in marker["widths"].values())


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"method": "fusion", "budget": 0.5, "width": 0.5}, "width"),
        ({"method": "fusion", "budget": 1.5}, "budget"),
        ({"method": "fusion", "budget": "half"}, "budget"),
        ({"method": "fusion", "width": 0.5, "multiple": 8}, "multiple"),
        ({"budget": 0.5}, "budget"),
        ({"method": "fusion", "budgets": 0.5}, "budget"),
        ({"method": "fusion"}, "width"),
    ],
)
def test_a_wrong_budget_in_a_recipe_is_one_line(arm: dict[str, Any], words: str) -> None:
    from ffnkit.recipe.schema import recipe_from

    with pytest.raises(FfnkitError, match=words) as raised:
        recipe_from(plain(Path("nowhere"), **arm))
    assert "arms.narrow" in str(raised.value)


def test_a_budget_that_does_not_fit_the_model_is_found_first(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from ffnkit.recipe import run
    from ffnkit.recipe.schema import recipe_from

    with pytest.raises(FfnkitError, match="arms.narrow.*multiple"):
        run(recipe_from(plain(folder, method="fusion", budget=0.1)), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_costs_measured_once_serve_every_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name].model().eval()
    data = batches(name, model)
    costs = narrowing_costs(model, data)
    multiple = {"multiple": 4}
    assert fk.allocate(model, 0.5, costs=costs, **multiple) == fk.allocate(model, 0.5, data=data, **multiple)
    monkeypatch.setattr("ffnkit.budget.allocation.costs_of", None)  # nothing is measured any more
    wide, narrow = (fk.allocate(model, share, costs=costs, **multiple) for share in (0.75, 0.35))
    assert sum(wide.values()) > sum(narrow.values())
    assert wide.measure == "how far the model's end moves"
    first = next(iter(costs))
    for wrong in ({**costs, first: costs[first][:-1]}, {k: v for k, v in costs.items() if k != first}):
        with pytest.raises(FfnkitError, match="Measure them anew"):
            fk.allocate(model, 0.5, costs=wrong, **multiple)
