"""Compressed models in ONNX: onnxruntime gives what torch gives, and FFNs that layers share are stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import ffnkit as fk

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name)

FORMS: dict[str, Any] = {
    "uniform": fk.Fusion(width=0.5, restarts=1),
    "ragged": fk.Fusion(width=0.5, layers="last:2", restarts=1),
    "padded": fk.Fusion(width=0.5, layers="last:2", restarts=1),
    "merged": fk.Merging(layers="1-3"),
}


def exported(model: Any, file: Path) -> None:
    model.config.use_cache = False
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    given = {"input_ids": torch.full((1, 9), 5), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    torch.onnx.export(
        model, (), file, kwargs=given, dynamic_shapes=dict.fromkeys(given, free), dynamo=True, verbose=False
    )


def furthest(model: Any, file: Path) -> float:
    """The largest difference of the first output, over two lengths that are not that of the export."""
    import onnxruntime

    session, found = onnxruntime.InferenceSession(str(file)), 0.0
    for tokens in (6, 13):
        ids = torch.randint(3, 500, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = model(**batch)[0]
        given = session.run(None, {name: value.numpy() for name, value in batch.items()})[0]
        found = max(found, (torch.from_numpy(given) - expected).abs().max().item())
    return found


def stored(file: Path) -> int:
    """Numbers in the file."""
    import onnx

    return sum(torch.Size(each.dims).numel() for each in onnx.load(str(file)).graph.initializer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own steps
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["stories260K", "minilm"])
def test_onnx_gives_what_torch_gives(name: str, form: str, tmp_path: Path, models_dir: Path, minilm_path: Path) -> None:
    kind, path = (AutoModelForCausalLM, models_dir / name) if name != "minilm" else (AutoModel, minilm_path)
    model = kind.from_pretrained(path).eval()
    fk.apply(model, fk.plan(model, FORMS[form]))
    fk.save(model, tmp_path / "saved")
    if form == "padded":
        fk.export(model, tmp_path / "padded")
        opened = kind.from_pretrained(tmp_path / "padded").eval()
    else:
        opened = fk.load(tmp_path / "saved", fold=True).eval()
    exported(opened, tmp_path / "model.onnx")
    assert furthest(opened, tmp_path / "model.onnx") < 1e-4
    numbers = sum(parameter.numel() for parameter in opened.parameters())
    assert numbers <= stored(tmp_path / "model.onnx") < numbers + 2000  # constants of masks and positions
    if form == "merged":
        one = opened.get_submodule("model.layers.1.mlp" if name != "minilm" else "encoder.layer.1.output.dense")
        with torch.no_grad():
            next(one.parameters()).mul_(1.5)
        assert furthest(opened, tmp_path / "model.onnx") > 1e-2  # another FFN is another model
