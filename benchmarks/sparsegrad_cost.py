"""One training step with SparseGrad beside full fine-tuning, a frozen FFN and peft's LoRA, SHiRA and Super-Tuning.

    python benchmarks/sparsegrad_cost.py [--case ffn ...] [--tokens 2048 ...] [--variant "lora r 8" ...]
                                         [--core 400x250 ...] [--threads 1] [--out benchmarks/results]

A step is forward, backward from a fixed gradient of the output, and AdamW. Inputs take part in the backward pass, as
below other layers; all weights but those of the FFNs are frozen, in full fine-tuning too unless --all is given.
Seconds: every variant is built once, then all of them take a step each, again and again in an order drawn anew, so
that other work on the machine falls on all alike; the fewest seconds count, and the median of the ratios within a
round stands beside them. Memory: each variant has a process of its own; peak beyond what was loaded before the model
was built, so weights, gradients, moments and what backward needs are all in it. Saved for backward: bytes of all
tensors kept, once each, without parameters and buffers. SparseGrad's bases and coordinates are random in a leading
core of so many rows (wide side) and columns (narrow side); cost does not depend on which they are. A refresh itself
is not in the seconds of "refresh", which come between refreshes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, started, synchronizer, write

CASES = {
    "ffn": "an FFN of 768 -> {wide} -> 768, GELU",
    "bert": "{blocks} blocks of BERT-base's shape, 768 x {wide}",
    "llama": "{blocks} blocks of LLaMA's form, 768 x {wide}, gated",
}
WIDE = {"ffn": 3072, "bert": 3072, "llama": 2048}
TOKENS = (512, 2048, 8192)
SHARE = 0.01
ROUNDS = {512: 30, 2048: 12, 8192: 5}
PEERS = ("full", "frozen", "lora r 8", "lora 1%", "shira 1%", "super-tuning 1%")
SELECTIONS = ("fixed", "refresh", "step")
TIME_TARGET, MEMORY_TARGET = 0.85, 1.1


# ------------------------------------------------------------------------------------------ inside the process
def build(case: str, options: argparse.Namespace, d: int = 768) -> Any:
    """The model of a case, random weights, its parameters frozen but those of the FFNs."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    wide = WIDE[case] * d // 768
    shape = {"hidden_size": d, "intermediate_size": wide, "num_attention_heads": max(1, d // 64), "vocab_size": 8}
    shape |= {"num_hidden_layers": options.blocks, "max_position_embeddings": max(512, options.length)}
    if case == "ffn":
        model: Any = nn.Sequential()
        model.add_module("up_proj", nn.Linear(d, wide))
        model.add_module("act", nn.GELU())
        model.add_module("down_proj", nn.Linear(wide, d))
    elif case == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertModel(BertConfig(**shape, **quiet), add_pooling_layer=False)
    else:
        model = LlamaModel(LlamaConfig(**shape, use_cache=False))
    chosen = {id(p) for linear in linears(case, model).values() for p in linear.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(options.all or id(parameter) in chosen)
    return model.to(options.device).train()


def linears(case: str, model: Any) -> dict[str, Any]:
    """The linears of the FFNs by name."""
    ends = ("intermediate.dense", "output.dense") if case == "bert" else ("up_proj", "gate_proj", "down_proj")
    return {n: m for n, m in model.named_modules() if n.endswith(ends) and not n.endswith("attention.output.dense")}


def changed(model: Any, case: str, variant: str) -> Any:
    """The model as a variant trains it."""
    found = linears(case, model)
    if variant == "full":
        return model
    model.requires_grad_(False)
    if variant == "frozen":
        return model
    if variant.startswith("sparsegrad"):
        with_sparsegrad(model, found, *variant.split()[1:])
        return model
    import peft

    rank = round(
        SHARE * sum(m.weight.numel() for m in found.values()) / sum(sum(m.weight.shape) for m in found.values())
    )
    if variant.startswith("lora"):
        config: Any = peft.LoraConfig(r=8 if variant == "lora r 8" else max(1, rank), target_modules=list(found))
    elif variant.startswith("shira"):
        config = peft.ShiraConfig(r=max(1, rank), target_modules=list(found), random_seed=0)
    else:
        config = peft.SupertuningConfig(sparsity=1 - SHARE, target_modules=list(found))
    peft.inject_adapter_in_model(config, model)
    return model.train()


def with_sparsegrad(model: Any, found: dict[str, Any], selection: str, core: str) -> None:
    """Layers of SparseGrad in place: bases by shape, shared, and coordinates, both random."""
    import torch

    from ffnkit.nn.sparsegrad import Bases, SparseGradLinear

    high, low = (int(word) for word in core.split("x"))
    draw = torch.Generator().manual_seed(0)
    shared: dict[tuple[str, tuple[int, ...]], Bases] = {}
    for order, (name, linear) in enumerate(found.items()):
        out, inner = linear.weight.shape
        sides = (high, low) if out > inner else (low, high)
        rows, columns = min(sides[0], out), min(sides[1], inner)
        key = (name.rpartition(".")[2], (out, inner))
        if key not in shared:
            pair = [
                torch.linalg.qr(torch.randn(size, kept, generator=draw)).Q.T.contiguous()
                for size, kept in ((out, rows), (inner, columns))
            ]
            shared[key] = Bases(*pair).to(linear.weight)
        count = min(round(SHARE * out * inner), rows * columns)
        given: dict[str, Any] = {"selection": selection, "count": count, "together": name, "order": order}
        if selection != "step":
            given["index"] = torch.randperm(rows * columns, generator=draw)[:count].sort().values
        if selection == "refresh":
            given["every"] = 1 << 30
        model.set_submodule(name, SparseGradLinear(linear, bases=shared[key], **given))


def stepper(case: str, variant: str, tokens: int, options: argparse.Namespace, d: int = 768) -> tuple[Any, Callable]:
    """The changed model, and a call that takes one step; the call's argument wraps the forward pass."""
    from contextlib import nullcontext

    import torch

    model = changed(build(case, options, d), case, variant)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    draw = torch.Generator().manual_seed(1)
    length = min(options.length, tokens)
    x, grad = (torch.randn(tokens // length, length, d, generator=draw).to(options.device) for _ in range(2))
    x.requires_grad_(True)

    def step(around: Any = None) -> None:
        with around or nullcontext():
            y = model(x) if case == "ffn" else model(inputs_embeds=x).last_hidden_state
        y.backward(grad)
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return model, step


def measure_time(case: str, tokens: int, variants: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of every variant, round by round."""
    import torch

    sync = synchronizer(options.device)
    steps, rows = {}, {}
    for variant in variants:
        model, steps[variant] = stepper(case, variant, tokens, options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[variant] = {"case": case, "tokens": tokens, "variant": variant, "trained": trained}
        steps[variant]()  # moments, caches
    clock: dict[str, list[float]] = {variant: [] for variant in variants}
    busy: dict[str, list[float]] = {variant: [] for variant in variants}
    order = random.Random(0)
    for _ in range(options.rounds or ROUNDS.get(tokens, 10)):
        for variant in order.sample(variants, len(variants)):
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
        if "full" in clock:
            pairs = zip(clock[variant], clock["full"], strict=True)
            row["ratio"] = row["seconds"] / min(clock["full"])
            row["median_ratio"] = statistics.median(a / b for a, b in pairs)
    return list(rows.values())


def measure_memory(case: str, tokens: int, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak and saved bytes of one variant in this process."""
    import torch

    for _ in range(2):  # libraries are loaded and warm
        stepper(case, variant, options.length, options, d=64)[1]()
    for shape in ((768, WIDE[case]), (WIDE[case], 768)):  # workspaces of products of this size
        torch.randn(tokens, shape[0], device=options.device) @ torch.randn(shape, device=options.device)
    base = loaded_bytes(options.device)
    model, step = stepper(case, variant, tokens, options)
    loaded = loaded_bytes(options.device)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    spent = cost(lambda: [step() for _ in range(3)], base, options.device)
    step(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    row = {"model_bytes": loaded - base, "peak_bytes": spent.peak_bytes, "peak_exact": spent.exact}
    return row | {"saved_bytes": sum(kept.values())}


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# One training step with SparseGrad", ""]
    what = "all weights" if results["all"] else "the FFNs, the rest frozen"
    lines += [
        f"Forward, backward and AdamW, float32, {results['length']} tokens a sequence, random weights; full "
        f"fine-tuning is of {what}. SparseGrad trains 1% of the entries inside a leading core of rows x columns of "
        "random bases. Seconds are the fewest of several rounds in which the variants take turns; beside their ratio "
        "to full fine-tuning the median of the ratios within a round. Peak memory is of a process each, with weights, "
        "gradients and moments. Saved: what backward keeps, without parameters.",
    ]
    for case, title in CASES.items():
        for tokens in sorted({row["tokens"] for row in results["rows"] if row["case"] == case}):
            rows = [row for row in results["rows"] if (row["case"], row["tokens"]) == (case, tokens)]
            named = title.format(wide=WIDE[case], blocks=results["blocks"])
            lines += ["", f"## {named[0].upper()}{named[1:]}, {tokens:,} tokens", "", *table(rows)]
    lines += ["", *footer(results, results["threads"]), f"- Device: {results['device']}."]
    lines.append(f"- Load average, start and end: {', '.join(f'{value:.1f}' for value in results['load'] if value)}.")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One case at one number of tokens."""
    by_name = {row["variant"]: row for row in rows}
    lora, full = (by_name.get(name, {}).get("peak_bytes") for name in ("lora r 8", "full"))
    lines = [
        "| variant | trains | step | x full | median | peak | x full | x LoRA r 8 | saved | targets |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        peak, ratio = row.get("peak_bytes"), row.get("ratio")
        cells = [row["variant"], f"{row['trained']:,}", f"{row['seconds'] * 1e3:,.0f} ms"]
        cells += [f"{ratio:.2f}", f"{row['median_ratio']:.2f}"] if ratio else ["", ""]
        cells.append(f"{peak / 2**20:,.0f} MiB" if peak else "")
        cells += [f"{peak / other:.2f}" if peak and other else "" for other in (full, lora)]
        cells.append(f"{row['saved_bytes'] / 2**20:,.0f} MiB" if "saved_bytes" in row else "")
        cells.append(verdict(row, lora))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(row: dict[str, Any], lora: int | None) -> str:
    """Whether a fixed selection is as fast and as small as it should be."""
    if not row["variant"].startswith("sparsegrad fixed"):
        return ""
    words = []
    if row["tokens"] >= 2048 and "ratio" in row:
        words.append(f"time {'met' if row['ratio'] <= TIME_TARGET else 'missed'}")
    if lora and "peak_bytes" in row:
        words.append(f"memory {'met' if row['peak_bytes'] <= MEMORY_TARGET * lora else 'missed'}")
    return ", ".join(words)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--variant", nargs="+", help=f"default: {', '.join(PEERS)}, sparsegrad of every kind")
    parser.add_argument("--core", nargs="+", default=["960x112", "400x250"], help="all selections in the first one")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, help=f"default by tokens: {ROUNDS}")
    parser.add_argument("--all", action="store_true", help="full fine-tuning trains all weights, not the FFNs alone")
    parser.add_argument("--no-memory", action="store_true", help="seconds only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    return parser.parse_args()


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


def variants_of(options: argparse.Namespace) -> list[str]:
    """What is measured, in the order of the tables."""
    found = [*PEERS, *(f"sparsegrad {selection} {options.core[0]}" for selection in SELECTIONS)]
    found += [f"sparsegrad fixed {core}" for core in options.core[1:]]
    return [name for name in found if not options.variant or any(name.startswith(word) for word in options.variant)]


def main() -> None:
    """Measure case after case and write sparsegrad_cost.json and sparsegrad_cost.md after each."""
    options = parsed()
    if options.worker == "time":
        print(json.dumps(measure_time(options.case[0], options.tokens[0], options.variant, options)))
        return
    if options.worker == "memory":
        print(json.dumps(measure_memory(options.case[0], options.tokens[0], options.variant[0], options)))
        return
    results = started() | {"threads": options.threads, "device": options.device, "length": options.length}
    results |= {"blocks": options.blocks, "all": options.all}
    names = variants_of(options)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    same = ["--blocks", str(options.blocks), "--length", str(options.length), "--device", options.device]
    same += ["--all"] * options.all + (["--rounds", str(options.rounds)] if options.rounds else [])
    for case in options.case:
        for tokens in options.tokens:
            print(f"{case}, {tokens} tokens ...", file=sys.stderr, flush=True)
            given = [*same, "--case", case, "--tokens", str(tokens), "--variant"]
            rows: Any = in_process(__file__, "time", *given, *names, threads=options.threads)
            for row in rows:
                if not options.no_memory:
                    with exact_allocation():
                        row |= in_process(__file__, "memory", *given, row["variant"], threads=options.threads)
            results["rows"] += rows
            write(options.out, "sparsegrad_cost", results | {"load": [*results["load"]]}, markdown)


if __name__ == "__main__":
    main()
