"""One training step with DSEE's update beside peft's LoRA and Super-Tuning on the same linears; seconds of supports.

    python benchmarks/dsee_cost.py [--case qv ...] [--tokens 2048 ...] [--variant "dsee 64" ...] [--blocks 2]
                                   [--support svd ...] [--size 768x768 ...] [--threads 1] [--out benchmarks/results]

A step is forward, backward from a fixed gradient of the output, and AdamW; inputs take part in the backward pass, as
below other layers, and everything but the updates is frozen. Seconds: every variant is built once, then all of them
take a step each, again and again in an order drawn anew, so that other work on the machine falls on all alike; the
fewest seconds count, and the median of the ratios within a round stands beside them. Memory: each variant has a process
of its own; peak beyond what was loaded before the model was built. Saved for backward: bytes of all tensors kept, once
each, without parameters and buffers, and how many of them have the size of an adapted weight. Super-Tuning chooses as
many entries as DSEE; places of DSEE's are random, for cost does not depend on which they are. Supports are found for
random normal matrices, once each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, started, synchronizer, write

CASES = {
    "qv": "query and value of {blocks} blocks of BERT-base's shape",
    "ffn": "both linears of an FFN of 768 -> 3072 -> 768, GELU",
}
ENDS = {"qv": ("query", "value"), "ffn": ("up_proj", "down_proj")}
TOKENS = (512, 2048)
RANK, ALPHA = 16, 32
ENTRIES = ("64", "512", "3072", "1%")
VARIANTS = (
    "lora", *(f"dsee {entries}" for entries in ENTRIES), "super-tuning 64", "super-tuning 1%",
)  # fmt: skip
ROUNDS = {512: 30, 2048: 12, 8192: 5}
SUPPORTS = ("svd", "grebsmo", "magnitude", "random")
SIZES = ("768x768", "4096x11008")
SLOW = 1 << 22  # entries from which GreBsmo is measured by one round of its 100
TIME_TARGET = 1.15


# ------------------------------------------------------------------------------------------ inside the process
def build(case: str, options: argparse.Namespace, d: int = 768) -> Any:
    """The model of a case with random weights, frozen."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    if case == "ffn":
        model: Any = nn.Sequential()
        model.add_module("up_proj", nn.Linear(d, 4 * d))
        model.add_module("act", nn.GELU())
        model.add_module("down_proj", nn.Linear(4 * d, d))
    else:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        shape = {"hidden_size": d, "intermediate_size": 4 * d, "num_attention_heads": max(1, d // 64), "vocab_size": 8}
        shape |= {"num_hidden_layers": options.blocks, "max_position_embeddings": max(512, options.length)}
        model = BertModel(BertConfig(**shape, **quiet), add_pooling_layer=False)
    return model.requires_grad_(False).to(options.device).train()


def changed(model: Any, case: str, variant: str) -> Any:
    """The model with the updates of a variant beside its linears."""
    import peft
    import torch

    from ffnkit.nn.dsee import SparseLowRank

    found = {n: m for n, m in model.named_modules() if n.endswith(ENDS[case])}
    kind, _, word = variant.partition(" ")
    if kind == "dsee":
        draw = torch.Generator().manual_seed(0)
        for number, (name, linear) in enumerate(found.items()):
            size = linear.weight.numel()
            index = torch.randperm(size, generator=draw)[: entries_of(word, size)].sort().values
            layer = SparseLowRank(linear, rank=RANK, alpha=ALPHA, seed=number, index=index)
            model.set_submodule(name, layer)
        return model
    if kind == "lora":
        config: Any = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(found))
    else:
        size = next(iter(found.values())).weight.numel()
        sparsity = 1 - entries_of(word, size) / size
        config = peft.SupertuningConfig(r=RANK, lora_alpha=ALPHA, sparsity=sparsity, target_modules=list(found))
    peft.inject_adapter_in_model(config, model)
    return model.train()


def entries_of(word: str, size: int) -> int:
    """A count, or a share of a weight's entries."""
    return min(size, round(0.01 * float(word[:-1]) * size) if word.endswith("%") else int(word))


def stepper(case: str, variant: str, tokens: int, options: argparse.Namespace, d: int = 768) -> tuple[Any, Callable]:
    """The changed model, and a call that takes one step; the call's argument wraps the forward pass."""
    from contextlib import nullcontext

    import torch

    model = changed(build(case, options, d), case, variant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    draw, length = torch.Generator().manual_seed(1), min(options.length, tokens)
    x, grad = (torch.randn(tokens // length, length, d, generator=draw).to(options.device) for _ in range(2))
    x.requires_grad_(True)

    def step(around: Any = None) -> None:
        with around or nullcontext():
            y = model(x) if case == "ffn" else model(inputs_embeds=x).last_hidden_state
        y.backward(grad)
        x.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def measure_time(case: str, tokens: int, variants: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of every variant, round by round."""
    sync = synchronizer(options.device)
    steps, rows = {}, {}
    for variant in variants:
        model, steps[variant] = stepper(case, variant, tokens, options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[variant] = {"case": case, "tokens": tokens, "variant": variant, "trained": trained}
        steps[variant]()  # moments, caches
    clock: dict[str, list[float]] = {variant: [] for variant in variants}
    order = random.Random(0)
    for _ in range(options.rounds or ROUNDS.get(tokens, 10)):
        for variant in order.sample(variants, len(variants)):
            sync()
            start = time.perf_counter()
            steps[variant]()
            sync()
            clock[variant].append(time.perf_counter() - start)
    for variant, row in rows.items():
        row |= {"load_average": load_average(), "rounds": len(clock[variant]), "seconds": min(clock[variant])}
        if "lora" in clock:
            pairs = zip(clock[variant], clock["lora"], strict=True)
            row["ratio"] = row["seconds"] / min(clock["lora"])
            row["median_ratio"] = statistics.median(a / b for a, b in pairs)
    return list(rows.values())


def measure_memory(case: str, tokens: int, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak and saved bytes of one variant in this process."""
    import torch

    for _ in range(2):  # libraries are loaded and warm
        stepper(case, variant, options.length, options, d=64)[1]()
    for shape in ((768, 3072), (3072, 768)):  # workspaces of products of this size
        torch.randn(tokens, shape[0], device=options.device) @ torch.randn(shape, device=options.device)
    base = loaded_bytes(options.device)
    model, step = stepper(case, variant, tokens, options)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    weights = {768 * 768} if case == "qv" else {768 * 3072}
    kept: dict[int, tuple[int, int]] = {}

    def pack(tensor: Any) -> Any:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), part.numel() if part.ndim == 2 else 0)
        return tensor

    spent = cost(lambda: [step() for _ in range(3)], base, options.device)
    step(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    of_a_weight = sum(count in weights and tokens not in (768, 3072) for _, count in kept.values())
    saved = sum(size for size, _ in kept.values())
    return {
        "peak_bytes": spent.peak_bytes, "peak_exact": spent.exact, "saved_bytes": saved, "weight_sized": of_a_weight
    }  # fmt: skip


def measure_support(way: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to choose 64 entries of one matrix."""
    import torch

    from ffnkit.ops import support

    rows, columns = (int(word) for word in size.split("x"))
    weight = 0.04 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(options.device)
    rounds = 100 if way != "grebsmo" or weight.numel() < SLOW else 2
    ways: dict[str, Callable[[], Any]] = {
        "svd": lambda: support.svd(weight, RANK, 64),
        "grebsmo": lambda: support.grebsmo(weight, 64, rounds=rounds),
        "magnitude": lambda: support.magnitude(weight, 64),
        "random": lambda: support.drawn(weight.numel(), 64, torch.Generator().manual_seed(0)),
    }
    start = time.perf_counter()
    ways[way]()
    return {"support": way, "size": size, "seconds": time.perf_counter() - start, "rounds": rounds}


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# One training step with DSEE's update", "", " ".join((__doc__ or "").split("\n\n")[2].split())]
    lines += ["", f"Rank {RANK}, alpha {ALPHA}, float32, {results['length']} tokens a sequence."]
    for case, title in CASES.items():
        for tokens in sorted({row["tokens"] for row in results["rows"] if row["case"] == case}):
            rows = [row for row in results["rows"] if (row["case"], row["tokens"]) == (case, tokens)]
            named = title.format(blocks=results["blocks"])
            lines += ["", f"## {named[0].upper()}{named[1:]}, {tokens:,} tokens", "", *table(rows)]
    if results["supports"]:
        lines += ["", "## Choosing 64 entries of a matrix", "", "| matrix | way | seconds |", "|:--|:--|--:|"]
        for row in results["supports"]:
            note = f" ({row['rounds']} of 100 rounds)" if row["rounds"] != 100 else ""
            lines.append(f"| {row['size'].replace('x', ' x ')} | {row['support']}{note} | {row['seconds']:,.2f} |")
    lines += ["", *footer(results, results["threads"]), f"- Device: {results['device']}."]
    lines.append(f"- Load average, start and end: {', '.join(f'{value:.1f}' for value in results['load'] if value)}.")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One case at one number of tokens."""
    peaks = {row["variant"]: row.get("peak_bytes") for row in rows}
    lines = [
        "| variant | trains | step | x LoRA | median | peak | x LoRA | saved | of a weight's size | targets |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        peak, ratio, lora = row.get("peak_bytes"), row.get("ratio"), peaks.get("lora")
        cells = [row["variant"], f"{row['trained']:,}", f"{row['seconds'] * 1e3:,.0f} ms"]
        cells += [f"{ratio:.2f}", f"{row['median_ratio']:.2f}"] if ratio else ["", ""]
        cells += [f"{peak / 2**20:,.0f} MiB" if peak else "", f"{peak / lora:.2f}" if peak and lora else ""]
        cells += [f"{row['saved_bytes'] / 2**20:,.0f} MiB", str(row["weight_sized"])] if peak else ["", ""]
        cells.append(verdict(row, peaks))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(row: dict[str, Any], peaks: dict[str, Any]) -> str:
    """Whether DSEE is as fast and as small as it should be."""
    kind, _, word = row["variant"].partition(" ")
    if kind != "dsee":
        return ""
    words = []
    if "ratio" in row:
        words.append(f"time {'met' if row['ratio'] <= TIME_TARGET else 'missed'}")
    peer = peaks.get(f"super-tuning {word}") or peaks.get("super-tuning 64")
    if peer and "peak_bytes" in row:
        words.append(f"memory {'met' if row['peak_bytes'] < peer and not row['weight_sized'] else 'missed'}")
    return ", ".join(words)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, help=f"default by tokens: {ROUNDS}")
    parser.add_argument("--support", nargs="*", choices=SUPPORTS, default=list(SUPPORTS))
    parser.add_argument("--size", nargs="*", default=list(SIZES), help="of the matrices whose support is found")
    parser.add_argument("--no-memory", action="store_true", help="seconds only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=("time", "memory", "support"), help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> Any:
    """What this process was started for."""
    if options.worker == "support":
        return measure_support(options.support[0], options.size[0], options)
    case, tokens = options.case[0], options.tokens[0]
    if options.worker == "time":
        return measure_time(case, tokens, options.variant, options)
    return measure_memory(case, tokens, options.variant[0], options)


def main() -> None:
    """Measure case after case and write dsee_cost.json and dsee_cost.md after each."""
    options = parsed()
    if options.worker:
        print(json.dumps(work(options)))
        return
    from sparsegrad_cost import exact_allocation

    results = started() | {"threads": options.threads, "device": options.device, "length": options.length}
    results |= {"blocks": options.blocks, "supports": []}
    same = ["--blocks", str(options.blocks), "--length", str(options.length), "--device", options.device]
    same += ["--rounds", str(options.rounds)] if options.rounds else []

    def written() -> None:
        write(options.out, "dsee_cost", results | {"load": [*results["load"]]}, markdown)

    for case in options.case:
        for tokens in options.tokens:
            print(f"{case}, {tokens} tokens ...", file=sys.stderr, flush=True)
            given = [*same, "--case", case, "--tokens", str(tokens), "--variant"]
            rows: Any = in_process(__file__, "time", *given, *options.variant, threads=options.threads)
            for row in rows if not options.no_memory else ():
                with exact_allocation():
                    row |= in_process(__file__, "memory", *given, row["variant"], threads=options.threads)
            results["rows"] += rows
            written()
    for size in options.size:
        for way in options.support:
            given = ["--device", options.device, "--support", way, "--size", size]
            results["supports"].append(in_process(__file__, "support", *given, threads=options.threads))
    written()


if __name__ == "__main__":
    main()
