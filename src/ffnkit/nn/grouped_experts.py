"""Experts of widths that the grouped product of torch, which transformers runs them by, does not bear."""

from __future__ import annotations

from typing import Any


def grouped_step(weight: Any) -> int:
    """Of what the widths of experts in a 3-D parameter must be a multiple for torch's grouped product: 16 bytes."""
    return max(16 // weight.element_size(), 1)


def are_uneven(model: Any) -> bool:
    """Whether experts are of a width, or in float64, that the grouped product refuses."""
    weights = [p for name, p in model.named_parameters() if name.endswith(".down_proj") and p.ndim == 3]
    return any(p.element_size() > 4 or any(size % grouped_step(p) for size in p.shape[1:]) for p in weights)


def run_uneven_experts(model: Any) -> bool:
    """Have experts run by their own loop where one is of a width, or in float64, that the grouped product refuses.

    True where the model's ``experts_implementation`` was changed for it, from ``grouped_mm`` to ``eager``.
    """
    return are_uneven(model) and run_by_loop(model)


def run_by_loop(model: Any) -> bool:
    """Have experts that run by the grouped product run by their own loop; True where some did."""
    known: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
    if "grouped_mm" in known.values():
        model.set_experts_implementation("eager")
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        for own in configs:  # some have one of their layer
            if getattr(own, "_experts_implementation", None) == "grouped_mm":
                own._experts_implementation = "eager"
    return "grouped_mm" in known.values()
