"""One line for each method and each tuner: its name and an instance with settings that suit the small models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from families import FAMILIES

import ffnkit as fk
from ffnkit import methods
from ffnkit.testing import Case

METHODS: dict[str, Callable[..., Any]] = {
    "fusion": lambda **more: fk.Fusion(**{"width": 0.5, "seed": 0, "restarts": 1} | more),
}

# The others share everything but the choice of neurons: one family of each kind of FFN shows that.
KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "switch", "mixtral", "llama4", "albert")
OTHERS: dict[str, Callable[..., Any]] = {
    "calibrated-fusion": lambda **more: fk.CalibratedFusion(**{"width": 0.5, "refine": 3} | more),
    "clustering": lambda **more: methods.build("clustering", **{"width": 0.5, "restarts": 1} | more),
    "sketch": lambda **more: methods.build("sketch", **{"width": 0.5, "keep": 3} | more),
    "svd": lambda **more: methods.build("svd", **{"width": 0.5} | more),
    "svd whitened": lambda **more: methods.build("svd", **{"width": 0.5, "whiten": True} | more),
    "mmd": lambda **more: methods.build("mmd", **{"width": 0.5, "steps": 3} | more),
    "random": lambda **more: methods.build("random", **{"width": 0.5} | more),
    "magnitude": lambda **more: methods.build("magnitude", **{"width": 0.5} | more),
    "importance": lambda **more: methods.build("importance", **{"width": 0.5} | more),
    "flap": lambda **more: methods.build("flap", **{"width": 0.5} | more),
    "modegpt": lambda **more: methods.build("modegpt", **{"width": 0.5} | more),
    "obs": lambda **more: methods.build("obs", **{"width": 0.5} | more),
    "fusion refitted": lambda **more: fk.Fusion(**{"width": 0.5, "restarts": 1, "refit": True} | more),
    "magnitude refitted": lambda **more: methods.build(
        "magnitude", **{"width": 0.5, "refit": True, "sequential": True} | more
    ),
    "reinit": lambda **more: methods.build("reinit", **{"width": 0.5} | more),
    "unstructured": lambda **more: methods.build("unstructured", **{"width": 0.5} | more),
}

# What does other things than leave each FFN a width.
FURTHER: dict[str, Callable[..., Any]] = {
    "merging": lambda **more: fk.Merging(**{"layers": "0-1"} | more),
    "calibrated-merging": lambda **more: fk.CalibratedMerging(**{"layers": "0-1", "refine": 2} | more),
    "prune": lambda **more: fk.Prune(**{"sparsity": 0.5} | more),
    "heads": lambda **more: fk.RemoveHeads(**{"remove": 1} | more),
    "heads refitted": lambda **more: fk.RemoveHeads(**{"remove": 1, "refit": True} | more),
    "structured": lambda **more: fk.StructuredPruning(**{"remove_heads": 1, "remove_neurons": 0.5} | more),
    "layer-drop": lambda **more: methods.build("layer-drop", **{"layers": "last:1"} | more),
    "ffn-drop": lambda **more: methods.build("ffn-drop", **{"layers": "last:1"} | more),
    "layer-drop refitted": lambda **more: methods.build("layer-drop", **{"layers": "last:1", "refit": True} | more),
    "ffn-drop refitted": lambda **more: methods.build("ffn-drop", **{"layers": "last:1", "refit": True} | more),
    "combined": lambda **more: fk.Combined([fk.Fusion(width=0.5, restarts=1), fk.RemoveHeads(remove=1)]),
    "sparsegrad": lambda **more: fk.SparseGrad(**{"density": 0.1, "batches": 1} | more),
    "dsee": lambda **more: fk.DSEE(**{"rank": 2, "nonzeros": 4} | more),
}
EVERY = METHODS | OTHERS | FURTHER

# What a model does not bear, and is told so: by (method or tuner, family).
REFUSED = {
    ("svd", "mixtral"): "share one 3-D parameter",
    ("svd", "llama4"): "share one 3-D parameter",
    ("svd whitened", "mixtral"): "share one 3-D parameter",
    ("svd whitened", "llama4"): "share one 3-D parameter",
    ("merging", "switch"): "a group of one FFN",
    ("merging", "mixtral"): "one of a mixture of experts",
    ("merging", "llama4"): "a group of one FFN",
    ("merging", "albert"): "layer 1 has no FFN",
    ("calibrated-merging", "switch"): "a group of one FFN",
    ("calibrated-merging", "mixtral"): "one of a mixture of experts",
    ("calibrated-merging", "llama4"): "a group of one FFN",
    ("calibrated-merging", "albert"): "layer 1 has no FFN",
    ("layer-drop", "albert"): "no layer of the stack is left",
    ("layer-drop refitted", "albert"): "no layer of the stack is left",
    ("ffn-drop refitted", "albert"): "it runs 3 times in a pass",
    ("layer-drop refitted", "clip"): "not every reader is a norm",
    ("ffn-drop refitted", "clip"): "not every reader is a norm",
} | {
    (name, family): "3-D parameter"
    for name in (
        "sparsegrad",
        "sparsegrad on data",
        "bottleneck",
        "mask",
        "meprop",
        "meprop of outputs",
        "combined updates",
    )
    for family in ("mixtral", "llama4")
}
REFUSED |= {("flap", family): "no output bias" for family in ("llama", "phi3", "t5", "switch", "mixtral", "llama4")}
REFUSED |= {("prefix", family): "do not bear it" for family in ("t5", "switch", "albert", "clip")}
WITHOUT_BIASES = ("llama", "phi3", "t5", "switch", "mixtral", "llama4")
REFUSED |= {("bitfit", family): "has no bias outside" for family in WITHOUT_BIASES}

TUNERS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "ffn": {"name": "ffn"},
    "bottleneck": {"name": "bottleneck", "size": 3},
    "prefix": {"name": "prefix", "tokens": 2},
    "bitfit": {"name": "bitfit"},
    "head": {"name": "head", "modules_to_train": ["norms"]},  # some of the models have no head
    "lora": {"name": "lora", "rank": 2},
    "sparsegrad": {"name": "sparsegrad", "basis": "none", "selection": "step", "density": 0.1},
    "sparsegrad on data": {"name": "sparsegrad", "density": 0.1, "batches": 1},
    "dsee": {"name": "dsee", "rank": 2, "nonzeros": 4},
    "mask": {"name": "mask", "density": 0.1},
    "meprop": {"name": "meprop", "density": 0.1},
    "meprop of outputs": {"name": "meprop", "of": "outputs", "density": 0.3},
    "combined updates": {"name": "combined", "parts": [{"name": "mask", "density": 0.1}, {"name": "dsee", "rank": 2}]},
}


def case_of(name: str, device: torch.device | None = None) -> Case:
    """A family as the contract's kit wants it, its model made for a device; outputs are compared on the CPU."""
    family = FAMILIES[name]

    def there(model: Any, values: Any) -> Any:
        device = next(model.parameters()).device
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in values.items()}

    def data(model: Any) -> list[dict[str, Any]]:
        return [there(model, batch) for batch in on_cpu(model)]

    def on_cpu(model: Any) -> list[dict[str, Any]]:
        inputs = family.inputs(model)
        if family.kind == "clip":
            return [inputs | {"return_loss": True}]
        labelled = family.model_class.endswith("Classification")
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        return [inputs | {"labels": torch.tensor([0, 1]) if labelled or ids is None else ids}]

    return Case(
        model=lambda: family.model().to(device or "cpu"),
        inputs=lambda model: there(model, family.inputs(model)),
        outputs=lambda model, inputs: {
            key: value.cpu() for key, value in family.outputs(model, inputs, grad=torch.is_grad_enabled()).items()
        },
        data=data,
        name=name,
        other=(lambda: family.model(times=2).to(device or "cpu")) if family.width_keys else None,
    )


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Names for ``parametrize``; all but the fast ones are for ``make test-slow``."""
    fast, names = set(fast), list(names)
    assert fast <= set(names), f"no such names: {fast - set(names)}"
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def crossed(
    *axes: Iterable[Any], always: Iterable[tuple[Any, ...]] = (), but: Iterable[tuple[Any, ...]] = ()
) -> list[Any]:
    """All combinations for ``parametrize``; each value once or more in the fast ones, the rest for the slow tests.

    ``always`` are fast too, and ``but`` are left out.
    """
    lists = [list(axis) for axis in axes]
    fast = [tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))]
    fast += always
    cases = [case for case in dict.fromkeys(itertools.product(*lists)) if case not in but]
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
