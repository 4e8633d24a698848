"""Plans, made and tried: what cannot be carried out is refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ffnkit import plans
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import phase
from ffnkit.plans import Measured, Method, Plan, Progress
from ffnkit.surgery.apply import check_edits
from ffnkit.surgery.meta import structure
from ffnkit.surgery.trial import try_out


def plan(
    model: nn.Module,
    method: Method,
    data: Iterable[dict[str, Tensor]] | Measured | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What ``method`` would do to ``model``; changes nothing.

    The edits are rehearsed on a copy of the model's structure. Those that leave layers or heads out are run on a few
    tokens, too: the outputs must be those of the model with them left out by hooks, also once it is opened anew.

    Args:
        model: a transformers model.
        method: settings such as ``Fusion(width=0.25, layers="last:8")``.
        data: batches for ``model(**batch)``, for methods that ask for them; or the statistics in their place.
        progress: called with (done, total, FFN name) after each FFN.

    Raises:
        FfnkitError: naming model and method, where the settings do not fit the model, or it does not bear the edits.
    """
    made = plans.plan(model, method, data, progress)
    try:
        with phase("trying the plan out"):
            check_edits(model, made.edits)
            try_out(model, made.edits, data[0] if isinstance(data, Sequence) and data else None)
    except FfnkitError as error:
        raise error.within(f"{method.name} on {type(model).__name__}") from error
    made.rehearsed.add(structure(model))
    return made
