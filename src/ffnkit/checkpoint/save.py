"""The compact form: the smallest file, with whatever was left apart still apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ffnkit.checkpoint.added import without_added, write_added
from ffnkit.checkpoint.companions import write_companions
from ffnkit.checkpoint.dtypes import tell_recast, write_dtypes
from ffnkit.io.apart import ADAPTER, BASE
from ffnkit.io.architectures import is_own
from ffnkit.io.backends import check_writes
from ffnkit.io.conversions import into_files
from ffnkit.io.files import SHARD, are_in_files
from ffnkit.io.folders import as_named, staging
from ffnkit.io.loading import check_weights, no_bars
from ffnkit.io.progress import phase
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.inspect import inspect
from ffnkit.model.linear import added_to, check_model, check_untouched
from ffnkit.nn.adapter_layer import adapter_layers, plain_state
from ffnkit.surgery.description import description, is_plain_model, original_widths, update_config, width_keys


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    **save_pretrained_kwargs: Any,
) -> Path:
    """Write the compact form: the smallest file, with whatever ``apply`` left apart still apart.

    A model with bottleneck adapters or a prefix, which no weight holds, is written as ``DIR/base`` and ``DIR/adapter``.
    ``ffnkit.load`` opens it, and plain ``from_pretrained`` once ffnkit is imported. A model whose FFNs all have the
    width that its config names needs neither. The folder is put in place in one step: what an earlier save wrote there
    goes, other files stay, a README.md of the user's own too.

    Args:
        model: a transformers model, edited or not.
        directory: the output folder.
        tokenizer: tokenizer or processor to save along, in place of that of where the model came from. All other files
            there (processors, templates, the modules of sentence-transformers) are copied in any case.
        card: text of README.md; None writes a short one about the shape.

    Raises:
        FfnkitError: no space, not writable, a file in the way, NaN weights, a shape that the form cannot hold, or what
            is there would be read together with the model (an adapter of peft, weights of other names).
    """
    check_model(model)
    if added_to(model):
        return _save_with_added(model, directory, tokenizer, card, **save_pretrained_kwargs)
    check_untouched(model, f"saving {type(model).__name__}")
    check_writes(model, f"saving {type(model).__name__}")
    check_weights(model, type(model).__name__)
    _sync_config(model)
    tell_recast(model)
    if are_in_files():
        save_pretrained_kwargs = {"max_shard_size": SHARD, **save_pretrained_kwargs}
    if adapter_layers(model):  # weights are saved with the updates in them
        save_pretrained_kwargs = {"state_dict": plain_state(model), **save_pretrained_kwargs}
    with phase(f"saving {as_named(directory)}"), no_bars(), staging(directory) as temporary:
        into_files(model)
        model.save_pretrained(temporary, **save_pretrained_kwargs)
        write_dtypes(model, temporary)
        write_companions(model, temporary, tokenizer)
        (temporary / "README.md").write_text(card or short_card(model), encoding="utf-8")
    return Path(directory)


def _save_with_added(
    model: Any, directory: str | Path, tokenizer: Any, card: str | None, **save_pretrained_kwargs: Any
) -> Path:
    """The base and what a tuner added to it, apart."""
    with staging(directory) as temporary:
        write_added(model, temporary / ADAPTER)
        with without_added(model) as base:
            save(base, temporary / BASE, tokenizer=tokenizer, **save_pretrained_kwargs)
            text = short_card(base).replace("Compact form: ", "The base is in compact form: ")
        note = f"`{BASE}` is the model without its adapters, `{ADAPTER}` holds these; `ffnkit.load` opens both.\n"
        (temporary / "README.md").write_text(card or f"{text}\n{note}", encoding="utf-8")
    return Path(directory)


def _sync_config(model: PreTrainedModel) -> None:
    """Describe sharing that was done by hand, without ``apply``."""
    if not has_ffns(model) or getattr(model, "is_quantized", False):
        return
    found = ffns(model)
    keys, original = width_keys(model, found), original_widths(model, found)
    if description(model) is not None or not is_plain_model(model, found, keys, original):
        update_config(model, keys, original)


def short_card(model: PreTrainedModel, *, form: str = "compact") -> str:
    """README.md of a checkpoint about which nothing was measured."""
    tags = "tags:\n- ffnkit\nlibrary_name: transformers\n"
    how = (
        "Compact form: `import ffnkit` before `from_pretrained`, or `ffnkit.load`."
        if form == "compact" and description(model) is not None
        else "Widths by layer: `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` opens it."
        if form == "nemotron-nas"
        else "Opened by `from_pretrained` once ffnkit is imported: transformers has no such class."
        if is_own(model)
        else "Opened by plain `from_pretrained`."
    )
    body = f"\n```\n{inspect(model)}\n```\n" if has_ffns(model) else ""
    return (
        f"---\n{tags}---\n\n# {type(model).__name__}\n\nSaved by ffnkit. {how}\n{body}\nMeasured figures: none given.\n"
    )
