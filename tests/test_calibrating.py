"""Statistics of one pass as a file: the very plans of the data, merged, refused, layer by layer; eval mode always."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from test_cli import bad, bert, good, verbosity
from torch import nn

import ffnkit as fk
from ffnkit import methods
from ffnkit.analysis.similarity import similarity
from ffnkit.calibration.drift import Drift, apart
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.calibration.stored import PROBED, StatisticsFile, StatisticsWriter
from ffnkit.errors import FfnkitError, FfnkitWarning
from ffnkit.methods.calibrating import merge
from ffnkit.model.finding import ffns
from ffnkit.ops.moments import Moments

_ = (bert, verbosity)  # fixtures
TAKES: dict[str, dict[str, Any]] = {
    "fusion": {"name": "calibrated-fusion", "width": 0.5, "refine": 3, "sequential": False},
    "greedy": {"name": "calibrated-fusion", "effort": "fast", "width": 0.25, "select": "greedy"},
    "few": {"name": "calibrated-fusion", "effort": "fast", "width": 0.5, "refine": 3, "tokens": 20},
    "importance": {"name": "importance", "width": 0.5},
    "neurons": {"name": "structured", "by": "activation", "remove_heads": 0, "remove_neurons": 0.5},
}
REFUSES: dict[str, dict[str, Any]] = {
    "sequential": {"name": "calibrated-fusion", "width": 0.5, "sequential": True},
    "heads": {"name": "structured", "by": "activation", "remove_heads": 0.5, "remove_neurons": 0.5},
    "attention": {"name": "heads", "by": "activation", "remove": 0.5},
    "layers": {"name": "merging", "layers": "all", "features": "up"},
    "gradients": {"name": "sparsegrad"},
    "inputs": {"name": "prune", "by": "wanda"},
}


def case(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = FAMILIES[family].model().to(dtype)
    return model, [FAMILIES[family].inputs(model, seed=seed) for seed in range(4)]


def made(settings: dict[str, Any]) -> Any:
    return methods.build(settings["name"], **{key: value for key, value in settings.items() if key != "name"})


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("bert", torch.float32), ("mixtral", torch.float32)]
    + [("t5", torch.float32), ("vit", torch.float32)],
    ids=str,
)
def test_statistics_give_the_very_plans_of_the_data(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = case(family, dtype)
    fk.calibrate(model, data).save(tmp_path / "all")
    fk.calibrate(model, data[:2], tmp_path / "half")
    every, half = (StatisticsFile.load(tmp_path / name, model) for name in ("all", "half"))
    assert {key: v.dtype for key, v in every.probe[0].items()} == {
        key: v.dtype for key, v in data[0].items() if isinstance(v, torch.Tensor)
    }
    for settings in TAKES.values():
        wanted, found = (fk.plan(model, made(settings), data=each) for each in (data, every))
        assert wanted == found and wanted.quantities == found.quantities
    assert fk.plan(model, made(TAKES["fusion"]), data=half) != fk.plan(model, made(TAKES["fusion"]), data=data)
    widths = [fk.allocate(model, 0.6, data=each, multiple=4).to_dict() for each in (data, every)]
    assert widths[0] == widths[1]


@pytest.mark.parametrize("family", ["llama", "switch"])
def test_merged_files_are_one_pass_over_all(family: str, tmp_path: Path) -> None:
    model, data = case(family)
    whole = fk.calibrate(model, data, held=20)
    parts = [fk.calibrate(model, data[:1], held=25), fk.calibrate(model, data[1:], held=20)]
    found = merge(parts, tmp_path / "merged")
    assert (found.data, found.held, found.layers, len(found.probe)) == (whole.data, 20, whole.layers, len(whole.probe))
    for name, experts in whole.layers.items():
        for number in range(experts):
            wanted, got = whole.state(name, number), found.state(name, number)
            assert wanted.keys() == got.keys()
            for key, value in wanted.items():
                assert torch.allclose(value, got[key], rtol=1e-6), key
    with pytest.warns(FfnkitWarning, match="1 of 5 batches"):
        merge([parts[0], whole])
    other = fk.calibrate(case("bert")[0], case("bert")[1])
    for given in ([whole], [whole, other], [whole, fk.calibrate(model, data, layers="0")]):
        with pytest.raises(FfnkitError, match="merging statistics"):
            merge(given)


@pytest.mark.parametrize("name", REFUSES)
def test_methods_that_need_more_say_so(name: str) -> None:
    model, data = case("bert")
    with pytest.raises(FfnkitError) as caught:
        fk.plan(model, made(REFUSES[name]), data=fk.calibrate(model, data))  # type: ignore[arg-type]
    assert "it needs" in str(caught.value) and "statistics hold sums" in str(caught.value)


def test_statistics_of_a_router_that_turns_to_float32_fit(tmp_path: Path) -> None:
    """That of Switch Transformers does where it runs, and a fresh model of the same weights has not run yet."""
    model, data = case("switch")
    model.to(torch.bfloat16)
    fresh = copy.deepcopy(model)
    fk.calibrate(model, data, tmp_path / "kept")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    for each in (model, fresh):
        kept = StatisticsFile.load(tmp_path / "kept", each)
        fk.plan(each, fk.CalibratedFusion(0.5, effort="fast"), data=kept)  # type: ignore[arg-type]
        fk.allocate(each, 0.7, data=kept)  # type: ignore[arg-type]
    with pytest.raises(FfnkitError, match="another dtype"):
        StatisticsFile.load(tmp_path / "kept", fresh.float())


def test_a_plan_tells_whether_its_layers_follow() -> None:
    model, data = case("llama")
    told = [
        fk.plan(model, fk.CalibratedFusion(0.5, refine=0), data=each).report["sequential"]  # type: ignore[arg-type]
        for each in (data, fk.calibrate(model, data))
    ]
    assert told == [True, False]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, data = case("llama")
    kept = fk.calibrate(model, data, tmp_path / "kept", layers="0", held=5)
    fusion = fk.CalibratedFusion(0.5, layers="0", refine=3)
    with pytest.raises(FfnkitError, match="5 of .* tokens were kept"):
        fk.plan(model, fusion, data=kept)  # type: ignore[arg-type]
    for fits in (fk.CalibratedFusion(0.5, layers="0", refine=3, tokens=5), fk.CalibratedFusion(0.5, "0", refine=0)):
        fk.plan(model, fits, data=kept)  # type: ignore[arg-type]
    with pytest.raises(FfnkitError, match=r"they hold nothing of model\.layers\.1"):
        fk.plan(model, fk.CalibratedFusion(0.5, refine=0), data=kept)  # type: ignore[arg-type]
    with torch.no_grad():
        ffns(model)[1].raw().up.mul_(1.5)
    with pytest.raises(FfnkitError, match="of other weights"):
        fk.plan(model, fk.Combined([fusion, {"method": "magnitude", "width": 0.5, "layers": "1"}]), data=kept)  # type: ignore[arg-type]
    (tmp_path / "broken").write_bytes((tmp_path / "kept").read_bytes()[:1000])
    (tmp_path / "other").write_bytes(b"{}")
    for path in ("broken", "other", "missing"):
        with pytest.raises(FfnkitError, match="cannot be read"):
            StatisticsFile.load(tmp_path / path)
    with pytest.raises(FfnkitError, match="not a number of tokens"):
        fk.calibrate(model, data, held=-1)


def test_one_layer_at_a_time_and_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = case("bert")
    alive: list[int] = []
    write = StatisticsWriter.add

    def noting(self: StatisticsWriter, *given: Any) -> None:
        alive.append(sum(isinstance(each, Moments) for each in gc.get_objects()))
        write(self, *given)
        if (tmp_path / "stop").exists() and len(alive) % 3 == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StatisticsWriter, "add", noting)
    gc.collect()
    fk.calibrate(model, data, tmp_path / "whole")
    assert len(alive) == len(ffns(model)) > 1 and max(alive) == 1
    (tmp_path / "stop").touch()
    alive.clear()
    with pytest.raises(KeyboardInterrupt):
        fk.calibrate(model, data, tmp_path / "half")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "stop"}


def test_what_is_stored_is_as_narrow_as_it_is_exact(tmp_path: Path) -> None:
    types = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, data = case("llama", dtype)
        with safe_open(fk.calibrate(model, data, tmp_path / "f").path, "pt") as file:
            keys = {key.split(":", 2)[2]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        types[dtype] = {keys[name] for name in keys if name.endswith("held.inputs")}
    assert types == {torch.bfloat16: {torch.bfloat16}, torch.float32: {torch.float32}}


# Eval mode ----------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, data: list[dict[str, Any]]) -> Any:
    found: list[float] = []
    linears = {
        name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "intermediate" in name
    }
    weight_gradients(model, data, linears, lambda _, grad: found.append(float(grad.double().norm())))
    return sorted(found)


def planned(settings: dict[str, Any]) -> Callable[..., Any]:
    def plan(model: nn.Module, data: list[dict[str, Any]]) -> list[float]:
        edits = fk.plan(model, made(settings), data=data).edits
        return [float(value.double().sum()) for edit in edits for value in edit.tensors().values()]

    return plan


PASSES: dict[str, Callable[..., Any]] = {
    **{name: planned(settings) for name, settings in (TAKES | REFUSES).items()},
    "allocate": lambda model, data: fk.allocate(model, 0.5, data=data).to_dict(),
    "calibrate": lambda model, data: {
        (name, key): float(value.double().sum())
        for statistics in [fk.calibrate(model, data)]
        for name in statistics.layers
        for key, value in statistics.state(name, 0).items()
    },
    "gradients": gradients,
    "analyze": lambda model, data: [
        str(row.errors)
        for row in fk.analyze(model, [fk.CalibratedFusion(0.5, refine=2)], data=data, calibration=data, ntk=False).rows
    ],
    "similarity": lambda model, data: {k: v for k, v in similarity(model, data).to_dict().items() if k != "seconds"},
    "judge": lambda model, data: Drift(model, data).measure(),
}


@pytest.mark.parametrize("name", PASSES)
def test_all_passes_are_in_eval_mode(name: str) -> None:
    model, data = case("bert")
    data = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in data[:2]]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.config.attention_probs_dropout_prob = 0.5  # type: ignore[union-attr]
    found = []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(0)
        found.append(PASSES[name](model, data))
        assert all(module.training is training for module in model.modules())
    assert found[0] == found[1]
    with torch.no_grad():  # the control: dropout is felt
        assert not torch.equal(model(**data[0]).logits, model(**data[0]).logits)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["good fine great film"] * 90))
    (tmp_path / "b.csv").write_text("body,n\n" + "bad poor awful book,1\n" * 90)
    texts = ("--text", tmp_path / "a.txt", "--tokens", 200)
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    said = good("calibrate", bert, *texts, "--out", one, "--json")
    report = json.loads(said.stdout)
    assert report["layers"] == 3 and report["bytes"] == one.stat().st_size
    assert "writing about" in said.stderr
    good("calibrate", bert, "--text", tmp_path / "b.csv", "--text-column", "body", "--tokens", 100, "--out", two)
    good("calibrate", bert, "--merge", one, two, "--out", both)
    assert StatisticsFile(both).data == StatisticsFile(one).data + StatisticsFile(two).data
    narrow = ("compress", bert, "--set", "width=0.5", "--set", "sequential=false")
    for number, given in enumerate((texts, ("--statistics", one), ("--statistics", both))):
        good(*narrow, *given, "--out", tmp_path / str(number))
    weights = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert weights[0] == weights[1] != weights[2]
    budgets = [
        json.loads(good("compress", bert, "--budget", 0.5, *given, "--dry-run", "--json").stdout)["budget"]
        for given in (texts, ("--statistics", one))
    ]
    assert budgets[0] == budgets[1]
    out = ("--out", tmp_path / "x")
    assert "--text is given too" in bad(*narrow, *texts, "--statistics", one, *out)
    assert "no such file" in bad(*narrow, "--statistics", tmp_path / "no", *out)
    assert "sequential" in bad(*narrow[:4], "--set", "sequential=true", "--statistics", one, *out)
    assert "uses no data" in bad(*narrow[:4], "--method", "magnitude", "--statistics", one, *out)
    assert "--merge" in bad("calibrate", bert, one, *out)
    assert "files are named" in bad("calibrate", bert, "--merge", one, *out)
    assert "data are named too" in bad("calibrate", bert, "--merge", one, two, *texts, *out)
    assert not (tmp_path / "x").exists()


def test_the_first_batches_hold_enough_tokens_for_every_stack() -> None:
    from ffnkit.calibration.stored import first_batches

    ids, mask = torch.zeros(8, 100, dtype=torch.long), torch.zeros(8, 100, dtype=torch.long)
    mask[:, :50] = 1
    assert len(first_batches([{"input_ids": ids}] * 30)) == -(-PROBED // 800)
    assert len(first_batches([{"input_ids": ids, "attention_mask": mask}] * 30)) == -(-PROBED // 400)
    few = torch.full((8, 100), -100)
    few[:, :30] = 1
    assert len(first_batches([{"input_ids": ids, "labels": few}] * 30)) == -(-PROBED // 240)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (20, 2)])
def test_batches_kept_apart_are_told_by_their_place(count: int, held: int) -> None:
    """The same batch may be given several times: what is left to fit on is not lost with it."""
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    fit, judged = apart([batch] * count)
    assert (len(fit), len(judged)) == (count - held, held)
