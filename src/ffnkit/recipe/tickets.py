"""Tickets: iterative magnitude pruning with rewinding, before an arm is tuned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ffnkit
from ffnkit.errors import FfnkitError
from ffnkit.recipe.parts import Tickets
from ffnkit.surgery.apply import carry_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MASKS, _REWOUND = "masks-{}", "rewound.safetensors"
Train = Callable[["PreTrainedModel", Path, tuple[int, Path] | None], Any]


def find(wanted: Tickets, folder: Path, fresh: Callable[[], PreTrainedModel], train: Train) -> dict[str, Any]:
    """Draw the ticket, round by round, from where an earlier call stopped; the marker of the stage.

    Each round trains what the rounds before left, from the rewound weights, and masks ``share`` of the weights that
    are left, the smallest of the trained ones in all pruned linears together.

    Source: Frankle and Carbin (arXiv 1803.03635), section 1, "iterative pruning with resetting"; Chen et al. (arXiv
        2007.12223) for pretrained models, whose weights are those that are rewound to.
    Differs: each training runs the whole schedule, also from weights of a later step (arXiv 1912.05671 starts the
        schedule there too).

    Args:
        folder: of the rounds. fresh: a new model as it is before tuning.
        train: trains a model in a folder and gives the trained one; with (step, file) it keeps the weights of that
            step there.

    Raises:
        FfnkitError: the training is over before the step to rewind to.
    """
    for number in range(wanted.rounds):
        masks = folder / _MASKS.format(number)
        if masks.exists():
            continue
        model = fresh() if number == 0 else rewound(fresh(), wanted, folder, number - 1)
        snapshot = (wanted.rewind, folder / _REWOUND) if wanted.rewind and number == 0 else None
        trained = ffnkit.fold(train(model, folder / f"round-{number}", snapshot))
        if wanted.rewind and not (folder / _REWOUND).is_file():
            what = "the first training was over before that step"
            raise FfnkitError(f"tickets: rewind {wanted.rewind}", what, "Rewind to an earlier step, or to 0")
        ffnkit.plan(trained, ffnkit.Prune(sparsity=wanted.sparsity(number), targets=wanted.targets)).save(masks)
        del model, trained
        gc.collect()
    return {"rounds": wanted.rounds, "shares": [wanted.sparsity(number) for number in range(wanted.rounds)]}


def rewound(model: PreTrainedModel, wanted: Tickets, folder: Path, number: int | None = None) -> PreTrainedModel:
    """The model with the weights that are rewound to and the masks of a round, of the last one unless it is named."""
    from safetensors.torch import load_model

    if wanted.rewind:
        load_model(model, str(folder / _REWOUND))
    last = wanted.rounds - 1 if number is None else number
    carry_out(model, ffnkit.Plan.load(folder / _MASKS.format(last)).edits)  # made for other weights of this shape
    return model
