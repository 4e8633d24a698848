"""Each matrix of the FFN as a product of two thin ones, by its singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.hooks import Activations
from ffnkit.edits import Edit, FactorLinear
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, Narrowing, Width, each, need_data
from ffnkit.methods.narrow.by_block import Fitted, block_by_block, drafted
from ffnkit.model.ffn import FFN
from ffnkit.ops.moments import Moments
from ffnkit.ops.ridge import factored
from ffnkit.ops.subset import outputs
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc

WHITE = 1e-6  # of the moments' mean diagonal, added to it: inputs that never move have no inverse


@dataclass(frozen=True)
class Svd(Narrowing):
    """Truncate the SVD of every matrix of an FFN, with as many parameters as an FFN of the given width has.

    A matrix (out, in) of rank r costs r (out + in): the rank is what fits into the parameters that the matrix of the
    narrower FFN would have. Biases and hidden width stay. The two thin matrices train; folding multiplies them out,
    and a standard checkpoint is dense again.

    With ``whiten`` what each matrix gives on data is approximated, not its entries: W L is truncated, with L L^T the
    second moments of the matrix's inputs, and L^-1 goes into the inner matrix. Of that rank nothing is closer to W x on
    the data. A matrix whose inputs no token reached is truncated as it is.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "SVD"; Eckart and Young 1936; of ``whiten``, SVD-LLM (arXiv
        2403.07378), truncation-aware whitening. Differs: SVD-LLM then fine-tunes the thin matrices, one
        after the other.
    """

    width: Annotated[
        Width,
        Doc(
            "the narrower FFN whose parameters it may have: an int counts neurons, a float is a "
            "share; or one by FFN's name. 1.0 leaves an FFN as it is."
        ),
    ]

    whiten: Annotated[bool, Doc("truncate what the matrices give on data (SVD-LLM), not their entries.")] = field(
        default=False, kw_only=True
    )

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "each matrix as a product of two thin ones, rank from the budget (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"
    by_ffn: ClassVar[bool] = True

    @property
    def needs_data(self) -> bool:
        """Whether the matrices' inputs are measured."""
        return self.whiten

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

    @property
    def beyond(self) -> str | None:
        return "inputs of linears"

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        narrower = [(ffn, width) for ffn, width in self.chosen(model) if width != ffn.width]
        if not self.whiten:
            made = {
                f.name: _factored(f, width, None, "weights") for f, width, _ in each(narrower, progress, "factoring")
            }
            return drafted([ffn for ffn, _ in narrower], made)
        batches = need_data(data, self.name, beyond=self.beyond)
        found = [ffn for ffn, _, _ in each(narrower, None, "factoring")]
        widths = {ffn.name: width for ffn, width in narrower}
        seen: dict[str, Inputs] = {}

        def fit(ffn: FFN) -> Fitted:
            return _factored(ffn, widths[ffn.name], seen.pop(ffn.name, None), "outputs")

        def show(blocks: Blockwise, group: list[FFN], last: bool) -> None:
            blocks.watch(group, lambda ffn, acts: seen.setdefault(ffn.name, Inputs()).add(acts), last=last)

        return drafted(found, block_by_block(model, batches, found, show, fit, progress, sequential=False))


class Inputs:
    """Second moments of what the matrices of one FFN receive."""

    def __init__(self) -> None:
        self.moments: dict[bool, Moments] = {}  # of what down receives, and of what the others do

    def add(self, acts: Activations) -> None:
        rows = acts.counted()
        for inner, value in ((False, rows.input), (True, rows.hidden)):
            if inner not in self.moments:
                self.moments[inner] = Moments(value.shape[-1], value.device)
            self.moments[inner].add(value, rows.weights)

    def second(self, site: str) -> Tensor:
        """(in, in)."""
        return self.moments[site == "down"].second()


def _factored(ffn: FFN, width: int, seen: Inputs | None, what: str) -> Fitted:
    """The edits of one FFN's matrices, and the share of the energy that is lost, of ``what``."""
    edits: list[Edit] = []
    lost = total = 0.0
    for site in ffn.sites:
        weight = ffn.oriented(site)
        second = seen.second(site) if seen is not None else None
        first, outer, rest = truncated(weight, _rank(ffn, site, width), second)
        edits.append(FactorLinear.of(ffn.name, site, first, outer))
        lost += rest
        total += weight.double().square().sum().item() if second is None else outputs(second, weight)
    return Fitted(edits, {f"{what}' energy lost": lost / total if total > 0 else 0.0})


def _rank(ffn: FFN, site: str, width: int) -> int:
    """The largest rank whose two matrices have no more parameters than the site's matrix at ``width`` neurons."""
    out, inner = ffn.features_of(site)
    return (out * inner * width // ffn.width) // (out + inner)


def truncated(weight: Tensor, rank: int, second: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """first (r, in), second (out, r) of the best approximation of that rank, and the squared norm that it loses.

    The singular values are shared by halves: both matrices are of one scale, as tuning likes it.

    Args:
        weight: (out, in). second: (in, in) moments of its inputs x, E x x^T; the best is then the one that loses least
            of E ||W x||^2, and so is the norm that it loses.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    silent = second is not None and not bool(second.any())  # inputs of zeros: any weights do, these as they are
    if second is None or silent:
        u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    else:
        lower = factored(second.double(), WHITE)[0]
        u, s, vt = torch.linalg.svd(exact.double() @ lower, full_matrices=False)
        vt = torch.linalg.solve_triangular(lower, vt, upper=False, left=False)
    root = s[:rank].sqrt()
    lost = 0.0 if silent else s[rank:].double().square().sum().item()
    return (root[:, None] * vt[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype), lost
