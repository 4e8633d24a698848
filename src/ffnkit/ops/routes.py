"""The cheapest order of the products that a weight with an update in a basis takes, by the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

PASS = 20  # one more pass over a tensor costs about as much as so many multiplications for each of its numbers

Thin = Literal["left", "right"]
Meets = Literal["tokens", "weight"]
Gradient = Literal["turned", "late", "early"]


@dataclass(frozen=True)
class Route:
    """How y = (W + V^T S U) x and its gradients are computed; W (out, in), S (r, c), n tokens.

    Attributes:
        thin: the update as a product of two thin matrices, (V^T S) U ("left") or V^T (S U) ("right"); the one with S in
            it is formed once and kept for the backward pass.
        forward, backward: the thin matrices meet the "tokens", or are put into the "weight" first; for outputs, and
            for the gradient of the inputs.
        gradient: of S, in one of three orders: "turned", (V gY)^T (U X); "late", V (gY^T (U X)); "early",
            ((V gY)^T X) U^T, for which X itself is kept for the backward pass.
        cost: multiplications beyond those of the frozen weight.
    """

    thin: Thin
    forward: Meets
    gradient: Gradient
    backward: Meets
    cost: int


@lru_cache(maxsize=4096)
def route(out: int, inner: int, r: int, c: int, tokens: int) -> Route:
    """The cheapest of all ways."""
    meets: tuple[Meets, ...] = ("tokens", "weight")
    ways = product(get_args(Thin), meets, get_args(Gradient), meets)
    return min((_route(out, inner, r, c, tokens, *way) for way in ways), key=lambda found: found.cost)


def _route(
    out: int, inner: int, r: int, c: int, n: int, thin: Thin, forward: Meets, gradient: Gradient, backward: Meets
) -> Route:
    left = thin == "left"
    k = c if left else r
    cost = r * c * (out if left else inner)
    cost += {"turned": n * r * c, "late": n * out * c + r * out * c, "early": n * r * inner + r * inner * c}[gradient]
    if gradient != "early" or (left and forward == "tokens"):
        cost += n * c * inner  # U X
    if gradient != "late" or (not left and backward == "tokens"):
        cost += n * r * out  # V gY
    into = out * k * inner + 2 * PASS * out * inner
    if forward == "tokens":
        cost += n * out * (k + PASS) + (0 if left else n * k * inner)
    if backward == "tokens":
        cost += n * inner * (k + PASS) + (n * k * out if left else 0)
    cost += into * ((forward == "weight") + (backward == "weight"))
    return Route(thin, forward, gradient, backward, cost)
