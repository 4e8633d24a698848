"""Several processes train one model as one process does: every tuner, in whole and in shards, killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_recipe_run import recipe_of, tiny
from together import NAMES
from tolerance import assert_close

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.io import processes
from ffnkit.recipe import launching, run
from ffnkit.recipe.parts import Launch
from ffnkit.recipe.shares import Shares
from ffnkit.tune import checkpoints, tuners

SLOW = pytest.mark.slow
pytestmark = pytest.mark.timeout(1500)  # all cases at once, on a busy machine
CASES = [
    *NAMES,
    *("tied:full", "tied:lora", "tied:sparsegrad", "tied:dsee", "llama:full", "llama:sparsegrad", "llama:meprop"),
    *("killed:full", "killed:lora-norms", "killed:refresh", "killed:step", "killed:dsee"),
    *("fsdp:bert:full", "fsdp:bert:lora", "fsdp:bert:sparsegrad", "fsdp:bert:masked-gradient", "fsdp:bert:dsee"),
    *("differing:full", "differing:lora", "fsdp:differing:lora"),
    *("fsdp:tied:full", "fsdp:llama:ffn", "killed:fsdp:bert:full", "killed:fsdp:bert:refresh", "killed:fsdp:bert:lora"),
]
HERE = Path(__file__).parent


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")


def together(
    *words: object, launcher: tuple[str, ...] = TORCHRUN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Two processes by a launcher: torch's, which accelerate's calls as well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", *launcher, *map(str, words)]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=1400, cwd=HERE)


# Softmax takes out what the keys' bias adds: its gradient is rounding, which Adam makes steps of.
OF_NO_EFFECT = "key.bias"


def plain(case: str) -> str:
    """The case that one process trains, uninterrupted."""
    return case.replace("killed:", "").replace("fsdp:", "").removeprefix("bert:")


@pytest.fixture(scope="module")
def states(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of what two processes and one leave of the cases that are asked for."""
    items = [item for item in request.node.session.items if item.path == request.path and "states" in item.fixturenames]
    cases = [item.callspec.params["case"] for item in items]
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    done = together(HERE / "together.py", two, *cases)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = [sys.executable, str(HERE / "together.py"), str(one), *dict.fromkeys(map(plain, cases))]
    done = subprocess.run(alone, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return two, one


@SLOW
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(case: str, states: tuple[Path, Path]) -> None:
    """To the rounding of float64; a prefix of peft is float32."""
    found, expected = (
        load_file(folder / name.replace(":", "-")) for folder, name in zip(states, (case, plain(case)), strict=True)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not key.endswith(OF_NO_EFFECT):
            assert_close(found[key], value, rel=1e-5 if "prefix" in case else 1e-11, what=f"{case} {key}")
    for folder in states[0].glob("*-adapter"):  # written once, and whole
        assert any(path.stat().st_size > 100 for path in folder.glob("*.safetensors"))


@SLOW
def test_processes_of_other_batches_end_elsewhere(tmp_path: Path) -> None:
    """What the comparison rests on: without the mean over processes it would not hold."""
    done = together(HERE / "together.py", tmp_path, "full", FFNKIT_TEST_ALONE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    one = subprocess.run(
        [sys.executable, str(HERE / "together.py"), str(tmp_path / "one"), "full"], env={**os.environ}, text=True
    )
    assert one.returncode == 0
    first, second = load_file(tmp_path / "full"), load_file(tmp_path / "one" / "full")
    assert max(float((first[key] - second[key]).abs().max()) for key in first) > 1e-4


@SLOW
@pytest.mark.parametrize(
    ("launcher", "sharded"),
    [
        (TORCHRUN, "false"),
        (TORCHRUN, "true"),
        ((*ACCELERATE, "--multi_gpu"), None),
        ((*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"), None),
    ],
    ids=["torchrun", "torchrun, sharded", "accelerate", "accelerate, sharded"],
)
def test_the_command_line_writes_and_tells_once(launcher: tuple[str, ...], sharded: str | None, tmp_path: Path) -> None:
    folder, out = tiny(tmp_path), tmp_path / "out"
    data = ["--train-file", folder / "train.csv", "--text-column", "text", "--label-column", "label"]
    words = ["--steps", 4, "--batch-size", 4, "--max-length", 16, "--eval-every", 2, "--tuner", "sparsegrad"]
    words += ["--tuner-set", f"adapter_dir={tmp_path / 'adapter'}"]
    done = together(
        *("-m", "ffnkit", "tune", folder / "model", *data, *words, "--out", out, "--json"),
        launcher=launcher,
        **({} if sharded is None else {"ACCELERATE_USE_FSDP": sharded}),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["steps"] == 4 and report["processes"] == 2
    assert json.loads((out / "metrics.json").read_text())["metrics"] == report["metrics"]
    fk.load(out), fk.Plan.load(tmp_path / "adapter" / "adapter.safetensors")
    assert not list(tmp_path.glob(".out*")) and "again" not in done.stderr


@SLOW
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_recipe_launches_its_trainings(strategy: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path)

    def weights(name: str, size: int, **more: Any) -> dict[str, torch.Tensor]:
        tune = {"learning_rate": 3e-3, "steps": 4, "batch_size": size, "max_length": 16, "dropout": 0.0}
        arms = {"half": {"method": "fusion", "width": 0.5}}
        recipe = recipe_of(folder, stages=["compress", "tune", "export"], arms=arms, tune=tune, **more)
        results = run(recipe, tmp_path / name, progress=False, isolate=False)
        assert [row["status"] for row in results.rows] == ["done"], results.rows[0].get("error")
        (found,) = (tmp_path / name).rglob("standard/model.safetensors")
        return load_file(found)

    two = weights("two", 4, launch={"processes": 2, "strategy": strategy})
    for key, value in weights("one", 8).items():
        if not key.endswith(OF_NO_EFFECT):
            assert_close(two[key], value, rel=1e-3, what=key)


# Without processes ---------------------------------------------------------------------------------------------------


def test_the_first_process_is_the_one_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.is_first() and processes.count() == 1
    monkeypatch.setenv("RANK", "1")
    assert processes.is_first(), "a rank without a world is of something else"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not processes.is_first() and processes.number() == 1 and processes.of_first("own") == "own"


def test_a_checkpoint_is_whole_with_each_process_s_generators(tmp_path: Path) -> None:
    """With one missing a resumed run would draw other numbers; with none known it would never resume."""
    (tmp_path / checkpoints.FINGERPRINT).write_text(json.dumps({checkpoints.PROCESSES: 2}))
    made = tmp_path / "checkpoint-4"
    made.mkdir()
    (made / checkpoints.STATE).write_text("{}")
    save_file({"a": torch.zeros(1)}, made / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        with zipfile.ZipFile(made / name, "w"):
            pass
    assert not checkpoints.is_whole(made)
    with zipfile.ZipFile(made / "rng_state_1.pth", "w"):
        pass
    assert checkpoints.is_whole(made)
    (made / "optimizer.pt").rename(made / "optimizer.bin")  # of a model in shards
    assert checkpoints.is_whole(made)
    (tmp_path / checkpoints.FINGERPRINT).write_text("{}")
    assert not checkpoints.is_whole(made), "one process has a file of another name"


def test_what_cannot_be_launched_is_refused() -> None:
    launch = Launch(processes=2)
    launching.check(None, Shares(2, gpus=("0",)), "auto")
    launching.check(launch, Shares(1, gpus=("0", "1")), "auto")
    launching.check(launch, Shares(1, gpus=("0",)), "cpu")
    with pytest.raises(FfnkitError, match="side by side"):
        launching.check(launch, Shares(2, gpus=()), "auto")
    with pytest.raises(FfnkitError, match="1 GPUs"):
        launching.check(launch, Shares(1, gpus=("0",)), "auto")
    words = launching.command(Launch(processes=3, strategy="fsdp"))
    assert "--use_fsdp" in words and words[words.index("--num_processes") + 1] == "3"


def test_a_launch_has_no_trials(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match="one process"):
        recipe_of(tmp_path, launch={"processes": 2}, arms={"a": {"tickets": {"rounds": 1}}}, stages=["tune"])


def test_every_tuner_is_compared() -> None:
    named = {tuner["name"] if isinstance(tuner, dict) else tuner for tuner in NAMES.values()}
    assert named == set(tuners.names())
