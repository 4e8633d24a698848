"""Save, load and export: compact checkpoints, and standard ones that need no ffnkit."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io import files
from ffnkit.io.architectures import architecture_class, read_config
from ffnkit.io.formats import QUANT_METHOD
from ffnkit.io.loading import check_weights, grouped_step, load_pretrained, open_errors, run_uneven_experts
from ffnkit.model import probe
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapted import adapted, plain_state
from ffnkit.nn.served import PREFIX
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery import heads, masking, shapes

# Settings of from_pretrained that find the config as well as the weights.
_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "force_download")

# What travels with a model besides weights and config; written by tokenizers, processors and generation.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "normalizer.json",
)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the folder. bytes: of its weights. compact_bytes: of the model's own tensors in compact form.
        padded: names of FFNs that zeros bring to the width of the widest beside them.
        padded_heads: names of attentions that got zeros in the place of heads that were removed.
        output_error: largest relative difference of the outputs after reloading, None where the architecture takes
            inputs that are not known; the weights are compared in any case.
    """

    path: str
    bytes: int
    compact_bytes: int
    padded: tuple[str, ...]
    output_error: float | None
    padded_heads: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = "weights equal" if self.output_error is None else f"outputs equal to {self.output_error:.1e}"
        padded = f", {len(self.padded)} FFNs padded with zeros" if self.padded else ""
        padded += f", {len(self.padded_heads)} attentions padded with heads of zeros" if self.padded_heads else ""
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB standard ({self.compact_bytes / 1e6:.2f} MB compact)"
            f"{padded}; reloaded, {checked}"
        )


# --- compact ------------------------------------------------------------------------------------------------------


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    **save_pretrained_kwargs: Any,
) -> Path:
    """Write the compact form: the smallest file, with whatever ``apply`` left apart still apart.

    ``ffnkit.load`` opens it, and plain ``from_pretrained`` once ffnkit is imported. A model whose FFNs all have the
    width that its config names needs neither. The folder is put in place in one step; weights that it held before
    are replaced, other files in it stay.

    Args:
        model: a transformers model, edited or not.
        directory: the output folder.
        tokenizer: tokenizer or processor to save along; None copies the files of where the model came from.
        card: text of README.md; None writes a short one about the shape.

    Raises:
        FfnkitError: no space, not writable, a file in the way, NaN weights, a shape that the form cannot hold.
    """
    check_weights(model, type(model).__name__)
    _sync_config(model)
    if adapted(model):  # weights are saved with the updates in them
        save_pretrained_kwargs = {"state_dict": plain_state(model), **save_pretrained_kwargs}
    with files.staging(directory, keep_others=True) as temporary:
        model.save_pretrained(temporary, **save_pretrained_kwargs)
        _companions(model, temporary, tokenizer)
        (temporary / "README.md").write_text(card or _short_card(model, compact=True), encoding="utf-8")
    return Path(directory)


def load(directory: str | Path, **kwargs: Any) -> Any:
    """Open a checkpoint in the class that it was saved from, compact or standard.

    Args:
        directory: a folder or hub name.
        kwargs: passed to ``from_pretrained``. A ``quantization_config`` for a compact checkpoint is nested: its own
            quantizer works on the narrow model.

    Raises:
        FfnkitError: where it is missing, damaged or holds NaN.
    """
    files.recover(directory)
    config = kwargs.pop("config", None) or read_config(str(directory), **{k: kwargs[k] for k in _HUB if k in kwargs})
    described = getattr(config, "quantization_config", None)
    if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
        quantization = kwargs.pop("quantization_config", None)
        if quantization is not None:
            data = quantization if isinstance(quantization, dict) else quantization.to_dict()
            config.quantization_config = {**described, "base": data, "base_done": False}
    return load_pretrained(architecture_class(config, str(directory)), directory, config=config, **kwargs)


# --- standard -----------------------------------------------------------------------------------------------------


