"""What transformers makes of weights between a file and a model, where ffnkit wants it otherwise.

transformers' own tables say how experts are put together and how floats of 8 and 4 bits become plain ones while a model
is opened, and the way back that ``save_pretrained`` goes. This is the one place that changes a part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ffnkit.io.files import are_in_files, held

logger = logging.getLogger(__name__)
DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")  # formats in few bits of which transformers can make plain weights


def few_bits(told: Any) -> str | None:
    """The name of the format in few bits that a ``quantization_config`` tells of, where it can become plain weights."""
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    name = str(getattr(method, "value", method))
    return name if name in DEQUANTIZED else None


@contextmanager
def from_few_bits(told: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives ``kwargs`` for ``from_pretrained``; from a checkpoint in few bits it makes what is meant while this runs.

    Where models stay in their files (``io.files.in_files``) weights become plain ones, on machines with a GPU too.

    Args:
        told: the ``quantization_config`` of the checkpoint.
    """
    if (name := few_bits(told)) is None:
        yield kwargs
        return
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    if are_in_files() and "quantization_config" not in kwargs:
        plain = (Mxfp4Config if name == "mxfp4" else FineGrainedFP8Config)(dequantize=True)
        kwargs = {**kwargs, "quantization_config": plain}
    with _partial_blocks():
        yield kwargs


def forget_few_bits(model: Any, name: str) -> None:
    """Have a model that was opened from few bits be saved as the plain weights that it holds; says so.

    transformers would go back to few bits, of which the config tells no more, or fail on experts.
    """
    found = getattr(model, "_weight_conversions", None) or []
    steps = [step for each in found for step in getattr(each, "operations", ()) if _is_dequantizing(step)]
    if steps:
        model._weight_conversions = [kept for each in found if (kept := _without(each)) is not None]
        method = few_bits(steps[0].hf_quantizer.quantization_config) or "few bits"
        dtype = str(model.dtype).removeprefix("torch.")
        logger.warning(
            "%s is stored in %s; it is opened, and what is made of it is written, in %s", name, method, dtype
        )


def into_files(model: Any) -> None:
    """Inside of ``io.files.in_files``: what is taken apart on saving, such as experts, lies in files, one by one."""
    if not are_in_files():
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = getattr(model, "_weight_conversions", None)
    if found is None:  # what transformers' save_pretrained takes for a model that no file was opened for
        every = get_model_conversion_mapping(model, add_legacy=False)
        found = [each for each in every if not isinstance(each, PrefixChange)]
    model._weight_conversions = [_ending_in_files(each) for each in found]


@contextmanager
def _partial_blocks() -> Iterator[None]:
    """While the block runs, FP8 weights whose sides are no multiples of the block's are opened as they are meant.

    transformers 5.23 divides a side evenly by the number of scales: it fails on DeepSeek's 576 rows of five scales, and
    is wrong without a word where the number happens to divide (192 rows of two scales are 128 and 64, not 96 and 96).
    """
    from torch.nn.functional import pad
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    owner: Any = Fp8Dequantize
    even = owner._dequantize_one

    def blockwise(self: Any, quantized: Any, scales: Any, output_dtype: Any = None) -> Any:
        blocks = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None) or (1, 1)
        sides = tuple(quantized.shape[-2:])
        grid = tuple(-(-side // block) for side, block in zip(sides, blocks, strict=True))
        more = [count * block - side for count, block, side in zip(grid, blocks, sides, strict=True)]
        if not any(more) or not quantized.dtype.is_floating_point or tuple(scales.shape[-2:]) != grid:
            return even(self, quantized, scales, output_dtype)  # also four bits, with blocks of their own
        filled = pad(quantized.float(), (0, more[1], 0, more[0]))
        return even(self, filled, scales, output_dtype)[..., : sides[0], : sides[1]].contiguous()

    owner._dequantize_one = blockwise
    try:
        yield
    finally:
        owner._dequantize_one = even


def _without(conversion: Any) -> Any:
    """A conversion without its step from few bits and the names of scales; None where nothing is left of it."""
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    steps = getattr(conversion, "operations", None)
    if steps is None:
        return None if any("weight_scale_inv" in target for target in targets) else conversion
    first = next((step for step in steps if _is_dequantizing(step)), None)
    if first is None:
        return conversion
    names = first.hf_quantizer.serialized_names.items()
    beside = tuple(each for name, stored in names for each in stored if each != name)
    left = [step for step in steps if step is not first]
    kept = [each for each in sources if not each.endswith(beside)]
    return conversion.copy(kept, targets, operations=left) if left else None


def _is_dequantizing(step: Any) -> bool:
    return type(step).__name__.endswith("Dequantize")


def _ending_in_files(conversion: Any) -> Any:
    steps = getattr(conversion, "operations", None)
    if steps is None:
        return conversion
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    return conversion.copy(sources, targets, operations=[_file_step(), *steps])


def _file_step() -> Any:
    """What comes last on saving: each tensor goes into a file before the next weight is taken apart."""
    from transformers.core_model_loading import ConversionOps

    class IntoFile(ConversionOps):
        def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, Any]:
            return {name: held(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()}

        @property
        def reverse_op(self) -> Any:
            return self

    return IntoFile()
