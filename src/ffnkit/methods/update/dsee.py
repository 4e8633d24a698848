"""DSEE: a low-rank and a sparse update of each weight train; the weight itself stays."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept, telling
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.calibration.statistics import GradientSquares
from ffnkit.edits import Edit, Train, UpdateLinear
from ffnkit.errors import FfnkitError
from ffnkit.io.files import spool
from ffnkit.io.peft_files import Lora, read_lora
from ffnkit.methods.common import Batch, generator, need_data, plain_linears
from ffnkit.model.targets import query_value
from ffnkit.nn.dsee import index_dtype
from ffnkit.nn.quantized import float_weight, is_quantized_linear, quantized_features
from ffnkit.ops import support
from ffnkit.plans import Draft, Progress
from ffnkit.settings import check, renamed, told
from ffnkit.settings.presets import with_presets
from ffnkit.settings.updates import DseeSettings

IN_MEMORY = 1 << 30  # bytes of summed squares while planning; more lie in files that are memory-mapped


@renamed(sites="targets", also="modules_to_train", share="density")
@with_presets
@dataclass(frozen=True)
class DSEE(DseeSettings):
    """Train a low-rank update and single entries of each weight, beside the frozen weight.

    W x becomes (W + alpha / rank (U V + S2)) x; U, V and the chosen entries of S2 train. After ``fk.apply`` any
    optimizer over ``fk.trainable_parameters(model)`` trains; ``fk.fold`` puts the update into the weights.

    Source: DSEE (arXiv 2111.00160), section 3.2 and the released code: V normal of deviation 0.02, U and S2 zero.
    Differs: a linear that holds query, key and value has one U V over the rows of query and value, and the entries
        that each of the two would have alone.
    """

    name: ClassVar[str] = "dsee"
    summary: ClassVar[str] = "train a low-rank update and single entries of each weight"
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2111.00160"

    @property
    def needs_data(self) -> bool:
        """Whether gradients are needed to choose entries by."""
        return self.support == "gradient" and (self.nonzeros > 0 or self.density is not None)

    def settings(self) -> dict[str, Any]:
        return told(self)

    def check(self) -> None:
        """Raises FfnkitError on settings out of range."""
        check(self)
        if self.rank == 0 and self.nonzeros == 0 and self.density is None:
            raise FfnkitError("rank 0 and nonzeros 0", "nothing would train", "Give a rank or nonzeros")

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linears by name. Raises FfnkitError where the settings do not fit the model."""
        self.check()
        found, asked = plain_linears(model, self.name, self.targets, self.layers), f"dsee on {type(model).__name__}"
        for name, linear in found.items():
            if any(p.is_meta for p in linear.parameters()):
                raise FfnkitError(asked, "the model is empty (meta device)", "Load the weights first")
            if self.needs_data and is_quantized_linear(linear):
                what = f"{name} is quantized, and has no gradient of its own"
                raise FfnkitError(f"{asked}: support gradient", what, "Take support svd")
        return found

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        started = time.perf_counter()
        linears = self.chosen(model)
        lora = Lora() if self.lora is None else read_lora(self.lora).placed(model, linears)
        batches = kept(islice(need_data(data, self.name, beyond="gradients"), self.batches)) if self.needs_data else []
        squares = self._squares(model, linears, batches, progress) if batches else {}
        roles = query_value(model, self.layers) if self.targets == "qv" else {}
        edits: list[Edit] = []
        for number, (name, linear) in enumerate(linears.items()):
            edits.append(self._edit(name, linear, roles.get(name, []), lora, squares.pop(name, None)))
            if progress is not None:
                progress(number + 1, len(linears), name)
        edits.append(Train("", parts=list(self.modules_to_train), values=lora.beside))
        return Draft(tuple(edits), {}, {"batches": len(batches), "seconds": time.perf_counter() - started})

    def _edit(self, name: str, linear: Any, roles: list[Tensor], lora: Lora, squares: Tensor | None) -> UpdateLinear:
        """The update of one linear."""
        out, inner = quantized_features(linear)
        given: dict[str, Any] = {"rank": self.rank, "alpha": float(self.alpha)}
        rows = torch.cat(roles).sort().values.int() if roles else None
        parts: dict[str, Tensor] = {}
        if name in lora.layers:
            down, up, scale = lora.layers[name]
            given = {"rank": len(down), "alpha": scale * len(down)}
            parts = {"up": up, "down": down}
            if rows is not None and bool(up.index_fill(0, rows.long(), 0).any()):
                rows = None  # the adapter updates the key too
            elif rows is not None:
                parts["up"] = up[rows.long()].contiguous()
        elif self.rank:
            given["seed"] = generator(self.seed, zlib.crc32(name.encode())).initial_seed()
        trained = given["rank"] * ((out if rows is None else len(rows)) + inner)
        if rows is not None and given["rank"]:
            parts["rows"] = rows
        places = [self._support(name, linear, of, squares) for of in roles or [None]]  # type: ignore[list-item]
        index = torch.cat(places).sort().values
        if len(index):
            parts["index"] = index.to(index_dtype(out, inner))
        given |= {"trained": trained + len(index)}
        return UpdateLinear(name, layer="dsee", given=given, parts=parts, shape=[out, inner])

    def _support(self, name: str, linear: Any, rows: Tensor | None, squares: Tensor | None) -> Tensor:
        """The flat places of the entries, of these rows alone."""
        out, inner = quantized_features(linear)
        tall = out if rows is None else len(rows)
        count = self.nonzeros if self.density is None else max(1, round(self.density * tall * inner))
        count = min(count, tall * inner)
        if count == 0:
            return torch.zeros(0, dtype=torch.int64)
        draw = generator(self.seed, zlib.crc32(name.encode()), 1 if rows is None else 2 + int(rows[0]))
        if self.support == "random":
            found = support.drawn(tall * inner, count, draw)
        else:
            weight = squares if squares is not None else float_weight(linear)
            weight = weight if rows is None else weight[rows.to(weight.device)]
            try:
                found = self._chosen(weight, count, draw.initial_seed()).cpu()
            except ValueError as error:
                raise FfnkitError(f"the support of {name}", str(error), "Check the weights, or take random") from None
        return found if rows is None else rows[found // inner] * inner + found % inner

    def _chosen(self, weight: Tensor, count: int, seed: int) -> Tensor:
        if self.support == "gradient":
            return support.largest(weight, count)
        if self.support == "magnitude":
            return support.magnitude(weight, count)
        if self.support == "svd":
            return support.svd(weight, self.rank, count, seed)
        return support.grebsmo(weight, count, seed=seed)

    def _squares(
        self, model: nn.Module, linears: dict[str, nn.Module], batches: list[Batch], progress: Progress | None
    ) -> dict[str, Tensor]:
        """Summed squares of each weight's gradients, (out, in) float32."""
        sizes = {name: quantized_features(linear) for name, linear in linears.items()}
        large = 4 * sum(out * inner for out, inner in sizes.values()) > IN_MEMORY
        sums = {n: GradientSquares(partial(spool, s, torch.float32) if large else None) for n, s in sizes.items()}
        given = telling(batches, progress, "gradients")
        weight_gradients(model, given, linears, lambda name, gradient: sums[name].update(gradient))
        # a module that no batch reached has no gradient: all of its entries are alike
        return {name: each.sums.get("squares", torch.zeros(sizes[name])) for name, each in sums.items()}
