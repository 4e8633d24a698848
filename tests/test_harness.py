"""Figures of lm-evaluation-harness: its own, for the compact and the standard form alike, by command and recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_recipe_run import run
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit import methods
from ffnkit.cli.program import app
from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import recipe_from
from ffnkit.tasks.metrics import greater_is_better
from ffnkit.tasks.settings import HarnessSettings

TASKS = "own_choice,own_written,own_text"
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\nfewshot_split: test\n"
YAML = {
    "own_choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{gold}}"\n'
    'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "own_written": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\n'
    'generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n',
    "own_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    things = ["little girl", "big dog", "happy cat", "sad boy", "tall tree", "kind man"]
    rows = [
        {"q": f"Once upon a time, there was a {each}", "choices": [" named Lily.", " of the and."], "gold": i % 2}
        for i, each in enumerate(things)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in YAML.items():
        common = COMMON.format(rows=folder / "rows.json")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}metadata: {{version: 1.0}}\n")
    return folder


@pytest.fixture(scope="module")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model with thin pairs, in both forms."""
    folder = tmp_path_factory.mktemp("harness")
    model = fk.load(models_dir / "stories260K")
    fk.apply(model, fk.plan(model, methods.build("svd", width=0.5, layers="last:2")))
    fk.save(model, folder / "compact")
    fk.export(model, folder / "standard")
    return {name: folder / name for name in ("compact", "standard")}


def figures(model: Path, asked: Path, *more: str) -> dict[str, Any]:
    words = ("eval", str(model), "--lm-eval", TASKS, "--include-path", str(asked), "--json", "--quiet", *more)
    found = CliRunner().invoke(app, [*words])
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout[found.stdout.index("{") :]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_figures_are_the_harness_s_own(models: dict[str, Path], asked: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    ours, own = {}, {}
    for form, model in models.items():
        ours[form] = figures(model, asked, "--lm-eval-set", "num_fewshot=1")
        own[form] = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={model}", tasks=TASKS.split(","), num_fewshot=1, device="cpu",
            task_manager=TaskManager(include_path=str(asked)),  # its own default for the rest
        )["results"]  # fmt: skip
    for form, found in ours.items():
        assert set(found["metrics"]) == set(YAML)
        assert found["shots"]["own_choice"] == 1 and found["rows"]["own_text"] == 6
        for task, metrics in found["metrics"].items():
            for name, value in metrics.items():
                assert value == pytest.approx(own[form][task][f"{name},none"], rel=1e-6), (form, task, name)
                assert value == pytest.approx(ours["compact"]["metrics"][task][name], rel=1e-4)
        assert found["errors"]["own_choice"]["acc"] == pytest.approx(own[form]["own_choice"]["acc_stderr,none"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_model_and_random_numbers_are_left_as_they_were(models: dict[str, Path], asked: Path) -> None:
    pytest.importorskip("lm_eval")
    from ffnkit.report.harness import harness

    model = fk.load(models["compact"]).train()
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    settings = HarnessSettings.model_validate({"tasks": "own_text", "include_path": str(asked), "limit": 2})
    found = harness(model, settings, str(models["compact"]))
    assert found.rows == {"own_text": 2} and model.training
    assert random.getstate() == states[0] and torch.get_rng_state().equal(states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_in_a_recipe(models_dir: Path, asked: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"Once there was a cat number {i}. It was happy." for i in range(40))
    )
    data = {
        "name": "asked", "model": str(models_dir / "stories260K"), "task": {"train": str(tmp_path / "text.txt")},
        "stages": ["compress", "evaluate", "export"], "arms": {"whole": {}, "half": {"method": "fusion", "width": 0.5}},
        "lm_eval": {"tasks": ["own_choice", "own_text"], "include_path": str(asked), "bootstrap_iters": 0},
        "measure": {"batch_size": 1, "length": 8, "repeats": 1},
    }  # fmt: skip
    results = run(recipe_from(data), tmp_path / "out")
    assert results.ok, results.failed
    for row in results.rows:
        compact = tmp_path / "out" / row["checkpoints"]["compact"]
        own = figures(compact, asked)["metrics"]
        assert row["metrics"]["acc (own_choice)"] == pytest.approx(own["own_choice"]["acc"])
        assert row["metrics"]["word_perplexity (own_text)"] == pytest.approx(
            own["own_text"]["word_perplexity"], rel=1e-4
        )
        assert row["lm_eval"]["versions"]["lm_eval"]
    assert "own_choice" in (tmp_path / "out" / "table.md").read_text()
    for changed, told in (({"tasks": ["no_such"]}, "no such task"), ({"tasks": "own_text"}, "holds")):
        with pytest.raises(FfnkitError, match=told):
            run(recipe_from(data | {"lm_eval": {**data["lm_eval"], **changed}}), tmp_path / "out")  # type: ignore[dict-item]


def test_what_is_refused(models_dir: Path, tmp_path: Path) -> None:
    def told(*words: str) -> str:
        found = CliRunner().invoke(app, ["eval", str(models_dir / "stories260K"), *words])
        assert found.exit_code == 2
        return found.output.replace("\n", " ")

    assert "--task sst2" in told("--lm-eval", "arc_easy", "--task", "sst2")
    assert "there is no --lm-eval" in told("--task", "sst2", "--lm-eval-set", "num_fewshot=1")
    assert "--limit is given too" in told("--lm-eval", "arc_easy", "--limit", "3", "--lm-eval-set", "limit=4")
    assert "num_fewshots" in told("--lm-eval", "arc_easy", "--lm-eval-set", "num_fewshots=4")
    with pytest.raises(FfnkitError, match="lm_eval is measured in the stage evaluate"):
        data = {"name": "a", "model": "m", "task": "sst2", "arms": {"a": {}}, "stages": ["tune"]}
        recipe_from(data | {"lm_eval": {"tasks": "arc_easy"}})


def test_a_config_in_memory_names_its_method_to_tools(models_dir: Path, tmp_path: Path) -> None:
    from transformers.quantizers import AutoQuantizationConfig

    model = fk.load(models_dir / "stories260K")
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:1")))
    described = model.config.quantization_config
    assert type(AutoQuantizationConfig.from_dict(described)).__name__ == "FfnkitConfig"
    assert "quant_method" not in described  # as it is saved
    with pytest.raises(ValueError, match="quant_method"):
        AutoQuantizationConfig.from_dict({"bits": 4})


def test_of_its_metrics_which_are_better_low() -> None:
    assert not greater_is_better("word_perplexity") and greater_is_better("acc_norm")
