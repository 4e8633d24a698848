"""A quantization asked of a compact checkpoint: done by its own quantizer, or one line with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from methods import EVERY
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.io.backends import quantizer_reason

METHODS = [name for name in AUTO_QUANTIZATION_CONFIG_MAPPING if name not in ("ffnkit", "gguf")]
NEEDED: dict[str, dict[str, Any]] = {
    "bitsandbytes_4bit": {"load_in_4bit": True}, "bitsandbytes_8bit": {"load_in_8bit": True},
    "gptq": {"bits": 4}, "quanto": {"weights": "int8"}, "torchao": {"quant_type": "int8_weight_only"},
}  # fmt: skip
DO = re.compile(
    r"(Export the model \(ffnkit export\) and quantize that with the method's own tool"
    r"|Install that package in this environment|Open it on a machine that has one|Ask for bitsandbytes)"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quantizers")
    model: Any = FAMILIES["llama"].model()
    model.save_pretrained(folder / "plain")
    fk.save(fk.apply(model, fk.plan(model, EVERY["svd"]())), folder / "compact")
    return folder / "plain", folder / "compact"


def config_of(method: str) -> Any:
    try:
        return AUTO_QUANTIZATION_CONFIG_MAPPING[method](**NEEDED.get(method, {}))
    except Exception as error:  # the config asks for the package itself
        pytest.skip(f"{type(error).__name__}: {error}"[:100])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_quantization_of_transformers_works_or_says_what_to_do(method: str, folders: tuple[Path, Path]) -> None:
    config, (plain, compact) = config_of(method), folders
    ways = (AutoModelForCausalLM.from_pretrained, fk.load)
    try:
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    except Exception as error:  # transformers' own: the control
        assert not isinstance(error, FfnkitError)
        for way in ways:
            with pytest.raises(FfnkitError) as caught:
                way(compact, quantization_config=config)
            assert caught.value.asked.startswith("opening a compact checkpoint quantized with ")
            assert DO.match(caught.value.do), caught.value.do
            calibrated = AUTO_QUANTIZER_MAPPING[method].requires_calibration and "pre-quantized" in str(error)
            assert calibrated == caught.value.do.startswith("Export")
        with pytest.raises(FfnkitError) as caught:
            fk.load(plain, quantization_config=config)
        assert DO.match(caught.value.do) and "name and the files" not in str(caught.value)
    else:
        for way in ways:
            assert way(compact, quantization_config=config).is_quantized


@pytest.mark.parametrize(
    ("error", "do"),
    [
        (ImportError("needs x (`pip install x`)"), "Install that package"),
        (ModuleNotFoundError("No module named 'sinq'"), "Install that package"),
        (ImportError("Using fbgemm fp8 quantization requires a GPU or XPU"), "Open it on a machine"),
        (RuntimeError("No GPU or XPU found. A GPU or XPU is needed."), "Open it on a machine"),
        (NotImplementedError("HIGGS quantization is only supported on GPU."), "Open it on a machine"),
        (RuntimeError("Metal quantization requires an Apple Silicon GPU (MPS)."), "Open it on a machine"),
        (NotImplementedError("HQQ is not available yet"), "Ask for bitsandbytes"),
    ],
    ids=str,
)
def test_what_to_do_follows_from_what_is_missing(error: Exception, do: str) -> None:
    assert quantizer_reason(error)[1].startswith(do)


@pytest.mark.filterwarnings("ignore")
def test_what_is_quantized_already_is_not_quantized_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = transformers.BitsAndBytesConfig(load_in_8bit=True)
    fk.save(fk.load(folders[1], quantization_config=asked), tmp_path)
    fk.load(tmp_path)
    for way in (AutoModelForCausalLM.from_pretrained, fk.load):
        for given in (asked, asked.to_dict()) if way is fk.load else (asked,):
            with pytest.raises(FfnkitError, match="it is quantized already"):
                way(tmp_path, quantization_config=given)


def test_what_a_quantizer_does_not_write_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Quanto is such a one; bitsandbytes stands in for it."""
    pytest.importorskip("bitsandbytes")
    kind = AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"]
    asked = transformers.BitsAndBytesConfig(load_in_8bit=True)
    opened: list[torch.nn.Module] = [fk.load(folder, quantization_config=asked) for folder in folders]
    fk.save(opened[1], tmp_path / "control")
    monkeypatch.setattr(kind, "is_serializable", lambda self, *_: False)
    for model in opened:
        for write in (fk.save, fk.export):
            with pytest.raises(FfnkitError, match="bitsandbytes writes no checkpoints of what it quantized"):
                write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    caplog.clear()
    with pytest.raises(ValueError, match="not serializable"):
        opened[1].save_pretrained(tmp_path / "out")
    assert "bitsandbytes writes no checkpoints" in caplog.text
