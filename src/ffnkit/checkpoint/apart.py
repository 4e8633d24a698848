"""The form in which updates stay apart from their base: what was pruned stays as sparse on disk as it was made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from ffnkit.checkpoint.adapters import TENSORS, adapter, save_adapter
from ffnkit.checkpoint.added import put_added
from ffnkit.checkpoint.peft_lora import only_low_rank, save_lora
from ffnkit.checkpoint.save import save
from ffnkit.edits import Stage, UpdateLinear
from ffnkit.io.apart import ADAPTER, BASE, LORA
from ffnkit.io.folders import staging
from ffnkit.plans import Plan
from ffnkit.surgery.apply import apply
from ffnkit.surgery.temporary import without_updates


def save_apart(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    **save_pretrained_kwargs: Any,
) -> Path:
    """Write a model and its updates apart: the base below them, zeros of pruned weights in it, and an adapter.

    ``fk.load`` opens the folder as the model with its updates on it, which may train on; outputs are equal.
    ``DIR/base`` is a checkpoint by itself, plain where the model's shape is, and what trained beside the updates is in
    it as it was before. Masks on other linears become zeros of it. Where the updates are of low rank only, ``DIR/lora``
    holds them in peft's form too: ``PeftModel.from_pretrained(base, "DIR/lora")``.

    Args:
        model, tokenizer, card, save_pretrained_kwargs: as for :func:`ffnkit.save`; the model stays as it is.

    Raises:
        FfnkitError: no update is on the model, or as :func:`ffnkit.save`.
    """
    adapter(model)  # says where there is none
    with staging(directory) as temporary:
        save_adapter(model, temporary / ADAPTER)
        if only_low_rank(model):
            save_lora(model, temporary / LORA)
        with without_updates(model):
            save(model, temporary / BASE, tokenizer=tokenizer, card=_card_of_base(model), **save_pretrained_kwargs)
        (temporary / "README.md").write_text(card or _short_card(model, temporary), encoding="utf-8")
    return Path(directory)


def _card_of_base(model: PreTrainedModel) -> str:
    what = f"The base of a {type(model).__name__}, without the updates in `../{ADAPTER}`"
    return f'---\ntags:\n- ffnkit\nlibrary_name: transformers\n---\n\n{what}: `ffnkit.load("..")` opens both.\n'


def _short_card(model: PreTrainedModel, folder: Path) -> str:
    peft = f" `{LORA}` holds it in peft's form, for the base." if (folder / LORA).is_dir() else ""
    return (
        f"---\ntags:\n- ffnkit\nlibrary_name: transformers\n---\n\n# {type(model).__name__}\n\nSaved by ffnkit, the"
        f" updates apart from what they are made for: `base` and `adapter`. `ffnkit.load` opens both as one model."
        f"{peft}\n\nMeasured figures: none given.\n"
    )


def put_on(model: PreTrainedModel, folder: Path) -> Any:
    """The base with the updates that lie beside it on, in whatever dtype it was opened."""
    if not (folder / TENSORS).is_file():
        return put_added(model, folder)
    plan = Plan.load(folder / TENSORS)
    train = [edit for edit in plan.edits if edit.stage is not Stage.UPDATE]
    updates = [cast(UpdateLinear, edit) for edit in plan.edits if edit.stage is Stage.UPDATE]
    edits = (*(dataclasses.replace(edit, fingerprint=None) for edit in updates), *train)
    return apply(model, dataclasses.replace(plan, edits=edits))
