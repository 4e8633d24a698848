"""A package outside of ffnkit: one method, one kind of edit and one family, and nothing of ours touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from ffnkit.edits import Edit, LinearEdit, SelectNeurons, Stage
from ffnkit.model.families.ffns import Layout
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented
from ffnkit.plans import Draft

# --- a method


@dataclass(frozen=True)
class Halve:
    """Keep the half of the neurons with the largest output weights."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "keep the half of the neurons with the largest output weights"
    paper: ClassVar[str] = ""

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def draft(self, model: nn.Module, data: Iterable[Any] | None, progress: Any) -> Draft:
        edits: list[Edit] = []
        for ffn in ffns(model):
            width = ffn.width // 2
            order = ffn.raw().down.norm(dim=-2).sort(dim=-1, descending=True, stable=True).indices
            kept = order[..., :width].sort(dim=-1).values.int()
            edits.append(SelectNeurons(ffn.name, width=width, index=kept))
        return Draft(tuple(edits))


# --- a kind of edit, and the layer that it puts in


class Gained(ReparametrizedLinear):
    """``y = W (gain * x) + b`` with one fixed number."""

    kind: ClassVar[str] = "outside-gain"

    def __init__(self, linear: Any, gain: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight
        self._stand_in(linear)
        self.register_buffer("gain", gain.to(self.weight.device, self.weight.dtype, copy=True))

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def folded(self) -> nn.Parameter:
        return nn.Parameter((self.weight * self.gain).detach(), self.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x * self.gain.to(x.dtype), oriented(self.weight, self.transposed), self.bias)


@dataclass(frozen=True, eq=False)
class GainInputs(LinearEdit):
    """A fixed number in front of a linear."""

    gain: Tensor

    kind: ClassVar[str] = "outside:GainInputs"
    layer: ClassVar[type[ReparametrizedLinear] | None] = Gained
    stage: ClassVar[Stage] = Stage.SCALE

    @classmethod
    def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> GainInputs:
        return cls(ffn.name, site, ffn.oriented(site).new_empty(()))

    @classmethod
    def becomes(cls, edits: Any, name: str) -> str:
        return "with a gain"

    def pieces(self) -> tuple[Tensor, ...]:
        return (self.gain,)


MAKERS: dict[str, Any] = {"gain": lambda ffn: GainInputs(ffn.name, "up", torch.tensor(0.5))}


@dataclass(frozen=True)
class Each:
    """A method for trying edits: the one that ``MAKERS[make]`` gives for each FFN, or for the last one."""

    make: str
    last: bool = False

    name: ClassVar[str] = "each"

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def draft(self, model: nn.Module, data: Any, progress: Any) -> Draft:
        found = ffns(model)
        return Draft(tuple(MAKERS[self.make](ffn) for ffn in (found[-1:] if self.last else found)))


# --- a family


class OutsideConfig(PretrainedConfig):
    model_type = "ffnkit-outside"

    def __init__(
        self, hidden_size: int = 8, intermediate_size: int = 20, num_hidden_layers: int = 2, **more: Any
    ) -> None:
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**more)


class OutsideFfn(nn.Module):
    def __init__(self, config: OutsideConfig) -> None:
        super().__init__()
        self.inward = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.outward = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.act(self.inward(x)))


class OutsideModel(PreTrainedModel):
    config_class = OutsideConfig
    base_model_prefix = "outside"
    main_input_name = "x"

    def __init__(self, config: OutsideConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(OutsideFfn(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
            nn.init.normal_(module.bias, std=0.4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return {"last_hidden_state": x}


AutoConfig.register(OutsideConfig.model_type, OutsideConfig)
AutoModel.register(OutsideConfig, OutsideModel)

ROW = Layout("outside", up="inward", down="outward")


def outside_model() -> OutsideModel:
    torch.manual_seed(0)
    return OutsideModel(OutsideConfig()).eval()


def outside_inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 5, 8, generator=draw).to(next(model.parameters()).dtype)}
