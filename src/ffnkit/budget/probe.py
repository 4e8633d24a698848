"""How much the end of a model moves when FFNs in it are replaced: what one block's errors cost in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import first_tensor
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.drift import divergence
from ffnkit.calibration.padding import TokenMasks
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import with_neurons

TOKENS = 1024  # that the probe looks at, at least, where there are so many
ENTRIES = 1 << 25  # logits held for comparison: 128 MiB in float32


class Ending:
    """The end of the uncompressed model on a few batches, and how far a change moves it.

    Of a language model it is the next tokens' distribution, compared by the Kullback-Leibler divergence; of any other
    model the output of the last block of each stack, compared by the relative squared difference. Heads are left out
    there: they may not be trained yet.
    """

    def __init__(self, blockwise: Blockwise, found: list[FFN], most: int = TOKENS) -> None:
        """Runs the model as it is. Memory beyond it: the outputs compared, for about ``most`` tokens."""
        self.blockwise, self.found = blockwise, found
        head = getattr(blockwise.model, "get_output_embeddings", lambda: None)()
        self.written = head is not None
        self.blocks = _last_blocks(blockwise, found)
        self.masks = TokenMasks(blockwise.model, {name: (stack, [name]) for name, stack in self.blocks.items()})
        self.reference: list[dict[str, Tensor]] = []
        tokens = 0
        for number in range(len(blockwise.batches)):
            outputs = self._outputs(number)
            self.reference.append(outputs)
            tokens += min(len(value) for value in outputs.values())
            if tokens >= most or tokens * max(value.shape[-1] for value in outputs.values()) >= ENTRIES:
                break

    def moved(self, changed: list[tuple[FFN, Neurons]]) -> float:
        """:meth:`gap` with other neurons in some FFNs."""
        with _lent(changed):
            return self.gap()

    @torch.no_grad()
    def gap(self) -> float:
        """The mean divergence a token, or the relative squared difference, of the model as it is now.

        The blocks that ``blockwise`` has behind it are not run.
        """
        gaps: dict[str, float] = {}
        norms: dict[str, float] = {}
        for number, wanted in enumerate(self.reference):
            for name, value in self._outputs(number).items():
                gap, norm = self._compare(value, wanted[name])
                gaps[name] = gaps.get(name, 0.0) + gap
                norms[name] = norms.get(name, 0.0) + norm
        # a divergence is not below 0 but for rounding, and no narrowing gains by that
        return max(0.0, sum(gaps[name] / max(norms[name], 1e-300) for name in gaps))

    def _compare(self, value: Tensor, wanted: Tensor) -> tuple[float, float]:
        """What differs, and what it is relative to."""
        if not self.written:
            return (value - wanted).square().sum().item(), wanted.square().sum().item()
        return divergence(value, wanted), float(len(value))

    def _outputs(self, number: int) -> dict[str, Tensor]:
        """What is compared of one batch, by name: (tokens that count, columns)."""
        caught: dict[str, Tensor] = {}
        watched = {"": self.blockwise.model} if self.written else {n: self.blockwise.modules[n] for n in self.blocks}
        handles = [module.register_forward_hook(_keeping(caught, name)) for name, module in watched.items()]
        try:
            self.blockwise.finish(number)
        finally:
            for handle in handles:
                handle.remove()
        self.masks.start(self.blockwise.batches[number])
        # what is written comes from the stack that ends last
        places = {"": list(self.blocks)[-1]} if self.written else {name: name for name in self.blocks}
        return {name: _counted(value, self.masks.of(places[name], value)) for name, value in caught.items()}


def _keeping(caught: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None) if name == "" else None
        caught[name] = (logits if logits is not None else first_tensor(output)).detach()

    return hook


def _counted(value: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens that count, columns)."""
    flat = value.reshape(-1, value.shape[-1])
    return flat if mask is None else flat[mask > 0]


def _last_blocks(blockwise: Blockwise, found: list[FFN]) -> dict[str, str]:
    """The last block of each list of blocks, in the order of running, and its stack."""
    holders = {block_name(ffn.name).rpartition(".")[0]: ffn.stack for ffn in found}
    last = {name.rpartition(".")[0]: name for name in blockwise.calls}  # later ones take the place of earlier ones
    order = list(blockwise.calls)
    names = sorted((last[holder] for holder in holders), key=order.index)
    return {name: holders[name.rpartition(".")[0]] for name in names}


@contextmanager
def _lent(changed: list[tuple[FFN, Neurons]]) -> Iterator[None]:
    """The FFNs run with other neurons inside the block."""
    with ExitStack() as stack:
        for ffn, neurons in changed:
            stack.enter_context(with_neurons(ffn, neurons))
        yield
