"""The standard form: opened by plain transformers, reloaded and compared before it is there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffnkit.checkpoint.companions import write_companions
from ffnkit.checkpoint.dtypes import main_dtype, write_dtypes
from ffnkit.checkpoint.save import short_card
from ffnkit.checkpoint.standard import padded_widths, standard_config, standard_generation_config, standard_state
from ffnkit.errors import FfnkitError
from ffnkit.io.architectures import is_own
from ffnkit.io.folders import staging
from ffnkit.io.loading import check_weights, no_bars, open_errors, run_uneven_experts
from ffnkit.io.progress import phase
from ffnkit.model import probe, running
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import check_untouched
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.surgery.description import width_keys

logger = logging.getLogger(__name__)
MOST = 0.25  # that outputs may differ in half precision, relative; a wrong neuron or head shows in more


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the folder. bytes: of its weights. compact_bytes: of the model's own tensors in compact form.
        padded: names of FFNs that zeros bring to the width of the widest beside them.
        output_error: largest relative difference of the outputs after reloading, None where they could not be compared;
            the weights are compared in any case.
        padded_heads: names of attentions that got zeros in the place of heads that were removed.
        not_compared: why outputs could not be compared, "" where they were.
        dtype: in which it opens. recast: names of tensors that lie in the file in another one, as in the model.
    """

    path: str
    bytes: int
    compact_bytes: int
    padded: tuple[str, ...]
    output_error: float | None
    padded_heads: tuple[str, ...] = ()
    not_compared: str = ""
    dtype: str = ""
    recast: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = f"weights equal, outputs could not be compared ({self.not_compared})"
        checked = checked if self.output_error is None else f"outputs equal to {self.output_error:.1e}"
        padded = f", {len(self.padded)} FFNs padded with zeros" if self.padded else ""
        padded += f", {len(self.padded_heads)} attentions padded with heads of zeros" if self.padded_heads else ""
        recast = f" ({len(self.recast)} tensors, stored in another dtype, too)" if self.recast else ""
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB standard ({self.compact_bytes / 1e6:.2f} MB compact)"
            f"{padded}; reloaded in {self.dtype}{recast}, {checked}"
        )


def export(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    **save_pretrained_kwargs: Any,
) -> ExportReport:
    """Write the standard form, opened by plain ``from_pretrained`` without ffnkit; the model is left untouched.

    Where the class is ffnkit's (a classifier that transformers lacks), ffnkit has to be imported all the same.

    Factors kept apart are folded, shared FFNs written out, and widths that differ under one config key are padded
    with zero neurons to the widest, which changes no output. Tensors keep their dtypes; the config says that of most.
    The result is opened as a user would and compared, weights and outputs, before it is put in place.

    Memory beyond the model: a second model while it is compared.

    Raises:
        FfnkitError: where it cannot be written, or does not reload equal.
    """
    check_untouched(model, f"exporting {type(model).__name__}")
    check_weights(model, type(model).__name__)
    found = ffns(model)
    keys = width_keys(model, found)
    targets = padded_widths(model, found, keys)
    config = standard_config(model, found, keys, targets)
    state = standard_state(model, found, targets)
    own = {id(t): t for t in [*model.parameters(), *_persistent_buffers(model)]}
    _say_growth(model, found, targets, sum(p.numel() for p in model.parameters()), state)
    with phase(f"exporting {directory}"), staging(directory) as temporary:
        with torch.device("meta"):
            skeleton = type(model)(config)
        if (generation := standard_generation_config(model)) is not None:
            skeleton.generation_config = generation
        tied = skeleton.all_tied_weights_keys if hasattr(skeleton, "all_tied_weights_keys") else {}
        with no_bars():
            skeleton.save_pretrained(
                temporary, state_dict={k: v for k, v in state.items() if k not in tied}, **save_pretrained_kwargs
            )
        write_dtypes(model, temporary)
        with phase("opening and comparing"), no_bars():
            checked = _verify(model, temporary, state)
        write_companions(model, temporary, tokenizer)
        (temporary / "README.md").write_text(card or short_card(model, compact=False), encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    padded = tuple(ffn.name for ffn in found if targets[ffn.name] > ffn.width)
    filled = tuple(attention.name for attention in attentions(model) if attention.kept)
    return ExportReport(
        str(directory),
        size,
        sum(t.numel() * t.element_size() for t in own.values()),
        padded,
        padded_heads=filled,
        **checked,
    )


def _say_growth(model: PreTrainedModel, found: list[FFN], targets: dict[str, int], now: int, state: Any) -> None:
    """Say, before anything is written, what of the model's savings the standard form does not hold."""
    thin = sum(row["kind"] == LowRank.kind for ffn in found for row in ffn.special.values())
    masks = sum(isinstance(module, Masked) for module in model.modules())
    shared, padded = sum(len(f.tied) for f in found), sum(targets[f.name] > f.width for f in found)
    counts = {"thin pairs are multiplied out": thin, "shared FFNs are written out": shared, "FFNs are padded": padded}
    counts["masks become zeros that training would fill"] = masks
    told = [f"{count} {what}" for what, count in counts.items() if count]
    if is_own(model):
        logger.warning("exporting %s: a class of ffnkit, which has to be imported to open it", type(model).__name__)
    if told:
        then = sum(value.numel() for value in {v.data_ptr(): v for v in state.values()}.values())
        growth = f" ({now:,} parameters become {then:,})" if then > now else ""
        logger.warning("exporting %s: %s%s", type(model).__name__, ", ".join(told), growth)


def _verify(model: PreTrainedModel, directory: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Open and compare; how the outputs compare, and in which dtypes it opened, as fields of the report."""
    asked, do = f"exporting {type(model).__name__}", "Keep the compact form, and report the model's class"
    with open_errors(f"the export '{directory}'"):
        loaded: Any = type(model).from_pretrained(directory, output_loading_info=True)
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
    error, why = probe.compare(model, fresh.to(model.device), limit)
    if error == float("inf") and recast:  # DeBERTa keeps biases in float32 that its products in bfloat16 do not bear
        error, why = None, f"opened in {str(dtype).removeprefix('torch.')} the class does not run"
    if error is not None and not error <= limit:
        raise FfnkitError(asked, f"outputs differ by {error:.2g} after reloading", do)
    told = str(dtype).removeprefix("torch.")
    return {"output_error": error, "not_compared": why, "dtype": told, "recast": tuple(recast)}


def _persistent_buffers(model: PreTrainedModel) -> list[Tensor]:
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]
