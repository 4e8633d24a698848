"""The page on deployment runs as it stands, on small models, but for blocks that say that they were not run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "deployment.md"
BLOCK = re.compile(r"(<!-- not run -->\n)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TASK = """task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


def blocks() -> list[tuple[str, str]]:
    """(language, text) of each block of the page that is to run."""
    found = [(language, text) for skipped, language, text in BLOCK.findall(PAGE.read_text()) if not skipped]
    assert len(found) >= 9
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_runs(tmp_path: Path, minilm_path: Path, models_dir: Path) -> None:
    for name in ("lm_eval", "trl", "sentence_transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    (tmp_path / "tasks").mkdir()
    rows = [{"q": f"Once upon a {i}", "choices": ["time", "of"], "gold": i % 2} for i in range(4)]
    (tmp_path / "tasks" / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "my_task.yaml").write_text(TASK)
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    here = {
        "HuggingFaceTB/SmolLM2-135M": str(models_dir / "stories260K"),
        "sentence-transformers/all-MiniLM-L6-v2": str(minilm_path),
    }
    for language, text in blocks():
        if "onnxruntime" in text and importlib.util.find_spec("onnxruntime") is None:
            continue  # the extra onnx; tests/test_onnx.py
        for name, local in here.items():
            text = text.replace(name, local)
        if language == "bash":
            text = re.sub(r"^(ffnkit|lm_eval) ", rf"{sys.executable} -m \1 ", text, flags=re.MULTILINE)
        command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700)
        assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    widths = json.loads((tmp_path / "by-layer" / "config.json").read_text())["block_configs"]
    assert len({row["ffn"]["intermediate_size"] for row in widths}) > 1
    assert "quantization_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
