"""AdamW on float32 masters of parameters that compute in another type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FUSED = ("cpu", "cuda", "xpu")  # devices for which torch has AdamW in one kernel


class Masters:
    """Steps of AdamW whose sums are float32, whatever the type of the parameters.

    A step of a rate of 1e-4 is below what bf16 can add to most weights: summed there, it would be lost. Memory: 12
    bytes a trained number beside the parameters (masters and Adam's two averages), 8 where they are float32 themselves.

    Args:
        parameters: those that train. zeros: of some of them, by id, where they are zero and shall stay so.
    """

    def __init__(self, parameters: list[nn.Parameter], zeros: dict[int, Tensor]) -> None:
        self.parameters, self.zeros = parameters, zeros
        self.masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        fused = all(p.device.type in FUSED for p in self.masters)  # one pass over memory: a fifth of the time on a CPU
        self.optimizer = torch.optim.AdamW(self.masters, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, rate: float, most: float = 1.0) -> None:
        """One step at ``rate``, gradients clipped to the norm ``most``; the gradients are spent."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, most)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if (zero := self.zeros.get(id(parameter))) is not None:
                master.masked_fill_(zero, 0.0)
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)
            master.grad = None

    @torch.no_grad()
    def back_to(self, values: list[Tensor]) -> None:
        """The parameters, and their masters, as these are; what was averaged is forgotten."""
        self.optimizer.state.clear()
        for parameter, master, value in zip(self.parameters, self.masters, values, strict=True):
            master.copy_(value)
            parameter.copy_(value)
