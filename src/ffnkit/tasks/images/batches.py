"""Batches of images: the processor, reading, and augmentation that any step can find again."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io import loading
from ffnkit.tasks.images.files import open_image

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_FILES = ("preprocessor_config.json", "processor_config.json")
_FIXED = ("vit", "deit")  # kinds of models that take images of the size in their config only


def load_processor(name_or_dir: str | Path, **kwargs: Any) -> Any:
    """The image processor of a hub name or folder; where it has none, one made from the config.

    The variants on PIL are taken, which need no torchvision. The one made from a config resizes to its ``image_size``
    and has mean and standard deviation 0.5.

    Raises:
        FfnkitError: no such model, files that cannot be read, or a config without an image size.
    """
    from transformers import AutoImageProcessor

    name = loading.check_name(name_or_dir)
    kwargs = {"trust_remote_code": False, **kwargs}
    asked = f"image processor of {name}"
    if os.path.isdir(Path(name)) and not any((Path(name) / file).is_file() for file in _FILES):
        return processor_of(_config(name), asked)
    do = "Name a model or folder that has one with --tokenizer (tokenizer= in Python)"
    with loading.open_errors(asked, do), loading.hub_or_cache():
        return AutoImageProcessor.from_pretrained(name, backend="pil", **kwargs)


def processor_of(config: Any, asked: str = "image processor") -> Any:
    """An image processor for a model of this config. Raises FfnkitError where the config has no image size."""
    from transformers import ViTImageProcessorPil

    size = image_size(config)
    if size is None:
        found = "there is no preprocessor_config.json, and the config names no image size"
        raise FfnkitError(asked, found, "Name a model that has one with --tokenizer")
    half = [0.5] * channels(config)
    return ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=half, image_std=half)


def _config(name: str) -> Any:
    from ffnkit.io.architectures import read_config

    return read_config(name)


def image_size(config: Any) -> tuple[int, int] | None:
    """Height and width that a config names."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


def channels(config: Any) -> int:
    """The colours of a pixel: 3 unless the config says otherwise."""
    return int(getattr(getattr(config, "vision_config", config), "num_channels", None) or 3)


def mode_of(processor: Any) -> str:
    """How images are read for a processor: "L" (grey) where it has one mean, else "RGB"."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def check_processor(processor: Any, config: Any, name: str) -> None:
    """Raises FfnkitError where a processor makes images that the model cannot take."""
    from PIL import Image

    mode, wanted = mode_of(processor), channels(config)
    if (mode == "L") != (wanted == 1):
        found = f"the processor makes images of {1 if mode == 'L' else 3} channels and the model takes {wanted}"
        raise FfnkitError(f"model {name}", found, "Use the model's own image processor")
    size = image_size(config)
    if size is None or config.model_type not in _FIXED:
        return
    made = tuple(processor([Image.new(mode, (64, 64))], return_tensors="pt")["pixel_values"].shape[-2:])
    if made != size:
        found = f"the processor makes images of {made[0]} x {made[1]} and the model takes {size[0]} x {size[1]}"
        raise FfnkitError(f"model {name}", found, "Use the model's own image processor")


def tokens_each(config: Any) -> int:
    """Tokens that the FFNs see of an image: patches and class tokens; 1 where a config has no patches."""
    vision, size = getattr(config, "vision_config", config), image_size(config)
    patch = getattr(vision, "patch_size", None)
    if size is None or patch is None:
        return 1
    high, wide = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
    return (size[0] // high) * (size[1] // wide) + (2 if config.model_type == "deit" else 1)


@dataclass
class ImageBatches:
    """Reads, resizes and normalizes the images of a batch when it is made; nothing is kept.

    How an image is augmented is drawn from ``seed``, ``epoch`` and its pixels alone, so that a run that is resumed sees
    the same images, whatever was fetched before.

    Attributes:
        processor: the image processor.
        each: tokens of an image, for :meth:`tokens`.
        augment: "none"; "flip": half of the images are mirrored; "crop-flip": also moved by up to an eighth of their
            sides, the rest filled with the processor's mean.
        seed, epoch: of the augmentation.
    """

    processor: Any
    each: int = 1
    augment: str = "none"
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        import torch

        mode = mode_of(self.processor)
        images = [open_image(row["pixel_values"], mode) for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        if self.augment != "none":
            marks = [zlib.crc32(image.tobytes()) for image in images]
            pixels = augmented(pixels, marks, self.augment, self.seed, self.epoch)
        batch = {"pixel_values": pixels}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return batch

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Tokens that the FFNs see of a batch."""
        return len(batch["pixel_values"]) * self.each


def augmented(pixels: Tensor, marks: Sequence[int], augment: str, seed: int, epoch: int) -> Tensor:
    """A batch (n, channels, height, width) moved and mirrored, each image by a draw of its own.

    Args:
        marks: a number for each image; with seed and epoch it decides the draw.
    """
    import numpy as np
    import torch

    height, width = pixels.shape[-2:]
    far = (height // 8, width // 8) if augment == "crop-flip" else (0, 0)
    padded = torch.nn.functional.pad(pixels, (far[1], far[1], far[0], far[0]))
    out = torch.empty_like(pixels)
    for row, mark in enumerate(marks):
        draw = np.random.default_rng([seed, epoch, mark])
        top, left = (int(draw.integers(2 * most + 1)) for most in far)
        image = padded[row, :, top : top + height, left : left + width]
        out[row] = image.flip(-1) if draw.integers(2) else image
    return out
