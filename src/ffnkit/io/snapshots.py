"""Where the files of a model lie: its folder, of a hub name the one in the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ffnkit.io.loading import hub_reachable
from ffnkit.io.sentences import sentence_folder

WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf"),
    *("*.ot", "*.tflite", "*.mlmodel", "*.npz", "*.pkl", "*.index.json", "*.onnx.data", "openvino_*.xml"),
    *("*.ckpt.*", "*.data-?????-of-?????", "*.pb", "*.keras", "*.hdf5", "*.pdparams", "*.params", "*.distcp"),
    *("*.pt2", "*.pte", "*.engine", "*.task", "*.litertlm", "*.llamafile", "*.nemo", "*.exl2"),
)
"""What names of weights look like, in any form."""


def name_of(model: Any) -> str:
    """The hub name or folder that a model was opened from; "" where it was not, whatever was done to it since."""
    return str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")


def source_of(model: Any) -> Path | None:
    """The folder of the other files of where a model came from, in the revision and subfolder that ffnkit opened.

    None as :func:`folder_of`.
    """
    name = name_of(model)
    return folder_of(name, **getattr(model, "_ffnkit_opened", {})) if name else None


def folder_of(name: str, subfolder: str = "", **hub: Any) -> Path | None:
    """The folder of a model's other files; of a hub name those that are not in the cache are fetched, where it answers.

    None where there is none. Weights are not fetched, but those of the modules behind a sentence-transformers model.

    Args:
        subfolder: the model's place in there. Files beside it are of another model: transformers looks for none there.
        hub: as for ``huggingface_hub.snapshot_download`` (revision, cache_dir, token).
    """
    if os.path.isdir(name):
        return place if (place := Path(name) / subfolder).is_dir() else None
    whole = _snapshot(name, ignore_patterns=list(WEIGHTS), **hub)
    if whole is None or not (whole / subfolder).is_dir():
        return None
    held = sentence_folder(whole / subfolder)
    if held is not None and (behind := [held.root / row["path"] for row in held.behind if row["path"]]):
        _snapshot(name, allow_patterns=[f"{path.relative_to(whole).as_posix()}/*" for path in behind], **hub)
    return whole / subfolder


def _snapshot(name: str, **how: Any) -> Path | None:
    from huggingface_hub import snapshot_download

    for local in dict.fromkeys((not hub_reachable(), True)):
        try:
            return Path(snapshot_download(name, local_files_only=local, **how))
        except Exception:  # no name of the hub, the network, the hub: what is in the cache is what there is
            continue
    return None
