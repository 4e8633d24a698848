"""In which dtype a checkpoint opens: what its config says, for the whole model and for each part of it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.model.config_values import config_tree

logger = logging.getLogger(__name__)


def main_dtype(*modules: nn.Module) -> torch.dtype:
    """The float dtype that most numbers of these modules have; torch's default where they have none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def write_dtypes(model: PreTrainedModel, folder: Path) -> None:
    """Have a written config, and its sub-configs, say the dtypes of what they are of.

    ``save_pretrained`` writes the dtype of the first parameter, for the whole model alone.
    """
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    whole = main_dtype(model)
    for place, config in config_tree(model.config):
        own = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config] if place else []
        part: Any = written
        for name in place.split(".") if place else ():
            part = part.get(name) or {}
        if part:
            part["dtype"] = str(main_dtype(*own) if own else whole).removeprefix("torch.")
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tell_recast(model: PreTrainedModel) -> None:
    """Say of which tensors opening will change the dtype: transformers gives all of a model one."""
    whole = main_dtype(model)
    floats = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    other = [(name, dtype) for name, dtype in floats if dtype != whole and not kept_in_float32(model, name)]
    if other:
        name, dtype = other[0]
        what = f"{len(other)} tensors are stored in another dtype (first {name}, {dtype})"
        logger.warning("%s: %s; opened, they are %s like the rest", type(model).__name__, what, whole)


def kept_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether a family keeps a parameter in float32 whatever the dtype of the model is."""
    kinds: Iterable[Any] = (model._keep_in_fp32_modules, getattr(model, "_keep_in_fp32_modules_strict", None))
    return any(part in name.split(".") for kind in kinds for part in kind or ())
