"""Latency of every arm, measured in one process in alternation, so that a drift of the machine hits all alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.io.files import read_json
from ffnkit.io.progress import counted
from ffnkit.recipe.sources import Source
from ffnkit.recipe.state import digest, unit_of, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ffnkit.recipe.schema import Recipe


def checkpoints(recipe: Recipe, out: Path) -> dict[str, Path]:
    """The kept checkpoint of each arm's first seed: the compact one, which has the true widths, where there is one."""
    found: dict[str, Path] = {}
    for arm in recipe.arms:
        unit = unit_of(out, arm, recipe.seeds[0])
        kept = [unit.folder / form for form in ("compact", "standard") if (unit.folder / form).is_dir()]
        if unit.done and kept:
            found[arm] = kept[0]
    return found


def measure_latency(recipe: Recipe, out: Path, *, again: bool = False) -> bool:
    """Write latency.json unless one of the same arms and settings is there; True where something was measured."""
    from ffnkit.report import measure

    folders = checkpoints(recipe, out)
    if not recipe.measure.latency or not folders:
        return False
    key = digest([recipe.measure.model_dump(), [[arm, _made(out, recipe, arm)] for arm in folders]])
    if not again and (read_json(out / "latency.json") or {}).get("fingerprint") == key:
        return False
    source = Source(recipe)
    opened = counted(folders.items(), "opening for the latencies", len(folders))
    models = {arm: source.task.load_model(str(folder)).to(source.device) for arm, folder in opened}
    batch = batch_for(next(iter(models.values())), recipe.measure.batch_size, recipe.measure.length)
    taken = measure.latencies(models, batch, repeats=recipe.measure.repeats)
    first = next(iter(recipe.arms))
    arms: dict[str, Any] = {}
    for arm, seconds in taken.seconds.items():
        ratio = taken.ratios[arm] if first in folders else None
        arms[arm] = {
            "latency_s": seconds.median,
            "latency_quartiles_s": [seconds.lower, seconds.upper],
            "latency_ratio": ratio.median if ratio else None,
            "latency_ratio_quartiles": [ratio.lower, ratio.upper] if ratio else None,
        }
    how = _how(recipe) | {"form": {arm: folder.name for arm, folder in folders.items()}}
    write_json(out / "latency.json", {"fingerprint": key, **how, "arms": arms})
    return True


def _how(recipe: Recipe) -> dict[str, Any]:
    """How it was measured."""
    import torch

    settings = recipe.measure
    return {
        "batch_size": settings.batch_size,
        "length": settings.length,
        "repeats": settings.repeats,
        "threads": torch.get_num_threads(),
    }


def _made(out: Path, recipe: Recipe, arm: str) -> Any:
    return (unit_of(out, arm, recipe.seeds[0]).marker("unit") or {}).get("fingerprint")


def batch_for(model: PreTrainedModel, size: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding on the model's device: input_ids and attention_mask, (size, length).

    A model of images gets random ones of its own size, ``pixel_values``. An encoder-decoder that writes gets as many
    ``decoder_input_ids``.
    """
    import torch

    if model.main_input_name == "pixel_values":
        from ffnkit.tasks.images.batches import channels, image_size

        shape = (size, channels(model.config), *(image_size(model.config) or (224, 224)))
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)}
    config = model.config.get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    vocabulary = config.vocab_size
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    plain = next(token for token in range(vocabulary) if token not in special)
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
    for token in special - {None}:
        ids[ids == token] = plain
    if isinstance(config.eos_token_id, int):
        ids[:, -1] = config.eos_token_id  # encoder-decoder classifiers read the state of the one end token
    ids = ids.to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # an encoder-decoder that writes reads the targets too; classifiers feed their inputs to the decoder themselves
    writes = getattr(model.config, "is_encoder_decoder", False) and model.can_generate()
    return {**batch, "decoder_input_ids": ids} if writes else batch
