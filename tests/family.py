"""What a row of families.py can do: build its model with weights under which the FFNs matter, and run it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, PAD, BATCH, TOKENS = 99, 1, 2, 7
WANTED = (
    "logits", "last_hidden_state", "encoder_last_hidden_state", "prediction_logits",
    "text_embeds", "image_embeds", "logits_per_image", "start_logits",
)  # fmt: skip


_BUILT: dict[tuple[str, int, int], tuple[nn.Module, torch.Tensor]] = {}  # models that no test sees but as copies


@dataclass(frozen=True)
class Expect:
    """FFNs of one shape that a family has: how many, hidden neurons, gated or not, experts (0: dense), stack."""

    count: int
    width: int
    gated: bool = False
    experts: int = 0
    stack: str | None = None  # None: the name of the stack is not part of the contract


@dataclass(frozen=True)
class Family:
    """A row: the class of the model, the arguments of its configuration, and what ffnkit must find in it."""

    name: str
    model_class: str
    config_args: dict[str, Any]
    expect: tuple[Expect, ...]
    width_keys: dict[str, int] = field(default_factory=dict)  # dotted key -> width (None there: the default)
    kind: str = "text"  # text, seq2seq, image, clip, audio, wave
    seed: int = 0

    @property
    def config_class(self) -> type:
        return getattr(transformers, self.model_class).config_class

    def config(self, *, times: int = 1) -> Any:
        """A fresh configuration; ``times`` multiplies every width of the FFNs."""
        config = self.config_class(**copy.deepcopy(self.config_args))
        for key, width in self.width_keys.items():
            owner, name = _owner(config, key)
            found = getattr(owner, name)
            assert found in (width, None), f"{self.name}: {key} is {found}, the row says {width}"
            if times != 1:
                setattr(owner, name, times * width)
        return config

    def model(self, *, times: int = 1, seed: int | None = None) -> nn.Module:
        """A fresh float32 model in eval mode; the same seed gives the same weights (and state of torch's generator)."""
        key = (repr(self), times, self.seed if seed is None else seed)
        if key not in _BUILT:
            _BUILT[key] = self._build(times, key[-1]), torch.get_rng_state()
        model, state = _BUILT[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    def _build(self, times: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config(times=times))
        redraw(model, seed=seed)
        if self.has_experts:  # the grouped kernel of the experts knows no float64
            model.set_experts_implementation("eager")
        return model.eval()

    def inputs(self, model: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
        """Keyword arguments for ``model(**inputs)``; floating inputs in the model's dtype."""
        generator = torch.Generator().manual_seed(seed)
        inputs = _INPUTS[self.kind](model.config, generator)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def outputs(
        self, model: nn.Module, inputs: dict[str, torch.Tensor] | None = None, *, grad: bool = False
    ) -> dict[str, torch.Tensor]:
        """Every output of interest by its name: logits or hidden states of every stack."""
        with torch.set_grad_enabled(grad):
            found = model(**(self.inputs(model) if inputs is None else inputs))
        outputs = {name: found[name] for name in WANTED if found.get(name) is not None}
        assert outputs, f"{self.name}: none of {WANTED} in {list(found)}"
        return outputs

    @property
    def shapes(self) -> Counter[tuple[int, bool, int]]:
        """(width, gated, experts) of every FFN, counted."""
        shapes: Counter[tuple[int, bool, int]] = Counter()
        for expect in self.expect:
            shapes[expect.width, expect.gated, expect.experts] += expect.count
        return shapes

    @property
    def stacks(self) -> Counter[str]:
        """How many FFNs each stack has; empty where the row leaves the stacks open."""
        stacks: Counter[str] = Counter()
        for expect in self.expect:
            if expect.stack:
                stacks[expect.stack] += expect.count
        return stacks

    @property
    def count(self) -> int:
        return sum(e.count for e in self.expect)

    @property
    def gated(self) -> bool:
        return any(e.gated for e in self.expect)

    @property
    def has_experts(self) -> bool:
        return any(e.experts for e in self.expect)


def _owner(config: Any, key: str) -> tuple[Any, str]:
    *path, name = key.split(".")
    for part in path:
        config = getattr(config, part)
    return config, name


def config_value(config: Any, key: str) -> Any:
    """The value of a dotted key of a configuration."""
    owner, name = _owner(config, key)
    return getattr(owner, name)


# Weights -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def redraw(model: nn.Module, *, seed: int) -> None:
    """Draw all trainable weights anew: weights of unit gain, biases that are not zero, norms that are not trivial.

    The initialisation of the library (0.02, zero biases, unit norms) leaves FFNs that hardly change an output, so that
    a broken one would go unseen. Parameters that the library fixes (sinusoidal positions) are left.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        if "Sinusoidal" in kind:
            done.update(id(p) for p in module.parameters())
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.requires_grad or parameter.ndim == 0:
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if "Norm" in kind:
                parameter.add_(0.2 * noise)
            elif parameter.ndim == 1 or "bias" in name:
                parameter.copy_(0.3 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / _fan_in(module, parameter) ** 0.5)


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    if type(module).__name__ == "Conv1D":
        return parameter.shape[0]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return parameter[0].numel()
    return parameter.shape[-1]


# Inputs --------------------------------------------------------------------------------------------------------------


def _tokens(generator: torch.Generator, tokens: int = TOKENS, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB - 5, (BATCH, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return ids.masked_fill(mask == 0, pad), mask


def _text(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids, mask = _tokens(generator, pad=_pad(config))
    return {"input_ids": ids, "attention_mask": mask}


def _seq2seq(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    decoder, _ = _tokens(generator, TOKENS - 1, pad=5)
    return {**_text(config, generator), "decoder_input_ids": decoder}


def _image(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = config.image_size
    return {"pixel_values": torch.randn((BATCH, 3, size, size), generator=generator)}


def _clip(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return _text(config.text_config, generator) | _image(config.vision_config, generator)


def _audio(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    decoder, _ = _tokens(generator, TOKENS - 1, pad=5)
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": decoder}


def _wave(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn((BATCH, 400), generator=generator)}


def _pad(config: Any) -> int:
    pad = getattr(config, "pad_token_id", None)
    return PAD if pad is None else pad


_INPUTS = {"text": _text, "seq2seq": _seq2seq, "image": _image, "clip": _clip, "audio": _audio, "wave": _wave}
