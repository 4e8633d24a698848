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


def folder_of(name: str, **hub: Any) -> Path | None:
    """The folder of a model's other files; of a hub name those that are not in the cache are fetched, where it answers.

    None where there is none. Weights are not fetched, but those of the modules behind a sentence-transformers model.

    Args:
        hub: as for ``huggingface_hub.snapshot_download`` (revision, cache_dir, token).
    """
    if os.path.isdir(name):
        return Path(name)
    folder = _snapshot(name, ignore_patterns=list(WEIGHTS), **hub)
    held = sentence_folder(folder) if folder is not None else None
    if held is not None and (behind := [f"{row['path']}/*" for row in held.behind if row["path"]]):
        _snapshot(name, allow_patterns=behind, **hub)
    return folder


def _snapshot(name: str, **how: Any) -> Path | None:
    from huggingface_hub import snapshot_download

    for local in dict.fromkeys((not hub_reachable(), True)):
        try:
            return Path(snapshot_download(name, local_files_only=local, **how))
        except Exception:  # no name of the hub, the network, the hub: what is in the cache is what there is
            continue
    return None
