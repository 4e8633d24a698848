"""Importing this module teaches ``from_pretrained`` to open compact checkpoints.

transformers lets a registered quantizer rebuild modules on the empty model before the weights are read. ffnkit's
rebuilds narrow, shared and scaled FFNs there, and afterwards leaves an ordinary float model: no quantizer stays on
it, so training, casting, moving and saving work as for any other. A real quantization (bitsandbytes, torchao, ...)
can be nested under ``base`` in the same config slot and is delegated to.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffnkit.errors import FfnkitError
from ffnkit.io import apart
from ffnkit.io.backends import method_of, quantizer_errors
from ffnkit.io.compact import check_described
from ffnkit.io.formats import FORMAT, MARK, QUANT_METHOD, is_compact
from ffnkit.io.loading import open_errors

logger = logging.getLogger(__name__)
_QUANTIZED = "opening a compact checkpoint quantized"

# ``surgery`` is imported when first used: this module may be loaded in the middle of transformers'
# own import, when the modules that they need are not there yet.


@register_quantization_config(QUANT_METHOD)
class FfnkitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compact checkpoint; fields as ``description.describe`` writes them.

    Attributes:
        ffns: the true shape of each FFN, by name.
        linears: what stands in the place of plain linears outside of FFNs, by name.
        attention: which heads those attentions kept that lost some, by name.
        read: the format of the file. format: the one in which the model will be saved.
        base: config of a real quantization to be done by its own quantizer, or None.
        base_done: whether the file's weights are already quantized by ``base``.
    """

    def __init__(
        self,
        ffns: dict[str, Any] | None = None,
        format: int = FORMAT,
        base: dict[str, Any] | None = None,
        base_done: bool = False,
        linears: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if isinstance(format, bool) or format not in range(1, FORMAT + 1):
            raise FfnkitError(
                "opening a compact checkpoint",
                f"format {str(format)[:50]}, this ffnkit reads up to {FORMAT}",
                "Install the ffnkit version that wrote it",
            )
        given = {"ffns": ffns, "linears": linears, "attention": attention, "base": base}
        check_described({k: v for k, v in given.items() if v is not None} | {"base_done": base_done})
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.read = format
        self.format = FORMAT
        self.ffns = ffns or {}
        self.linears = linears or {}
        self.attention = attention or {}
        self.base = base
        self.base_done = base_done

    def to_dict(self) -> dict[str, Any]:
        data = MARK | copy.deepcopy(self.__dict__)
        del data["quant_method"], data["read"]
        if data["base"] is None:
            del data["base"], data["base_done"]
        if not data["linears"]:
            del data["linears"]
        if not data["attention"]:
            del data["attention"]
        return data


def _put_on(model: Any, folder: Path) -> Any:
    from ffnkit.checkpoint.apart import put_on

    return put_on(model, folder)


apart.put_on.append(_put_on)


@register_quantizer(QUANT_METHOD)
class FfnkitQuantizer(HfQuantizer):
    """Rebuilds the FFNs of an empty model; everything else is plain loading, or the nested quantizer's work."""

    requires_calibration = False
    quantization_config: FfnkitConfig

    def __init__(self, quantization_config: FfnkitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.inner: HfQuantizer | None = None
        if quantization_config.base is not None:
            with open_errors(_QUANTIZED):  # the config itself may ask for the method's package
                config = AutoQuantizationConfig.from_dict(copy.deepcopy(quantization_config.base))
            with quantizer_errors(_QUANTIZED, config):
                self.inner = AutoHfQuantizer.from_config(config, pre_quantized=quantization_config.base_done)
            self.pre_quantized = self.inner.pre_quantized

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.inner is not None:
            with quantizer_errors(_QUANTIZED, self.inner.quantization_config):
                self.inner.validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ffnkit.checkpoint import contents, placement
        from ffnkit.io.sizes import stored_shapes
        from ffnkit.surgery.description import declare
        from ffnkit.surgery.meta import rebuild

        described = self.quantization_config.to_dict()
        plain = self.inner is None or not self.pre_quantized  # what is quantized lies packed
        stored = stored_shapes(kwargs.get("checkpoint_files")) if plain else {}
        if self.quantization_config.read == 1:
            stored = {_renamed(name): shape for name, shape in stored.items()}
        contents.check_sizes(model, described, stored)
        self.quantization_config.ffns = described["ffns"]
        rebuild(model, described)
        if stored:
            contents.check_contents(model, described, stored)
        placement.check_map(model, described, kwargs.get("device_map"))
        if self.inner is not None:  # before the declaration: quantizers leave out what is tied
            with quantizer_errors(_QUANTIZED, self.inner.quantization_config):
                self.inner.preprocess_model(model, **kwargs)
            _leave_packing(model)
        declare(model, described)
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        from ffnkit.checkpoint import placement
        from ffnkit.surgery.apply import share
        from ffnkit.surgery.description import renamed, tell
        from ffnkit.surgery.ties import declare_shared

        placement.check_map(model, self.quantization_config.to_dict(), getattr(model, "hf_device_map", None))
        share(model, self.quantization_config.to_dict())
        _leave_renaming(model)
        placement.bridge(model)
        described = renamed(model, self.quantization_config.to_dict())
        self.quantization_config.ffns = described["ffns"]
        self.quantization_config.linears = described.get("linears", {})
        self.quantization_config.attention = described.get("attention", {})
        del model.hf_quantizer
        tell(model.config, described)
        if self.inner is None:
            model.is_quantized = False
            if hasattr(model, "quantization_method"):
                del model.quantization_method
            return model
        model.hf_quantizer = self
        model.quantization_method = self.inner.quantization_config.quant_method
        self.inner.postprocess_model(model, **kwargs)
        if not self.quantization_config.base_done:
            _tell_float(model)
        _leave_deserializing(model)
        declare_shared(model)  # scales that lie beside a quantized weight are shared with it
        described["base_done"] = True
        described["base"] = self.inner.quantization_config.to_dict()
        self.quantization_config.base, self.quantization_config.base_done = described["base"], True
        tell(model.config, described)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Format 1 held a thin pair as two parameters, later ones as two linears."""
        from transformers.core_model_loading import WeightRenaming

        inner: list[Any] = getattr(self.inner, "get_weight_conversions", list)()
        old = [WeightRenaming(rf"\.{name}$", rf".{name}.weight") for name in _THIN]
        return [*(old if self.quantization_config.read == 1 else ()), *inner]

    # --- what the nested quantizer decides, where there is one

    def is_serializable(self) -> bool:
        writes = self.inner is None or bool(self.inner.is_serializable())
        if self.inner is not None and not writes:  # transformers' error takes us for the quantization
            logger.warning("%s writes no checkpoints of what it quantized", method_of(self.inner.quantization_config))
        return writes

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What is written of a quantized model: of a shared FFN the first place alone, with what lies beside it.

        Quantizers write some parts (a state in bytes, inner tensors) anew at each place, which no longer look shared.
        """
        if self.inner is None:
            return super().get_state_dict_and_metadata(model, *args, **kwargs)
        from ffnkit.surgery.ties import further_names

        state, metadata = self.inner.get_state_dict_and_metadata(model, *args, **kwargs)
        state = model.state_dict() if state is None else state
        further = further_names(model, state)
        return {key: value for key, value in state.items() if key not in further}, metadata

    @property
    def is_trainable(self) -> bool:
        return self.inner is None or bool(self.inner.is_trainable)

    @property
    def is_qat_trainable(self) -> bool:
        return self.inner is None or bool(self.inner.is_qat_trainable)


def _named(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """transformers' look at the method of a config, to which ours is named: the file leaves it out (``io.formats``)."""

    def supports(stored: Any) -> bool:
        if is_compact(stored):
            stored["quant_method"] = QUANT_METHOD
        return check(stored)

    return supports


AutoHfQuantizer.supports_quant_method = staticmethod(  # type: ignore[method-assign]
    _named(AutoHfQuantizer.supports_quant_method)
)


def _known(read: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' reading of a config, which tools call with that of a model: ours names its method to it."""

    def from_dict(cls: Any, stored: dict[str, Any]) -> Any:
        return read(cls, {**stored, "quant_method": QUANT_METHOD} if is_compact(stored) else stored)

    return from_dict


AutoQuantizationConfig.from_dict = classmethod(  # type: ignore[method-assign, assignment]
    _known(AutoQuantizationConfig.from_dict.__func__)  # type: ignore[attr-defined]
)


def _nested(merge: Callable[..., Any]) -> Callable[..., Any]:
    """A quantization asked of ``from_pretrained`` for a compact checkpoint, nested in what the file says."""

    def merged(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if quantization_config_from_args is None or not is_compact(quantization_config):
            return merge(quantization_config, quantization_config_from_args)
        if quantization_config.get("base") is not None:
            do = "Open it without quantization_config, or quantize the compact checkpoint that it was made of"
            raise FfnkitError(_QUANTIZED, "it is quantized already", do)
        return FfnkitConfig.from_dict({**quantization_config, "base": quantization_config_from_args.to_dict()})

    return merged


AutoHfQuantizer.merge_quantization_configs = classmethod(  # type: ignore[method-assign,assignment]
    _nested(AutoHfQuantizer.merge_quantization_configs)
)


_THIN = ("first", "second")  # the parameters of a thin pair in format 1


def _renamed(name: str) -> str:
    """A tensor's name in format 1 as it is today."""
    return f"{name}.weight" if name.rpartition(".")[2] in _THIN else name


def _leave_packing(model: Any) -> None:
    """Have 4-bit layers use their weights as they lie on every CPU.

    On some, bitsandbytes would lay them out anew in the first forward, which needs outputs in multiples of 32 and
    changes what several layers may share.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _tell_float(model: Any) -> None:
    """Say which linears quantizers pass over, because a factor, a mask or an update stands beside their weight."""
    from ffnkit.nn.reparametrized import ReparametrizedLinear

    left = [n for n, m in model.named_modules() if isinstance(m, ReparametrizedLinear) and not m.thin]
    if left:
        do = "ffnkit.load(..., fold=True), saved, quantizes them too"
        logger.warning("%d linears stay in float, such as %s: something stands beside them; %s", len(left), left[0], do)


def _leave_renaming(model: Any) -> None:
    """Forget the names of an old format: a model is saved in the present one."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        each for each in conversions if not any(p.endswith("first$") or p.endswith("second$") for p in _patterns(each))
    ]


def _patterns(conversion: Any) -> list[str]:
    return list(getattr(conversion, "source_patterns", ()))


def _leave_deserializing(model: Any) -> None:
    """Forget how quantized tensors were put together on opening: there is no way back that saving could take.

    What ``state_dict`` gives is what the file holds.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            each
            for each in conversions
            if not any(type(step).__name__.endswith("Deserialize") for step in getattr(each, "operations", ()))
        ]


def _delegate(name: str) -> Any:
    """A method of the nested quantizer where there is one, else the plain one."""
    plain = getattr(HfQuantizer, name)

    def method(self: FfnkitQuantizer, *args: Any, **kwargs: Any) -> Any:
        if self.inner is None:
            return plain(self, *args, **kwargs)
        return getattr(self.inner, name)(*args, **kwargs)

    method.__name__ = name
    return method


# Named one by one and looked up softly: the set grew between transformers' releases.
for _name in (
    "update_dtype",
    "update_device_map",
    "param_element_size",
    "get_new_dtype",
    "adjust_max_memory",
    "param_needs_quantization",
    "update_parallel_plan",
    "update_attn_implementation",
    "get_quantize_ops",
    "get_load_operations",
    "update_weight_conversions",
    "_dequantize",
):
    if hasattr(HfQuantizer, _name):
        setattr(FfnkitQuantizer, _name, _delegate(_name))
