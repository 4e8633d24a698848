"""Settings of the methods whose edits train, which tuners have too. Light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from ffnkit.settings import Doc, WhichLayers
from ffnkit.settings.presets import Preset

Part = Literal["head", "biases", "norms", "attention", "embeddings", "rest"]
PARTS: tuple[str, ...] = get_args(Part)


@dataclass(frozen=True)
class SparseGradSettings:
    """Of ``fk.SparseGrad``, and of the tuners sparsegrad, mask and meprop."""

    density: Annotated[float, Doc("share of each weight's entries that train.", above=0, at_most=1)] = 0.01
    count: Annotated[int | None, Doc("number of entries of each weight instead.", at_least=1)] = None
    selection: Annotated[
        Literal["fixed", "refresh", "step", "masked-gradient"],
        Doc(
            '"fixed" chooses once; "refresh" anew after each ``every`` steps, the optimizer\'s state '
            'goes along; "step" at each step, and SparseAdam steps on these entries alone, as in the paper; '
            '"masked-gradient" at each step, and the optimizer goes over the whole core, where entries once chosen '
            "move on. Both hold numbers and moments for the whole core."
        ),
    ] = "fixed"
    basis: Annotated[
        Literal["shared", "layer", "none"],
        Doc('one for all layers of a type ("shared"), one for each weight ("layer"), or "none": the weight\'s own.'),
    ] = "shared"
    core: Annotated[
        float,
        Doc(
            "entries of a weight are taken from a leading rectangle of the basis, the cheapest that "
            "keeps this share of the energy that a free choice of as many entries has on the last "
            "quarter of the batches; 1.0 confines nothing.",
            above=0,
            at_most=1,
        ),
    ] = 0.97
    choose: Annotated[
        Literal["gradient", "magnitude", "random"],
        Doc('entries by the energy of their gradient, by the "magnitude" of the weight, or at "random".'),
    ] = "gradient"
    by: Annotated[Literal["layer", "all"], Doc('the count is one of each layer, or of "all" layers together.')] = (
        "layer"
    )
    targets: Annotated[str, Doc('"ffn", "attention", "all", or a regular expression over module names.')] = "ffn"
    layers: Annotated[WhichLayers, Doc("of which layers FFNs are taken.")] = "all"
    batches: Annotated[
        int,
        Doc(
            "most batches that are read: a third of them for the bases, the others for the choice of entries; all for "
            "the bases where each step chooses in the whole of them.",
            at_least=1,
        ),
    ] = 5
    every: Annotated[int, Doc("steps between refreshes.", at_least=1)] = 100
    modules_to_train: Annotated[
        Sequence[str],
        Doc("parts of the model that train too: head, biases, norms, attention, embeddings, rest.", choices=PARTS),
    ] = ("head",)
    seed: Annotated[int, Doc("of random choices.", at_least=0)] = 0
    preset: Annotated[Literal["paper"] | None, Doc("values for what is not given.")] = None

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "SparseGrad (arXiv 2410.07383), GLUE",
            {
                "density": 0.01,
                "count": None,
                "selection": "step",
                "basis": "shared",
                "core": 1.0,
                "choose": "gradient",
                "by": "layer",
                "targets": "ffn",
                "layers": "all",
                "batches": 30,
                "modules_to_train": ("head", "rest"),
            },
        )
    }


@dataclass(frozen=True)
class DseeSettings:
    """Of ``fk.DSEE`` and the tuner dsee."""

    rank: Annotated[int, Doc("of U V; 0 trains the entries alone.", at_least=0)] = 16
    alpha: Annotated[float, Doc("all of the update is scaled by alpha / rank (by alpha with rank 0).", above=0)] = 32
    nonzeros: Annotated[int, Doc("number of entries of S2 in each weight; 0 trains U V alone.", at_least=0)] = 64
    targets: Annotated[
        str, Doc('"qv" (query and value), "ffn", "attention", "all", or a regular expression over module names.')
    ] = "qv"
    support: Annotated[
        Literal["svd", "grebsmo", "gradient", "magnitude", "random"],
        Doc(
            "which entries: the largest of what a truncated SVD of this rank leaves of the weight "
            '("svd"), of the sparse part of its decomposition by "grebsmo", of its own ("magnitude"),'
            ' of summed squares of its "gradient" on batches with labels, or "random" ones.'
        ),
    ] = "svd"
    density: Annotated[
        float | None,
        Doc("share of each weight's entries that train, instead of nonzeros.", above=0, at_most=1, example=0.001),
    ] = None
    layers: Annotated[WhichLayers, Doc("of which layers query and value, and FFNs, are taken.")] = "all"
    lora: Annotated[
        str | Path | None, Doc("a folder with a peft LoRA adapter that U and V start from, with its ranks and scales.")
    ] = None
    batches: Annotated[int, Doc("most batches that are read.", at_least=1)] = 30
    modules_to_train: Annotated[
        Sequence[str],
        Doc("parts of the model that train too: head, biases, norms, attention, embeddings, rest.", choices=PARTS),
    ] = ("head",)
    seed: Annotated[int, Doc("of V, random entries and randomized decompositions.", at_least=0)] = 0
    preset: Annotated[Literal["paper"] | None, Doc("values for what is not given.")] = None

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "DSEE (arXiv 2111.00160), scripts of the released code",
            {
                "rank": 16,
                "alpha": 32,
                "nonzeros": 16,
                "targets": "qv",
                "support": "grebsmo",
                "density": None,
                "modules_to_train": ("head",),
            },
        )
    }
