"""How much the end of a model moves when FFNs in it are replaced: what one block's errors cost in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.drift import Drift
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import with_neurons

TOKENS = 1024  # that the probe looks at, at least, where there are so many


class Ending(Drift):
    """The end of the uncompressed model, and how far a change moves it; blocks that are behind are not run again."""

    def __init__(self, blockwise: Blockwise, most: int = TOKENS) -> None:
        """Runs the model as it is. Memory beyond it: the outputs compared, for about ``most`` tokens."""
        super().__init__(blockwise.model, blockwise.batches, most, run=blockwise.finish)

    def moved(self, changed: list[tuple[FFN, Neurons]]) -> float:
        """How far it is with other neurons in some FFNs."""
        with _lent(changed):
            return self()


@contextmanager
def _lent(changed: list[tuple[FFN, Neurons]]) -> Iterator[None]:
    """The FFNs run with other neurons inside the block."""
    with ExitStack() as stack:
        for ffn, neurons in changed:
            stack.enter_context(with_neurons(ffn, neurons))
        yield
