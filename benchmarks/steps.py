"""What the benchmarks of a training step share: variants that take turns, memory of each in its own process, pages.

A step is forward, backward from a fixed gradient of the output, and AdamW; inputs take part in the backward pass, as
below other layers. Seconds: every variant is built once, then all of them take a step each, again and again in an order
drawn anew, so that other work on the machine falls on all alike; the fewest seconds count, and the median of the ratios
within a round stands beside them. Memory: each variant has a process of its own; peak beyond what was loaded before
the model was built, so weights, gradients, moments and what backward needs are all in it. Saved for backward: bytes of
all tensors kept, once each, without parameters and buffers.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, synchronizer

ROUNDS = {512: 30, 2048: 12, 8192: 5}
Make = Callable[[str, int], Any]  # the model of a variant at a width, ready to train


# ------------------------------------------------------------------------------------------ inside the process
def stepper(model: Any, tokens: int, options: argparse.Namespace, d: int = 768) -> Callable[..., None]:
    """A call that takes one step; its argument wraps the forward pass."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    draw, length = torch.Generator().manual_seed(1), min(options.length, tokens)
    place = {"device": options.device, "dtype": getattr(options, "dtype", torch.float32)}
    x, grad = (torch.randn(tokens // length, length, d, generator=draw).to(**place) for _ in range(2))
    x.requires_grad_(True)
    plain = isinstance(model, torch.nn.Sequential)

    def step(around: Any = None) -> None:
        with around or nullcontext():
            y = model(x) if plain else model(inputs_embeds=x).last_hidden_state
        y.backward(grad)
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_time(make: Make, tokens: int, options: argparse.Namespace, against: str) -> list[dict[str, Any]]:
    """Seconds of a step of every variant of ``options``, round by round, and ratios to the variant ``against``."""
    import torch

    sync = synchronizer(options.device)
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for variant in options.variant:
        model = make(variant, 768)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[variant] = {"case": options.case[0], "tokens": tokens, "variant": variant, "trained": trained}
        steps[variant] = stepper(model, tokens, options)
        steps[variant]()  # moments, caches
    clock: dict[str, list[float]] = {variant: [] for variant in steps}
    busy: dict[str, list[float]] = {variant: [] for variant in steps}
    order = random.Random(0)
    for _ in range(options.rounds or ROUNDS.get(tokens, 10)):
        for variant in order.sample(list(steps), len(steps)):
            sync()
            start, used = time.perf_counter(), time.process_time()
            steps[variant]()
            sync()
            clock[variant].append(time.perf_counter() - start)
            busy[variant].append(time.process_time() - used)
    for variant, row in rows.items():
        row |= {"threads": torch.get_num_threads(), "load_average": load_average(), "rounds": len(clock[variant])}
        row |= {"seconds": min(clock[variant]), "median_seconds": statistics.median(clock[variant])}
        row["processor_seconds"] = min(busy[variant])
        if against in clock:
            pairs = zip(clock[variant], clock[against], strict=True)
            row["ratio"] = row["seconds"] / min(clock[against])
            row["median_ratio"] = statistics.median(a / b for a, b in pairs)
    return list(rows.values())


def measure_memory(make: Make, tokens: int, options: argparse.Namespace, wide: int) -> dict[str, Any]:
    """Peak and saved bytes of the first variant of ``options`` in this process.

    ``wide``: of the linears, whose products have workspaces. "kept": entries of each two-dimensional tensor saved.
    """
    import torch

    variant = options.variant[0]
    for _ in range(2):  # libraries are loaded and warm
        stepper(make(variant, 64), options.length, options, d=64)()
    for shape in ((768, wide), (wide, 768)):  # workspaces of products of this size
        torch.randn(tokens, shape[0], device=options.device) @ torch.randn(shape, device=options.device)
    base = loaded_bytes(options.device)
    model = make(variant, 768)
    step = stepper(model, tokens, options)
    loaded = loaded_bytes(options.device)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, int]] = {}

    def pack(tensor: Any) -> Any:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), part.numel() if part.ndim == 2 else 0)
        return tensor

    spent = cost(lambda: [step() for _ in range(3)], base, options.device)
    step(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    row = {"model_bytes": loaded - base, "peak_bytes": spent.peak_bytes, "peak_exact": spent.exact}
    return row | {"saved_bytes": sum(size for size, _ in kept.values()), "kept": [count for _, count in kept.values()]}


# ----------------------------------------------------------------------------------------- outside the process
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that these benchmarks share."""
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, help=f"default by tokens: {ROUNDS}")
    parser.add_argument("--no-memory", action="store_true", help="seconds only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)


def passed_on(options: argparse.Namespace) -> list[str]:
    """The options that a worker needs too."""
    given = ["--blocks", str(options.blocks), "--length", str(options.length), "--device", options.device]
    return given + (["--rounds", str(options.rounds)] if options.rounds else [])


@contextmanager
def exact_allocation() -> Iterator[None]:
    """Processes started here map every tensor of its own: freed ones leave, so that peaks are those of the tensors."""
    names = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def measure(
    file: str, case: str, tokens: int, variants: list[str], same: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one case: seconds of all variants from one process of ``file``, memory of each from its own."""
    print(f"{case}, {tokens} tokens ...", file=sys.stderr, flush=True)
    given = [*same, "--case", case, "--tokens", str(tokens), "--variant"]
    rows: Any = in_process(file, "time", *given, *variants, threads=options.threads)
    for row in rows if not options.no_memory else ():
        with exact_allocation():
            row |= in_process(file, "memory", *given, row["variant"], threads=options.threads)
    return rows


def shown(row: dict[str, Any], peaks: list[int | None]) -> list[str]:
    """Cells of a table's row: variant, trained, seconds, their ratios, peak, its ratios to ``peaks``, saved."""
    peak, ratio = row.get("peak_bytes"), row.get("ratio")
    cells = [row["variant"], f"{row['trained']:,}", f"{row['seconds'] * 1e3:,.0f} ms"]
    cells += [f"{ratio:.2f}", f"{row['median_ratio']:.2f}"] if ratio else ["", ""]
    cells.append(f"{peak / 2**20:,.0f} MiB" if peak else "")
    cells += [f"{peak / other:.2f}" if peak and other else "" for other in peaks]
    return [*cells, f"{row['saved_bytes'] / 2**20:,.0f} MiB" if "saved_bytes" in row else ""]


def page(results: dict[str, Any], head: list[str], parts: dict[str, list[str]]) -> str:
    """A page of a head, titled parts, and the machine."""
    lines = list(head)
    for title, body in parts.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *body]
    lines += ["", *footer(results, results["threads"]), f"- Device: {results['device']}."]
    lines.append(f"- Load average, start and end: {', '.join(f'{value:.1f}' for value in results['load'] if value)}.")
    return "\n".join(lines) + "\n"


def of_each_case(results: dict[str, Any], titles: dict[str, str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each case at each number of tokens."""
    for case, title in titles.items():
        for tokens in sorted({row["tokens"] for row in results["rows"] if row["case"] == case}):
            rows = [row for row in results["rows"] if (row["case"], row["tokens"]) == (case, tokens)]
            yield f"{title}, {tokens:,} tokens", rows
