"""Shared FFNs and SparseGrad in two processes: DDP and FSDP2 end where one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from safetensors.torch import load_file
from sharded import made, tied, train
from tolerance import assert_close

from ffnkit.model.finding import ffns
from ffnkit.tune.sharding import wrap_classes

SLOW = pytest.mark.slow
CASES: list[Any] = [
    ("ddp", "bert", "tied"),
    pytest.param("fsdp", "bert", "tied", marks=SLOW),
    ("fsdp", "llama", "tied"),
]
CASES += [("ddp", "bert", "refresh"), ("fsdp", "bert", "step")]
CASES += [pytest.param(*case, marks=SLOW) for case in (("ddp", "bert", "step"), ("fsdp", "bert", "refresh"))]


@pytest.mark.parametrize(("kind", "name", "what"), CASES)
def test_two_processes_end_where_one_does(kind: str, name: str, what: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("sharded.py")
    command = [sys.executable, str(script), kind, name, what, str(tmp_path / "state.safetensors")]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    model = made(name, what)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, FAMILIES[name].inputs(model), 0, 1)
    found = load_file(tmp_path / "state.safetensors")
    assert found.keys() == before.keys()
    for key, value in model.state_dict().items():
        assert_close(found[key], value, rel=1e-5, what=key)
    shared = f"{ffns(model)[0].name}.{ffns(model)[0].path('up')}.{'weight' if what == 'tied' else 'values'}"
    assert float((found[shared] - before[shared]).abs().max()) > 1e-4


def test_what_is_shared_is_wrapped_first() -> None:
    assert wrap_classes(tied("llama")) == ["LlamaDecoderLayer", "LlamaMLP"]
    assert wrap_classes(tied("bert")) == ["BertLayer", "SharedLinear"]
    assert wrap_classes(FAMILIES["bert"].model()) == ["BertLayer"]
