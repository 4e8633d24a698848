"""Tickets: iterative magnitude pruning with rewinding against a plain loop; that it goes on; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_recipe_run import outcome, recipe_of, run, tiny
from torch import Tensor

import ffnkit as fk
from ffnkit import tune
from ffnkit.errors import FfnkitError
from ffnkit.recipe import tickets
from ffnkit.recipe.schema import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("tickets"))


def drawn(folder: Path, **ticket: Any) -> Recipe:
    return recipe_of(
        folder,
        stages=["tune", "evaluate", "export"],
        tune={"learning_rate": 1e-2, "steps": 4, "batch_size": 8, "max_length": 16, "eval_every": 4},
        measure={"latency": False},
        export="compact",
        arms={"ticket": {"tickets": {"rounds": 2, "share": 0.3} | ticket}},
    )


def weights(model: Any) -> dict[str, Tensor]:
    """The linears of all layers, as the pruning takes them."""
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if n.endswith("weight") and ".layer." in n and p.ndim == 2
    }


@pytest.mark.slow
@pytest.mark.parametrize("rewind", [0, 2])
def test_rounds_are_those_of_a_plain_loop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewind: int
) -> None:
    """Masks from the trained weights of each round, by size in all linears at once; starts from the rewound ones."""
    starts: list[dict[str, Tensor]] = []
    ends: list[dict[str, Tensor]] = []
    kept: list[dict[str, Tensor]] = []
    train = tune.train

    def noting(model: Any, *given: Any, **how: Any) -> Any:
        starts.append({n.replace(".base", ""): v for n, v in weights(model).items()})
        result = train(model, *given, **how)
        if how.get("snapshot"):
            kept.append(load_file(how["snapshot"][1]))
        ends.append(weights(result.model))
        return result

    monkeypatch.setattr(tune, "train", noting)
    results = run(drawn(folder, rewind=rewind), tmp_path)
    assert results.ok, results.rows
    assert len(starts) == 3 and len(kept) == bool(rewind)
    origin = {n: kept[0][n] for n in starts[0]} if rewind else starts[0]
    assert rewind == 0 or any(not torch.equal(origin[n], starts[0][n]) for n in origin)
    mask = {n: torch.ones_like(v, dtype=torch.bool) for n, v in origin.items()}
    every = sum(v.numel() for v in origin.values())
    for number in (0, 1):
        trained = ends[number]
        assert all((trained[n][~mask[n]] == 0).all() for n in mask)
        count = round((1 - 0.7 ** (number + 1)) * every)
        sizes = torch.cat([trained[n].abs().masked_fill(~mask[n], -1.0).flatten() for n in origin])
        order = sizes.sort(stable=True).indices[:count]
        flat = torch.ones(every, dtype=torch.bool).index_fill_(0, order, False)
        mask = {
            n: part.view_as(origin[n])
            for n, part in zip(origin, flat.split([v.numel() for v in origin.values()]), strict=True)
        }
        for name, value in starts[number + 1].items():
            assert torch.equal(value, origin[name] * mask[name]), (number, name)
    row = results.rows[0]
    assert row["zeros"] == pytest.approx(0.51, abs=1e-3) and row["zeros_merged"] == pytest.approx(row["zeros"])
    opened = fk.load(tmp_path / "units/ticket/seed-0/compact")
    assert fk.inspect(opened).parameters > 0
    final = weights(fk.fold(opened))
    assert sum(int((v == 0).sum()) for v in final.values()) == sum(int((~m).sum()) for m in mask.values())


def test_killed_between_and_within_rounds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = drawn(folder, rewind=1)
    run(recipe, tmp_path / "whole")
    carry_out, save, calls = tickets.carry_out, fk.Plan.save, []

    def stopping(self: Any, path: Any) -> None:
        save(self, path)
        calls.append(path)
        raise KeyboardInterrupt  # after each round's masks

    monkeypatch.setattr(fk.Plan, "save", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    monkeypatch.setattr(fk.Plan, "save", save)
    assert len(calls) == 2 and tickets.carry_out is carry_out
    assert run(recipe, tmp_path / "cut").ok
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    done = json.loads((tmp_path / "cut/units/ticket/seed-0/tickets.json").read_text())
    assert done["rounds"] == 2 and done["attempts"] == 3


@pytest.mark.slow
def test_a_step_that_does_not_come_is_told(folder: Path, tmp_path: Path) -> None:
    results = run(drawn(folder, rewind=99), tmp_path)
    assert "rewind 99: the first training was over before that step" in results.rows[0]["error"]


@pytest.mark.parametrize(
    ("arm", "match"),
    [
        ({"tuner": "lora"}, "full or ffn, not lora"),
        ({"method": "fusion", "width": 0.5}, "Leave method and prune out"),
        ({"prune": {"method": "prune"}}, "Leave method and prune out"),
    ],
)
def test_arms_that_bear_no_tickets_are_refused(folder: Path, arm: dict[str, Any], match: str) -> None:
    with pytest.raises(FfnkitError, match=f"arms.a.tickets: .*{match}"):
        recipe_of(
            folder, arms={"a": {"tickets": {"rounds": 1}} | arm}, stages=["compress", "tune", "prune", "evaluate"]
        )
    with pytest.raises(FfnkitError, match="tickets.rounds"):
        recipe_of(folder, arms={"a": {"tickets": {"rounds": 0}}})
    with pytest.raises(FfnkitError, match="need the stage tune"):
        recipe_of(folder, arms={"a": {"tickets": {"rounds": 1}}}, stages=["evaluate"])
