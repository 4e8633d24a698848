"""From hidden states to the embedding of a text: the modules of sentence-transformers behind the transformer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import check_name
from ffnkit.io.sentences import sentence_folder
from ffnkit.io.snapshots import folder_of

OWN = "sentence_transformers."  # modules of the library itself; others bring code of their own


class Pooled:
    """Applies modules in their order; they are no part of the model, and stay as they are.

    Args:
        modules: of sentence-transformers, without the transformer; none: the mean over the tokens that count.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = [module.eval().requires_grad_(False) for module in modules]

    def __call__(self, states: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """Embeddings (texts, e) of last hidden states (texts, tokens, d), token ids and mask (texts, tokens)."""
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
        if not self.modules:
            weights = mask.unsqueeze(-1).to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        features: dict[str, Any] = {"token_embeddings": states, "attention_mask": mask}
        features |= {} if ids is None else {"input_ids": ids}
        for module in self.modules:
            features = module.to(states.device)(features)
        found: Tensor = features["sentence_embedding"]
        return found


def pooled(name: str) -> Pooled:
    """What stands behind the transformer of a model.

    Args:
        name: a folder or a hub name.

    Raises:
        FfnkitError: it is of sentence-transformers, which is not installed, or a module is of another package.
    """
    folder = folder_of(check_name(name))
    held = sentence_folder(folder) if folder is not None else None
    if held is None:
        return Pooled([])
    asked = f"the modules of {name}"
    try:
        from sentence_transformers.util import import_from_string
    except ImportError as error:
        raise FfnkitError(asked, "sentence-transformers is not installed", "pip install 'ffnkit[st]'") from error
    modules = []
    for row in held.behind:
        kind = str(row.get("type", ""))
        if not kind.startswith(OWN):
            raise FfnkitError(asked, f"{kind} is code of another package", "Compress it, and tune it with that package")
        opened: Any = import_from_string(kind)
        modules.append(opened.load(str(held.root), subfolder=row["path"], local_files_only=True))
    logging.getLogger(__name__).info("%s: %s", name, ", ".join(type(module).__name__ for module in modules))
    return Pooled(modules)
