"""Each matrix of the FFN as a product of two thin ones, by its singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, FactorLinear
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, Narrowing, Width, each
from ffnkit.model.ffn import FFN
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Svd(Narrowing):
    """Truncate the SVD of every matrix of an FFN, with as many parameters as an FFN of the given width has.

    A matrix (out, in) of rank r costs r (out + in): the rank is what fits into the parameters that the matrix of the
    narrower FFN would have. Biases and hidden width stay. The two thin matrices train; folding multiplies them out,
    and a standard checkpoint is dense again.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "SVD"; Eckart and Young 1936.
    """

    width: Annotated[
        Width,
        Doc(
            "the narrower FFN whose parameters it may have: an int counts neurons, a float is a "
            "share; or one by FFN's name. 1.0 leaves an FFN as it is."
        ),
    ]

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "each matrix as a product of two thin ones, rank from the budget (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    def chosen(self, model: nn.Module) -> list[tuple[FFN, int]]:
        """The FFNs and the widths whose parameters they may have.

        Raises:
            FfnkitError: layers or width do not fit, or experts share one 3-D parameter.
        """
        found = super().chosen(model)
        for ffn, width in found:
            for site in ffn.sites:
                ffn.linear(site)  # says why experts in one 3-D parameter cannot be factored
                if width < ffn.width and _rank(ffn, site, width) < 1:
                    do = "Give a larger width, or use a method that keeps whole neurons"
                    raise FfnkitError(f"width {width} of {ffn.name}", f"'{site}' is left with no rank at all", do)
        return found

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(self.chosen(model), progress, "factoring"):
            if width == neurons.ff:
                continue
            lost = total = 0.0
            for site in ffn.sites:
                weight = ffn.oriented(site)
                first, second, rest = truncated(weight, _rank(ffn, site, width))
                edits.append(FactorLinear.of(ffn.name, site, first, second))
                lost, total = lost + rest, total + weight.double().square().sum().item()
            quantities[ffn.name] = {"weights' energy lost": lost / total if total > 0 else 0.0}
        return Draft(tuple(edits), quantities)


def _rank(ffn: FFN, site: str, width: int) -> int:
    """The largest rank whose two matrices have no more parameters than the site's matrix at ``width`` neurons."""
    out, inner = ffn.features_of(site)
    return (out * inner * width // ffn.width) // (out + inner)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """first (r, in), second (out, r) of the best approximation of that rank, and the squared norm that it loses.

    The singular values are shared by halves: both matrices are of one scale, as tuning likes it.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    root = s[:rank].sqrt()
    lost = s[rank:].double().square().sum().item()
    return (root[:, None] * vt[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype), lost
