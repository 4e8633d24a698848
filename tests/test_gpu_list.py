"""benchmarks/gpu.py: the list for the first half hour on a GPU runs at toy shapes, and goes on where it was."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
WORDS = [
    *(["step", "2048", name] for name in ("full", "dsee", "mask 1%", "sparsegrad step 960x112", "lora r 8")),
    *(["latency", "0.25"], ["narrow", "magnitude"], ["narrow", "fusion"]),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu  # type: ignore[import-not-found]

    return gpu


def test_the_most_telling_comes_first_and_everything_has_a_name(gpu: Any) -> None:
    names = [name for name, _ in gpu.plan()]
    assert names[0] == "step-2048-full" and len(set(names)) == len(names)
    assert {name.split("-")[0] for name in names} == {"step", "latency", "narrow"}
    asked = {"lora", "shira", "super-tuning", "dsee", "mask", "fixed", "refresh", "step-9", "masked-gradient"}
    for size in gpu.SHAPES:
        assert all(any(f"step-{size}" in name and each in name for name in names) for each in asked)


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words))
def test_figures_at_toy_shapes(words: list[str], gpu: Any) -> None:
    row = gpu.work(words, argparse.Namespace(toy=True, device="cpu"))
    assert "error" not in row and all(value > 0 for key, value in row.items() if key.endswith("seconds"))


@pytest.mark.slow
def test_what_is_there_is_not_run_again(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def process(file: str, *words: str) -> dict[str, Any]:
        calls.append(words)
        if "full" not in words:
            return {"error": "out of memory"}
        row: dict[str, Any] = gpu.work(["step", "2048", "full"], argparse.Namespace(toy=True, device="cpu"))
        return row

    monkeypatch.setattr(gpu, "in_process", process)
    given = ["gpu.py", "--toy", "--device", "cpu", "--out", str(tmp_path), "--only", "step-2048-full", "step-2048-dsee"]
    for again, count in (([], 2), ([], 2), (["--again"], 3)):
        monkeypatch.setattr(sys, "argv", [*given, *again])
        gpu.main()
        assert len(calls) == count
    (folder,) = tmp_path.iterdir()
    stored = json.loads((folder / "step-2048-full.json").read_text())
    assert stored["device"] and stored["seconds"] > 0 and "out of memory" in (folder / "README.md").read_text()
