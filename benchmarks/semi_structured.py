"""A linear with 2:4 zeros through torch's semi-structured kernels beside the dense one; needs a CUDA device.

    python benchmarks/semi_structured.py [--shape 4096x11008 ...] [--tokens 1 512 4096] [--dtype float16] [--out FOLDER]

Both compute y = W x with the same W, pruned by magnitude as ``Prune(pattern="2:4")`` does. Milliseconds: the median of
many runs between CUDA events, the two in turn, so that other work falls on both alike. Bytes: of the weight in either
form. Without CUDA nothing is measured, and the program says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ("768x768", "3072x768", "4096x4096", "11008x4096")
TOKENS = (1, 64, 512, 4096)
DTYPES = ("float16", "bfloat16")
ROUNDS, WARM = 50, 10


def measure(out: int, inner: int, tokens: int, dtype: str) -> dict[str, Any]:
    """Dense against 2:4 for one weight (out, in) and so many tokens.

    Raises:
        RuntimeError: no CUDA device, or torch's kernels do not take this shape.
    """
    import torch
    from torch.sparse import to_sparse_semi_structured

    from ffnkit.ops.masks import lowest_of_groups

    if not torch.cuda.is_available():
        raise RuntimeError("torch's semi-structured kernels run on CUDA devices only, and there is none")
    generator = torch.Generator("cuda").manual_seed(0)
    kind = {"device": "cuda", "dtype": getattr(torch, dtype)}
    weight = torch.randn(out, inner, generator=generator, **kind)
    weight *= lowest_of_groups(weight.float().abs(), 2, 4)
    x = torch.randn(tokens, inner, generator=generator, **kind)
    packed = to_sparse_semi_structured(weight)
    linear = torch.nn.functional.linear
    error = ((linear(x, packed).float() - linear(x, weight).float()).norm() / linear(x, weight).float().norm()).item()
    dense, sparse = _milliseconds([lambda: linear(x, weight), lambda: linear(x, packed)])
    inside = [getattr(packed, name) for name in packed.__tensor_flatten__()[0]]
    return {
        "shape": f"{out}x{inner}",
        "tokens": tokens,
        "dtype": dtype,
        "dense_ms": dense,
        "sparse_ms": sparse,
        "speed_up": dense / sparse,
        "dense_bytes": weight.numel() * weight.element_size(),
        "sparse_bytes": sum(part.numel() * part.element_size() for part in inside),
        "relative_error": error,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _milliseconds(calls: list[Callable[[], Any]]) -> list[float]:
    """The median time of each call, taken in turn."""
    import torch

    times: list[list[float]] = [[] for _ in calls]
    for number in range(WARM + ROUNDS):
        for call, own in zip(calls, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if number >= WARM:
                own.append(start.elapsed_time(end))
    return [statistics.median(own) for own in times]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--out", type=Path, help="also write semi_structured.json there")
    options = parser.parse_args(argv)
    rows = []
    for shape in options.shape:
        out, inner = map(int, shape.split("x"))
        for tokens in options.tokens:
            try:
                row = measure(out, inner, tokens, options.dtype)
            except RuntimeError as error:
                print(f"{shape}, {tokens} tokens: not measured: {error}")
                if "CUDA devices only" in str(error):
                    return 0
                continue
            rows.append(row)
            print(
                f"{shape}, {tokens} tokens: dense {row['dense_ms']:.3f} ms, 2:4 {row['sparse_ms']:.3f} ms,"
                f" {row['speed_up']:.2f} times as fast, {row['sparse_bytes'] / row['dense_bytes']:.2f} of the bytes"
            )
    if options.out is not None and rows:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "semi_structured.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
