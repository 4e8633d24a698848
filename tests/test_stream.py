"""A checkpoint compressed from its files: the same as in memory, to the bit, and never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import EVERY, FURTHER, METHODS, OTHERS, REFUSED, case_of, slow_but
from safetensors import safe_open
from safetensors.torch import load_file

import ffnkit as fk
from ffnkit.io import files
from ffnkit.stream import job, opening, pages, record

UPDATES = ("sparsegrad", "dsee")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the small models count as large."""
    monkeypatch.setattr(files, "SPOOL_FROM", 1)


def written(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder by name."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(first: Path, second: Path) -> None:
    a, b = written(first), written(second)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.equal(b[name]), name
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def both(tmp_path: Path, family: str, method: str, form: str) -> None:
    case = case_of(family)
    model = case.model()
    model.save_pretrained(tmp_path / "source")
    data = case.data(model)
    for name, stream in (("memory", False), ("files", True)):
        fk.compress(
            tmp_path / "source", EVERY[method](), tmp_path / name, data, form=form, stream=stream, max_shard_size="20KB"
        )
    same(tmp_path / "memory", tmp_path / "files")


FAST = ("bert", "gpt2", "t5", "albert")


@pytest.mark.parametrize("family", slow_but(("gpt2", "mixtral"), FAMILIES))
@pytest.mark.parametrize("form", [pytest.param("standard", marks=pytest.mark.slow), "compact"])
def test_it_is_the_same_in_every_family(family: str, form: str, tmp_path: Path) -> None:
    both(tmp_path, family, "fusion", form)


KINDS = ("bert", "llama", "t5", "mixtral")
CASES = [(m, f) for f in KINDS for m in EVERY if m not in (*METHODS, *UPDATES) and (m, f) not in REFUSED]


@pytest.mark.parametrize(
    ("method", "family"),
    [c if c in (("calibrated-fusion", "llama"),) else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_it_is_the_same_by_every_method(method: str, family: str, tmp_path: Path) -> None:
    both(tmp_path, family, method, "compact")
