"""How alike two layers' features are: centred kernel alignment (CKA), computed from the features themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnkit.ops.matching import ROWS, Spread, correlation, spread


def gram_norm(x: Tensor, y: Tensor, of_x: Spread | None = None, of_y: Spread | None = None) -> float:
    """||X^T Y||_F^2 of centred features (n, p) and (n, q), on the same n tokens.

    Centred in float64, products in float32, summed in float64 slice by slice.
    """
    of_x, of_y = of_x or spread(x), of_y or spread(y)
    products = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for mine, other in zip(x.split(ROWS), y.split(ROWS), strict=True):
        products += (_centred(mine, of_x).T @ _centred(other, of_y)).cpu()
    return products.square().sum().item()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features (n, p) and (n, q) on the same n tokens: 0 unlike, 1 equal up to rotation and scale.

    ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred. Features that never change have none: 0.

    Source: Kornblith et al., Similarity of neural network representations revisited (arXiv 1905.00414).
    """
    of_x, of_y = spread(x), spread(y)
    own = gram_norm(x, x, of_x, of_x) * gram_norm(y, y, of_y, of_y)
    return gram_norm(x, y, of_x, of_y) / own**0.5 if own > 0 else 0.0


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """CKA with the unbiased estimate of HSIC: near 0 for independent features, whatever their number; n above 3.

    With K = X X^T and L = Y Y^T, their diagonals set to zero:
    HSIC = (tr(K L) + (1 K 1)(1 L 1) / ((n - 1)(n - 2)) - 2 (1 K L 1) / (n - 2)) / (n (n - 3)).
    Every term follows from X^T Y and from sums over rows, so no n x n matrix is formed.

    Source: Song et al., Feature selection via dependence maximization (JMLR 2012), equation 5.
    """
    of_x, of_y = spread(x), spread(y)
    own = unbiased_hsic(x, x, of_x, of_x) * unbiased_hsic(y, y, of_y, of_y)
    return unbiased_hsic(x, y, of_x, of_y) / own**0.5 if own > 0 else 0.0


def unbiased_hsic(x: Tensor, y: Tensor, of_x: Spread | None = None, of_y: Spread | None = None) -> float:
    """The unbiased estimate of HSIC with linear kernels (see :func:`unbiased_cka`); centring changes it not."""
    of_x, of_y = of_x or spread(x), of_y or spread(y)
    n = len(x)
    if n < 4:
        return 0.0
    diagonal = across = 0.0
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]  # 1 K 1 and 1 L 1, diagonals left out
    total_x, total_y = _total(x, of_x), _total(y, of_y)
    for mine, other in zip(x.split(ROWS), y.split(ROWS), strict=True):
        a, b = _centred(mine, of_x).double().cpu(), _centred(other, of_y).double().cpu()
        own_a, own_b = a.square().sum(1), b.square().sum(1)
        row_a, row_b = a @ total_x - own_a, b @ total_y - own_b  # K 1 and L 1
        diagonal += (own_a * own_b).sum().item()
        across += (row_a * row_b).sum().item()
        sums[0] += row_a.sum()
        sums[1] += row_b.sum()
    trace = gram_norm(x, y, of_x, of_y) - diagonal
    middle = (sums[0] * sums[1]).item() / ((n - 1) * (n - 2))
    return (trace + middle - 2 * across / (n - 2)) / (n * (n - 3))


def correlation_norm(x: Tensor, y: Tensor, of_x: Spread | None = None, of_y: Spread | None = None) -> float:
    """The sum of squares of all correlations of columns of features (n, p) and (n, q): ||X^T Y||_F^2, standardized."""
    return correlation(x, y, of_x, of_y).square().sum(dtype=torch.float64).item()


def standardized_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features whose columns all have one variance, so that no large one hides the others."""
    of_x, of_y = spread(x), spread(y)
    own = correlation_norm(x, x, of_x, of_x) * correlation_norm(y, y, of_y, of_y)
    return correlation_norm(x, y, of_x, of_y) / own**0.5 if own > 0 else 0.0


def rbf_gram(x: Tensor) -> Tensor:
    """The centred Gram matrix (n, n), float32, of features (n, p) under exp(-d^2 / (2 m)), m the median of all d^2.

    Features that never change give zeros.

    Source: Kornblith et al. (arXiv 1905.00414), section 3, with the median distance as bandwidth.
    """
    squares = torch.cdist(x.double(), x.double()).square()
    median = squares.flatten().median()
    if median <= 0:
        return torch.zeros_like(squares).float()
    gram = torch.exp(-squares / (2 * median))
    mean = gram.mean(dim=0)
    return (gram - mean - mean[:, None] + mean.mean()).float()


def gram_cka(one: Tensor, other: Tensor) -> float:
    """CKA of two centred Gram matrices on the same examples; 0 where one is zero."""
    own = (one.norm().double() * other.norm().double()).item()
    return float((one * other).sum(dtype=torch.float64)) / own if own > 0 else 0.0


def _total(x: Tensor, of: Spread) -> Tensor:
    """The sum of the centred rows: zero but for rounding."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for rows in x.split(ROWS):
        total += _centred(rows, of).double().sum(0).cpu()
    return total


def _centred(rows: Tensor, of: Spread) -> Tensor:
    return (rows.double() - of.mean.to(rows.device)).float()