def export(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    **save_pretrained_kwargs: Any,
) -> ExportReport:
    """Write the standard form, opened by plain ``from_pretrained`` without ffnkit; the model is left untouched.

    Factors kept apart are folded, shared FFNs written out, and widths that differ under one config key are padded
    with zero neurons to the widest, which changes no output. The result is reloaded into a fresh model and compared,
    weights and outputs, before it is put in place.

    Memory beyond the model: a second model while it is compared.

    Raises:
        FfnkitError: where it cannot be written, or does not reload equal.
    """
    check_weights(model, type(model).__name__)
    found = ffns(model)
    keys = shapes.width_keys(model, found)
    targets = _padded_widths(model, found, keys)
    config = _standard_config(model, found, keys, targets)
    state = _standard_state(model, found, targets)
    with files.staging(directory, keep_others=True) as temporary:
        with torch.device("meta"):
            skeleton = type(model)(config)
        if getattr(model, "generation_config", None) is not None:
            skeleton.generation_config = model.generation_config
        tied = skeleton.all_tied_weights_keys if hasattr(skeleton, "all_tied_weights_keys") else {}
        skeleton.save_pretrained(
            temporary, state_dict={k: v for k, v in state.items() if k not in tied}, **save_pretrained_kwargs
        )
        error = _verify(model, temporary, state)
        _companions(model, temporary, tokenizer)
        (temporary / "README.md").write_text(card or _short_card(model, compact=False), encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    own = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *_persistent_buffers(model)]}
    padded = tuple(ffn.name for ffn in found if targets[ffn.name] > ffn.width)
    filled = tuple(attention.name for attention in attentions(model) if attention.kept)
    return ExportReport(str(directory), size, sum(own.values()), padded, error, filled)


def _padded_widths(model: PreTrainedModel, found: list[FFN], keys: dict[str, tuple[str, str] | None]) -> dict[str, int]:
    """The width that plain transformers can build and run for each FFN: the widest under its key, or the family's."""
    original = shapes.original_widths(model, found)
    widest: dict[tuple[str, str], int] = defaultdict(int)
    for ffn in found:
        if (key := keys[ffn.name]) is not None:
            widest[key] = max(widest[key], _even_width(ffn))
    return {ffn.name: original[ffn.name] if (k := keys[ffn.name]) is None else widest[k] for ffn in found}


