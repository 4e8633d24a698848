"""What to run in the first thirty minutes where a GPU is at hand, most telling first; what is there is not run again.

    make gpu                       all of it, into benchmarks/results/gpu
    python benchmarks/gpu.py [--only step-2048 ...] [--toy] [--device cpu] [--list] [--out benchmarks/results/gpu]

1. A training step in bfloat16 of LLaMA blocks at 8 x 1,024 tokens: seconds and peak memory of full tuning of the FFNs,
   LoRA, SHiRA, Super-Tuning, SparseGrad by each selection, a mask and DSEE, at 2048 x 8192 and at 4096 x 11008.
2. Narrowing one such layer to a quarter by every method: seconds and memory.
3. Latency of models with narrowed FFNs beside the floating-point operations that are left.

Each figure has a process of its own and a JSON file of its own, FOLDER/STEP.json, with the device's name; killed, the
list goes on with what is missing. What fails (memory, a library that is not there) is written down as well, and tried
again where --again is given. --toy: tiny shapes, which a CPU does in seconds. A step is forward, backward from a fixed
gradient of the output, and AdamW; seconds are the fewest of several. SparseGrad's bases and coordinates are random:
cost does not depend on which they are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import methods_cost
import sparsegrad_cost
import steps
from common import RESULTS, cost, in_process, loaded_bytes, synchronizer, table

SHAPES = {"2048": (2048, 8192), "4096": (4096, 11008)}
CORE = "960x112"
TUNERS = (
    *("full", "frozen", "lora r 8", f"sparsegrad fixed {CORE}", "dsee", "mask 1%", f"sparsegrad refresh {CORE}"),
    *(f"sparsegrad step {CORE}", f"sparsegrad masked-gradient {CORE}", "shira 1%", "super-tuning 1%"),
)
WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
RANK, ENTRIES, BLOCKS = 16, 64, 2


def plan() -> list[tuple[str, list[str]]]:
    """Names of what is measured, in their order, each with the words for its process."""
    found = [(f"step-{size}-{name}", ["step", size, name]) for size in SHAPES for name in TUNERS]
    latencies = [(f"latency-{width}", ["latency", str(width)]) for width in WIDTHS]
    methods = [(f"narrow-{name}", ["narrow", name]) for name in methods_cost.METHODS]
    return [(re.sub(r"[^a-z0-9.-]+", "-", name).strip("-"), words) for name, words in (*found, *latencies, *methods)]


# ------------------------------------------------------------------------------------------ inside the process
def blocks(size: str, options: argparse.Namespace, width: float = 1.0, count: int = BLOCKS) -> Any:
    """LLaMA blocks of a size with random weights, FFNs of a share of their width."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    d, ff = (64, 176) if options.toy else SHAPES[size]
    shape = {"hidden_size": d, "intermediate_size": round(ff * width), "num_attention_heads": max(1, d // 128)}
    config = LlamaConfig(**shape, num_hidden_layers=count, vocab_size=8, max_position_embeddings=1024, use_cache=False)
    with torch.device(options.device):
        return LlamaModel(config).to(torch.bfloat16)


def tuned(model: Any, name: str) -> Any:
    """The model as a tuner trains it, FFNs alone."""
    found = sparsegrad_cost.linears("llama", model)
    model.requires_grad_(False)
    if name == "full":
        for linear in found.values():
            linear.requires_grad_(True)
    if name != "dsee":
        return sparsegrad_cost.changed(model, "llama", name).train()
    import torch

    from ffnkit.nn.dsee import SparseLowRank

    draw = torch.Generator().manual_seed(0)
    for each, linear in found.items():
        index = torch.randint(linear.weight.numel(), (ENTRIES,), generator=draw).unique()
        model.set_submodule(each, SparseLowRank(linear, rank=RANK, index=index))
    return model.train()


def step(size: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A training step of a tuner: the fewest and the median seconds, and the peak beyond what was there before."""
    import torch

    rows, length = (2, 16) if options.toy else (8, 1024)
    options.length, options.dtype = length, torch.bfloat16
    base = loaded_bytes(options.device)
    model = tuned(blocks(size, options), name)
    held = loaded_bytes(options.device) - base
    sync = synchronizer(options.device)
    one = steps.stepper(model, rows * length, options, d=model.config.hidden_size)
    first = cost(lambda: (one(), one()), base, options.device)
    seconds = []
    for _ in range(2 if options.toy else 10):
        start = time.perf_counter()
        one()
        sync()
        seconds.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = {"trained": trained, "blocks": BLOCKS, "tokens": rows * length, "model_bytes": held}
    row |= {"seconds": min(seconds), "median_seconds": statistics.median(seconds)}
    return row | {"peak_bytes": first.peak_bytes, "peak_exact": first.exact}


def narrow(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Narrowing a layer of 4096 x 11008 to a quarter in float32, on 2,048 tokens where the method sees data."""
    small, few = methods_cost.build("llama-layer", tiny=True)
    for work in methods_cost.steps_of(name, small, few, "").values():  # libraries are loaded and warm
        work()
    model, data = methods_cost.build("llama-layer", tiny=options.toy)
    base = loaded_bytes(options.device)
    model.to(options.device)
    data = [{key: value.to(options.device) for key, value in batch.items()} for batch in data]
    held = loaded_bytes(options.device) - base
    row: dict[str, Any] = {"model_bytes": held, "peak_bytes": 0}
    for part, work in methods_cost.steps_of(name, model, data, "").items():
        spent = cost(work, base, options.device)
        row |= {f"{part}_seconds": spent.seconds, "peak_bytes": max(row["peak_bytes"], spent.peak_bytes)}
    return row


def latency(width: float, options: argparse.Namespace) -> dict[str, Any]:
    """Forward passes of four blocks: of 8 x 1,024 tokens, and of one token."""
    import torch

    from ffnkit.report import measure

    model = blocks("4096", options, width, count=4).eval()
    sync = synchronizer(options.device)
    row: dict[str, Any] = {"width": width, "flops_per_token": measure.figures(model)["flops_per_token"]}
    for what, (rows, length) in {"batch": (2, 16) if options.toy else (8, 1024), "token": (1, 1)}.items():
        x = torch.randn(rows, length, model.config.hidden_size, device=options.device, dtype=torch.bfloat16)
        seconds = []
        with torch.inference_mode():
            for _ in range(3 if options.toy else 30):
                sync()
                start = time.perf_counter()
                model(inputs_embeds=x)
                sync()
                seconds.append(time.perf_counter() - start)
        row |= {f"{what}_seconds": min(seconds), f"{what}_median_seconds": statistics.median(seconds)}
    return row


def work(words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The row of one figure; what went wrong where it cannot be had."""
    kind, *given = words
    try:
        if kind == "step":
            return step(given[0], given[1], options)
        return narrow(given[0], options) if kind == "narrow" else latency(float(given[0]), options)
    except (RuntimeError, ImportError, MemoryError) as error:  # out of memory is the first of these
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


# ----------------------------------------------------------------------------------------- outside the process
def page(rows: dict[str, dict[str, Any]], head: dict[str, Any]) -> str:
    """What was measured, as a page."""
    lines = ["# On a device", "", f"{head['device']}; " + ", ".join(f"{k} {v}" for k, v in head["versions"].items())]
    lines += ["", "Toy shapes: the headings tell what they stand for."] if head["toy"] else []
    full = {size: rows.get(f"step-{size}-full", {}) for size in SHAPES}
    for size, (d, ff) in SHAPES.items():
        cells = [["tuner", "trains", "step", "x full", "peak", "x full"], [":--", *["--:"] * 5]]
        for name, row in ((n, r) for n, r in rows.items() if n.startswith(f"step-{size}-")):
            cells.append([name.removeprefix(f"step-{size}-"), *_step_cells(row, full[size])])
        lines += ["", f"## A training step, {BLOCKS} blocks of {d} x {ff}", "", table(cells)]
    cells = [["method", "plan", "apply", "peak"], [":--", *["--:"] * 3]]
    for name, row in ((n, r) for n, r in rows.items() if n.startswith("narrow-")):
        parts = [f"{row.get(f'{part}_seconds', 0):,.2f} s" for part in ("plan", "apply")]
        told = [row["error"], "", ""] if "error" in row else [*parts, f"{row['peak_bytes'] / 2**20:,.0f} MiB"]
        cells.append([name.removeprefix("narrow-"), *told])
    lines += ["", "## Narrowing a layer of 4096 x 11008 to a quarter", "", table(cells)]
    cells = [["width", "FLOPs", "8 x 1,024 tokens", "one token"], [":--", *["--:"] * 3]]
    whole = rows.get("latency-1.0", {})
    for row in (r for n, r in rows.items() if n.startswith("latency-") and "error" not in r and "error" not in whole):
        if whole:
            ratios = [row[key] / whole[key] for key in ("flops_per_token", "batch_seconds", "token_seconds")]
            cells.append([f"{row['width']:g}", *(f"{ratio:.2f}" for ratio in ratios)])
    lines += ["", "## Latency of narrowed FFNs, relative to the whole model", "", table(cells)]
    return "\n".join(lines) + "\n"


def _step_cells(row: dict[str, Any], full: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"], "", "", "", ""]
    cells = [f"{row['trained']:,}", f"{row['seconds'] * 1e3:,.1f} ms", "", f"{row['peak_bytes'] / 2**20:,.0f} MiB", ""]
    if "seconds" in full:
        cells[2] = f"{row['seconds'] / full['seconds']:.2f}"
        cells[4] = f"{row['peak_bytes'] / max(full['peak_bytes'], 1):.2f}"
    return cells


def device_of(name: str) -> str:
    """The device's own name."""
    from ffnkit.report import measure

    machine = measure.machine()
    return str(machine["accelerator"] if name == "cuda" else machine["cpu"])


def main() -> None:
    import torch

    from ffnkit.io.files import write_text
    from ffnkit.report import measure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options)))
        return
    chosen = [(name, words) for name, words in plan() if name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return
    if options.device == "cpu" and not options.toy:
        parser.error("there is no GPU; --toy runs the list at tiny shapes")
    head = {"device": device_of(options.device), "toy": options.toy, "versions": measure.versions()}
    folder = options.out / re.sub(r"[^A-Za-z0-9]+", "-", f"{head['device']}{' toy' * options.toy}").strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    given = ["--device", options.device, *["--toy"] * options.toy]
    for number, (name, words) in enumerate(chosen, 1):
        path = folder / f"{name}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if not stored or (options.again and "error" in stored):
            print(f"{number} of {len(chosen)}: {name}", file=sys.stderr, flush=True)
            try:
                row = in_process(__file__, *words, *given)
            except subprocess.CalledProcessError as error:
                row = {"error": f"the process ended with code {error.returncode}"}
            stored = head | row
            write_text(path, json.dumps(stored, indent=2) + "\n")
        rows[name] = stored
    write_text(folder / "README.md", page(rows, head))
    print(page(rows, head))


if __name__ == "__main__":
    main()
