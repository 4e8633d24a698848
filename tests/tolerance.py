"""The one way that tests compare tensors."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; the plain norm of the difference where expected is zero."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error / scale if scale > 0 else error


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, rel: float = 1e-6, what: str = "tensors") -> None:
    """Assert that the relative error is at most ``rel`` (NaN never is)."""
    error = relative_error(actual, expected)
    assert error <= rel, f"{what}: relative error {error:.3g} is above {rel:.3g}"


def assert_differs(actual: torch.Tensor, expected: torch.Tensor, *, rel: float = 1e-3, what: str = "tensors") -> None:
    """The negative control: assert that the relative error is above ``rel``."""
    error = relative_error(actual, expected)
    assert error > rel, f"{what}: relative error {error:.3g} should be above {rel:.3g}"