def _even_width(ffn: FFN) -> int:
    """The width, or for experts in 3-D parameters the next one that transformers' grouped product bears."""
    step = grouped_step(ffn.parameters()[0]) if ffn.layout.experts else 1
    return -(-ffn.width // step) * step


def _standard_config(
    model: PreTrainedModel, found: list[FFN], keys: dict[str, tuple[str, str] | None], targets: dict[str, int]
) -> Any:
    config = copy.deepcopy(model.config)
    described = shapes.description(model)
    if described is not None:
        del config.quantization_config
        if described.get("base") is not None:
            config.quantization_config = described["base"]
    for ffn in found:
        if (key := keys[ffn.name]) is not None:
            shapes.set_width(config, key, targets[ffn.name])
    return config


def _standard_state(model: PreTrainedModel, found: list[FFN], targets: dict[str, int]) -> dict[str, Tensor]:
    """The model's state dict with folded, padded, written-out FFNs; tensors that stay as they are are not copied."""
    state = plain_state(model)
    for ffn in found:
        short = targets[ffn.name] - ffn.width
        if not ffn.special and not short and not ffn.twins:
            continue
        neurons = ffn.read()
        if short:
            neurons = pad(neurons, targets[ffn.name])
        values = _named_values(ffn, neurons)
        for owner in ffn.owners:
            for name, value in values.items():
                state[f"{owner}.{name}"] = value.detach() if owner == ffn.name else value.detach().clone()
            for name in _special_names(ffn, owner, state):
                del state[name]
    masking.written_out(model, found, state)
    heads.padded(model, state)
    return {name: value.contiguous() for name, value in state.items()}


def _special_names(ffn: FFN, owner: str, state: dict[str, Tensor]) -> list[str]:
    """Entries of the state dict that no plain layer has: factors, masks, thin pairs."""
    places = [f"{owner}.{ffn.path(site)}." for site in ffn.special] if not ffn.layout.experts else []
    plain = {place + name for place in places for name in ("weight", "bias")}
    starts = (*places, f"{owner}.{PREFIX}")
    return [name for name in state if name.startswith(starts) and name not in plain]


def pad(neurons: Neurons, width: int) -> Neurons:
    """Further neurons of zeros: ``down`` ignores them, so no output changes."""
    more = width - neurons.ff
    shapes_of = {"up": (0, 0, 0, more), "gate": (0, 0, 0, more), "down": (0, more)}
    padded = {
        name: value if name == "down_bias" else functional.pad(value, shapes_of.get(name, (0, more)))
        for name, value in neurons.tensors().items()
    }
    return Neurons(**padded)


def _named_values(ffn: FFN, neurons: Neurons) -> dict[str, Tensor]:
    """The FFN's tensors under their names in the state dict below the owner."""
    from ffnkit.surgery.memory import site_values

    named = {}
    for path, (weight, bias) in site_values(ffn, neurons).items():
        if ffn.layout.experts:
            named[path] = weight.mT if ffn.layout.transposed else weight
            continue
        transposed = is_transposed(ffn.module.get_submodule(path))
        named[f"{path}.weight"] = weight.mT if transposed else weight
        if bias is not None:
            named[f"{path}.bias"] = bias
    return named


def _verify(model: PreTrainedModel, directory: Path, state: dict[str, Tensor]) -> float | None:
    """Reload and compare; the largest relative difference of the outputs, or None where no inputs are known."""
    with open_errors(f"the export '{directory}'"):
        loaded: Any = type(model).from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
        fresh, report = loaded
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    again = fresh.state_dict()
    wrong += [k for k, v in again.items() if k in state and not torch.equal(v.cpu(), state[k].to(v.dtype).cpu())]
    if wrong:
        raise FfnkitError(
            f"exporting {type(model).__name__}",
            f"{len(wrong)} tensors did not reload equal, e.g. {wrong[0]}",
            "Keep the compact form, and report the model's class",
        )
    run_uneven_experts(fresh)
    error = probe.compare(model, fresh.to(model.device))
    # Folding and padding change the order of sums only: a few hundred roundings of the model's own precision.
    limit = 2000 * torch.finfo(model.dtype).eps
    if error is not None and not error <= limit:
        raise FfnkitError(
            f"exporting {type(model).__name__}",
            f"outputs differ by {error:.2g} after reloading",
            "Keep the compact form, and report the model's class",
        )
    return error


# --- helpers ------------------------------------------------------------------------------------------------------


def _sync_config(model: PreTrainedModel) -> None:
    """Describe sharing that was done by hand, without ``apply``."""
    if not has_ffns(model) or getattr(model, "is_quantized", False):
        return
    found = ffns(model)
    keys, original = shapes.width_keys(model, found), shapes.original_widths(model, found)
    plain = shapes.is_plain(found, keys, original) and not masking.masked_linears(model, found)
    if shapes.description(model) is not None or not plain:
        shapes.update_config(model, keys, original)


def _persistent_buffers(model: PreTrainedModel) -> list[Tensor]:
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]


def _companions(model: PreTrainedModel, directory: Path, tokenizer: Any) -> None:
    """Tokenizer, processor and chat template: saved from the object given, else copied from the model's source."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        return
    source = getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "")
    if not source:
        return
    for name in _COMPANIONS:
        path = _source_file(str(source), name)
        if path is not None and not (directory / name).exists():
            shutil.copyfile(path, directory / name)


def _source_file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _short_card(model: PreTrainedModel, *, compact: bool) -> str:
    from ffnkit.model.inventory import inspect

    tags = "tags:\n- ffnkit\nlibrary_name: transformers\n"
    how = (
        "Compact form: `import ffnkit` before `from_pretrained`, or `ffnkit.load`."
        if compact and shapes.description(model) is not None
        else "Opened by plain `from_pretrained`."
    )
    body = f"\n```\n{inspect(model)}\n```\n" if has_ffns(model) else ""
    return (
        f"---\n{tags}---\n\n# {type(model).__name__}\n\nSaved by ffnkit. {how}\n{body}\nMeasured figures: none given.\n"
    )
