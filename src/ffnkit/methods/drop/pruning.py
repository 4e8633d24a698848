"""Single weights of linears become zero, wherever the linears are: the unstructured pruning of DSEE, Wanda, N:M."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import telling
from ffnkit.edits import Edit, Mask
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, generator, need_data
from ffnkit.methods.drop.learnt import Learnt
from ffnkit.methods.drop.weights import Prunable, column_norms, prunable
from ffnkit.ops.masks import lowest, lowest_of_groups, lowest_of_rows, read_pattern
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc, WhichLayers, check, renamed, told

Mode = Literal["ABS", "AB", "WABS", "WAB", "NABS", "NAB", "W", "random"]
OF_UPDATE = ("ABS", "AB", "NABS", "NAB")  # modes that see the update alone
OF_LOW_RANK = ("AB", "WAB", "NAB")  # modes that see its low-rank part alone
Pool = list[tuple[int, Prunable]]


@renamed(sites="targets", ratio="sparsity", adapted_ratio="adapted_sparsity")
@dataclass(frozen=True)
class Prune:
    """Set the least weights of linears to zero, by a mask that stays through any tuning.

    Linears without an update and linears that carry one (DSEE, SparseGrad) are two pools, each with a sparsity of its
    own. Below an update the frozen weight W is pruned and the update D stays whole. Zeros that are there already count.
    Task heads, embeddings and routers are never pruned. Nothing gets smaller or faster by it: zeros are stored, and
    dense hardware multiplies them.

    Source: DSEE (arXiv 2111.00160), stage 2 and its released code; Wanda (arXiv 2306.11695), equation 1; Han et al.
        (arXiv 1506.02626). N:M as in Zhou et al. (arXiv 2102.04010).
    Differs: WABS scales the whole update, not its sparse part alone; task heads and poolers stay whole. The norms of
        Wanda are those of the model as it is, in one pass, not of the model whose earlier layers are pruned. With
        wanda the modes' scores are multiplied by the input's norm too.
    """

    sparsity: Annotated[float, Doc("share of zeros among weights without an update.", at_least=0, below=1)] = 0.5
    adapted_sparsity: Annotated[
        float | None,
        Doc("share of zeros among weights that carry an update; none: as sparsity.", at_least=0, below=1, example=0.5),
    ] = None
    by: Annotated[
        Literal["magnitude", "wanda", "random"],
        Doc(
            'weights without an update go by magnitude, by "wanda" (magnitude times the norm of the '
            "input, on data), or at random."
        ),
    ] = "magnitude"
    mode: Annotated[
        Mode,
        Doc(
            "weights that carry an update D = s (UV + S2) go by ABS |D|, AB |s UV|, WABS |W + D|, WAB "
            "|W + s UV|, W |W|, or at random, the lowest first; by NABS and NAB those of the highest "
            "|D| and |s UV| go."
        ),
    ] = "ABS"
    scope: Annotated[
        Literal["auto", "global", "layer", "row"],
        Doc(
            'scores are compared in the whole pool ("global"), in each matrix ("layer") or in each '
            'row of it ("row", the weights of one output); auto: row with wanda, global otherwise.'
        ),
    ] = "auto"
    pattern: Annotated[
        str | None,
        Doc('"2:4", "4:8", ...: of each M weights that follow each other along the input N stay; sets the sparsities.'),
    ] = None
    targets: Annotated[str, Doc('"ffn", "attention", "qv", "all", or a regular expression over module names.')] = "all"
    layers: Annotated[WhichLayers, Doc("of which layers FFNs are taken.")] = "all"
    seed: Annotated[int, Doc("of random choices.", at_least=0)] = 0

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "set single weights of any linears to zero, by a mask that stays; saves no time"
    paper: ClassVar[str] = "arXiv 2111.00160"

    def __post_init__(self) -> None:
        if isinstance(self.pattern, int) and not isinstance(self.pattern, bool):  # YAML reads 2:4 as sixties and ones
            object.__setattr__(self, "pattern", "{}:{}".format(*divmod(self.pattern, 60)))

    @property
    def needs_data(self) -> bool:
        """Whether activations are measured."""
        return self.by == "wanda"

    def settings(self) -> dict[str, Any]:
        return told(self)

    def check(self) -> None:
        """Raises FfnkitError on settings out of range."""
        check(self)
        if self.pattern is not None:
            kept, size = read_pattern(self.pattern)
            given = {self.sparsity, self.sparsity if self.adapted_sparsity is None else self.adapted_sparsity}
            if not given <= {0.5, 1 - kept / size}:
                found = f"it leaves {kept / size:.0%} of the weights, and sparsities are given too"
                raise FfnkitError(f"pattern {self.pattern}", found, "Leave the sparsities out")
            if self.scope != "auto":
                raise FfnkitError(f"pattern {self.pattern}", "a scope is given too", "Leave the scope out")

    def chosen(self, model: nn.Module) -> list[Prunable]:
        """The weights to prune. Raises FfnkitError where the settings do not fit the model."""
        self.check()
        found = prunable(model, self.targets, self.layers)
        if self.pattern is not None:
            _, size = read_pattern(self.pattern)
            for each in found:
                if each.shape[-1] % size:
                    what = f"{each.label} has {each.shape[-1]} inputs, no multiple of {size}"
                    raise FfnkitError(f"pattern {self.pattern}", what, "Name other targets, or another pattern")
        return found

    def learnt(self, model: nn.Module) -> list[Learnt]:
        """What a mode of updates reads: weights without one are pruned by magnitude, so that one of all will do."""
        linears = tuple(each.module for each in self.chosen(model) if not each.site)
        asking = [] if self.mode in ("W", "random") else ["mode"]
        asking += [] if self.adapted_sparsity is None else ["adapted_sparsity"]
        return [Learnt(setting, "update", f"the weights of targets {self.targets}", linears) for setting in asking]

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        found = self.chosen(model)
        for each in found:
            each.check()
            if each.site:
                each.module.check_plain(f"pruning {each.name}")
        self._check_updates(found)
        norms = (
            column_norms(model, telling(need_data(data, self.name, beyond="inputs of linears"), progress), found)
            if self.needs_data
            else {}
        )
        adapted = self.sparsity if self.adapted_sparsity is None else self.adapted_sparsity
        pools: list[tuple[float, Pool]] = [
            (self.sparsity, [(i, each) for i, each in enumerate(found) if not each.adapted]),
            (adapted, [(i, each) for i, each in enumerate(found) if each.adapted]),
        ]
        made: dict[int, Edit] = {}
        for sparsity, pool in pools:
            if not pool or (not sparsity and self.pattern is None):
                continue
            masks = self._masks(pool, sparsity, partial(self._scores, norms=norms))
            for (number, each), mask in zip(pool, masks, strict=True):
                made[number] = Mask.of(each.name, each.site, mask)
                if progress is not None:
                    progress(len(made), len(found), each.label)
        edits = tuple(made[number] for number in sorted(made))
        return Draft(edits, report=_counts(edits))

    def _check_updates(self, found: list[Prunable]) -> None:
        """Raises FfnkitError where weights would go by updates that are all zero."""
        updated = [each for each in found if each.adapted]
        needed = bool(updated) and self.mode in OF_UPDATE and self.adapted_sparsity != 0
        if needed and not any(bool(self._update(each).any()) for each in updated):
            which = "low-rank parts of the updates" if self.mode in OF_LOW_RANK else "updates"
            what = f"the {which} are all zero, so they tell no weights apart"
            raise FfnkitError(f"mode {self.mode}", what, "Tune first, or choose mode W")

    def _update(self, each: Prunable) -> Tensor:
        """What the mode sees of an update."""
        return each.update(low_rank=self.mode in OF_LOW_RANK)

    def _scores(self, place: int, each: Prunable, norms: dict[str, Tensor]) -> Tensor:
        """Float32 at least, as the weight lies in (.., out, in); the lowest go. Zeros that are there come first."""
        weight = each.weight()
        mode = self.mode if each.adapted else {"magnitude": "W", "wanda": "W", "random": "random"}[self.by]
        score = _score(mode, weight, self._update(each) if each.adapted else None, generator(self.seed, place))
        if each.label in norms and mode != "random":
            score = score * norms[each.label].to(score)[..., None, :]
        return score.masked_fill_(each.gone(weight), -torch.inf)

    def _masks(self, pool: Pool, sparsity: float, scores: Callable[[int, Prunable], Tensor]) -> Iterator[Tensor]:
        scope = ("row" if self.by == "wanda" else "global") if self.scope == "auto" else self.scope
        if self.pattern is None and scope == "global":
            total = sum(each.numel for _, each in pool)
            kind = max((each.dtype for _, each in pool), key=lambda dtype: dtype.itemsize)
            yield from lowest(lambda: (scores(*given).to(kind) for given in pool), round(sparsity * total))
            return
        for given in pool:
            score = scores(*given)
            if self.pattern is not None:
                yield lowest_of_groups(score, *read_pattern(self.pattern))
            elif scope == "row":
                yield lowest_of_rows(score, round(sparsity * score.shape[-1]))
            else:
                yield _by_matrix(score, sparsity)


def _by_matrix(score: Tensor, sparsity: float) -> Tensor:
    """The mask of one weight, or of each expert's, by its own scores."""
    parts = list(score) if score.ndim == 3 else [score]
    masks = [next(lowest(partial(list, [part]), round(sparsity * part.numel()))) for part in parts]
    return torch.stack(masks) if score.ndim == 3 else masks[0]


def _score(mode: str, weight: Tensor, update: Tensor | None, draw: torch.Generator) -> Tensor:
    """The score of each weight by one of the modes, in memory of its own.

    Args:
        update: what the mode sees of it.
    """
    if mode == "random":
        return torch.rand(weight.shape, generator=draw, dtype=weight.dtype).to(weight.device)
    if mode == "W":
        return weight.abs()
    assert update is not None
    seen = (weight + update if mode.startswith("W") else update).abs()
    return seen.neg_() if mode.startswith("N") else seen


def _counts(edits: Iterable[Edit]) -> dict[str, int]:
    """How many weights are zero, of how many."""
    counts = [edit.zeros for edit in edits if edit.zeros is not None]
    return {"zeros": sum(zeros for zeros, _ in counts), "weights": sum(total for _, total in counts)}
