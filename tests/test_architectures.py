"""tools/architectures.py: some of the architectures that it builds; all of them by ``make architectures``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One of each kind: FFNs, attention, experts, towers, lists by layer, numbers of layers, shared keys, hybrids, stages.
QUICK = ("opt", "clip_vision_model", "dinov2")
CHOSEN = (
    "afmoe", "bamba", "beam", "big_bird", "clip", "cohere2_moe", "deberta-v2", "diffllama", "esm", "falcon_h1",
    "gemma3n_text", "glmasr", "gpt2", "jamba", "led", "llava", "minimax", "olmoe", "pegasus_x", "qwen3_next",
    "sam_vision_model", "sapiens2", "t5", "vitdet", "voxtral", "wav2vec2", "whisper", "yolos",
)  # fmt: skip


def tool() -> Any:
    if "architectures" not in sys.modules:
        spec = importlib.util.spec_from_file_location("architectures", ROOT / "tools" / "architectures.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["architectures"] = module
        spec.loader.exec_module(module)
    return sys.modules["architectures"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CHOSEN)])
def test_edits_of_an_architecture_are_right_after_reload_or_refused(name: str) -> None:
    rows = tool().check(name, quick=name in QUICK)
    assert {row.outcome for row in rows} <= {"equal", "refused"}, "\n".join(map(str, rows))
    assert any(row.outcome == "equal" for row in rows), "\n".join(map(str, rows))


def test_a_wrong_config_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the comparison a backbone is saved that nobody opens."""
    from ffnkit.surgery import layer_config, planning

    monkeypatch.setattr(layer_config, "_backbone", lambda *_: None)
    monkeypatch.setattr(layer_config, "_compare", lambda *_: layer_config._Found([], [], layer_config.built))
    monkeypatch.setattr(layer_config, "_tell", lambda *_: None)
    monkeypatch.setattr(planning, "try_out", lambda *_: None)
    monkeypatch.setattr("ffnkit.surgery.meta._check_opens", lambda *_: None)
    assert any(row.outcome == "WRONG" for row in tool().check("dinov2", quick=True))
