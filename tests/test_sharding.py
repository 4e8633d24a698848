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
    pytest.param("ddp", "bert", "tied", marks=SLOW),
    pytest.param("fsdp", "bert", "tied", marks=SLOW),
    ("fsdp", "llama", "tied"),
    # embeddings of both stacks and the head are one weight, or a bias stands in two modules
    *(pytest.param("fsdp", name, "tied", marks=SLOW) for name in ("t5", "bart", "camembert")),
]
CASES += [("fsdp", "bert", "refresh")]
CASES += [pytest.param("ddp", "bert", what, marks=SLOW) for what in ("step", "refresh")]
CASES += [
    pytest.param("fsdp", "bert", what, marks=SLOW) for what in ("step", "fixed", "dsee", "scaled", "lowrank", "masked")
]


@pytest.fixture(scope="module")
def states(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder where two processes left the state of each case asked for, and what they wrote to stderr."""
    items = [item for item in request.node.session.items if item.path == request.path and "states" in item.fixturenames]
    cases = [":".join(item.callspec.params[key] for key in ("kind", "name", "what")) for item in items]
    folder = tmp_path_factory.mktemp("states")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("sharded.py")), str(folder), *cases]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=280)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    errors = [f"exit status {process.returncode}\n{said}" for process, said in zip(running, errors, strict=True)]
    return folder, errors


@pytest.mark.parametrize(("kind", "name", "what"), CASES)
def test_two_processes_end_where_one_does(kind: str, name: str, what: str, states: tuple[Path, list[str]]) -> None:
    folder, errors = states
    assert (folder / f"{kind}-{name}-{what}").is_file(), errors
    assert [said.split("\n")[0] for said in errors] == ["exit status 0"] * 2, errors
    model = made(name, what)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, FAMILIES[name].inputs(model), 0, 1)
    found = load_file(folder / f"{kind}-{name}-{what}")
    assert found.keys() == before.keys()
    for key, value in model.state_dict().items():
        assert_close(found[key], value, rel=1e-5, what=key)
    linear = f"{ffns(model)[0].name}.{ffns(model)[0].path('up')}."
    trained = [k for k, v in before.items() if k.startswith(linear) and not k.endswith("bias") and v.dtype.itemsize > 1]
    assert max(float((found[key] - before[key]).abs().max()) for key in trained) > 1e-4


def test_what_is_shared_is_wrapped_first() -> None:
    assert wrap_classes(tied("llama")) == ["LlamaDecoderLayer", "LlamaMLP"]
    assert wrap_classes(tied("bert")) == ["BertLayer", "SharedLinear"]
    assert wrap_classes(FAMILIES["bert"].model()) == ["BertLayer"]
