"""A written checkpoint opened as a user would, and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffnkit.checkpoint.dtypes import main_dtype
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import open_errors
from ffnkit.model import probe, running
from ffnkit.nn.grouped_experts import run_uneven_experts

MOST = 0.25  # that outputs may differ in half precision, relative; a wrong neuron or head shows in more


def verify(model: PreTrainedModel, directory: Path, state: dict[str, Tensor], kind: Any) -> tuple[Any, dict[str, Any]]:
    """Open and compare, weights and outputs.

    Args:
        state: what was written. kind: the class that opens it.

    Returns:
        The opened model, where the first one is, and how the outputs compare and in which dtypes it opened, as fields
        of the report.

    Raises:
        FfnkitError: it does not open, or does not open equal.
    """
    asked, do = f"exporting {type(model).__name__}", "Keep the compact form, and report the model's class"
    with open_errors(f"the export '{directory}'"):
        loaded: Any = kind.from_pretrained(directory, output_loading_info=True)
        fresh, report = loaded
    dtype = main_dtype(model)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    again = {name: (value.cpu(), state[name].cpu()) for name, value in fresh.state_dict().items() if name in state}
    wrong += [name for name, (now, stored) in again.items() if not torch.equal(now, stored.to(now.dtype))]
    recast = [name for name, (now, stored) in again.items() if now.dtype != stored.dtype]
    if (opens := main_dtype(fresh)) != dtype:
        raise FfnkitError(asked, f"it opens in {opens}, the model is in {dtype}", do)
    if wrong:
        raise FfnkitError(asked, f"{len(wrong)} tensors did not reload equal, e.g. {wrong[0]}", do)
    run_uneven_experts(fresh)
    # Folding and padding change the order of sums only: a few hundred roundings of the model's own precision.
    limit = min(2000 * running.rounding(dtype), MOST)
    fresh = fresh.to(model.device)
    error, why = probe.compare(model, fresh, limit)
    if error == float("inf") and recast:  # DeBERTa keeps biases in float32 that its products in bfloat16 do not bear
        error, why = None, f"opened in {str(dtype).removeprefix('torch.')} the class does not run"
    if error is not None and not error <= limit:
        raise FfnkitError(asked, f"outputs differ by {error:.2g} after reloading", do)
    told = str(dtype).removeprefix("torch.")
    return fresh, {"output_error": error, "not_compared": why, "dtype": told, "recast": tuple(recast)}
