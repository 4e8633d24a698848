"""One training step with DSEE's update beside peft's LoRA and Super-Tuning on the same linears; seconds of supports.

    python benchmarks/dsee_cost.py [--case qv ...] [--tokens 2048 ...] [--variant "dsee 64" ...] [--blocks 2]
                                   [--support svd ...] [--size 768x768 ...] [--threads 1] [--out benchmarks/results]

How a step is measured is said in steps.py.

Everything but the updates is frozen. Beside the bytes saved for backward
stands how many of the tensors have the size of an adapted weight. Super-Tuning chooses as many entries as DSEE; places
of DSEE's are random, for cost does not depend on which they are. Supports are found for random normal matrices, once
each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import steps
from common import in_process, started, write

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
    how = f"{(steps.__doc__ or '').partition(chr(10) * 2)[2]} {(__doc__ or '').split(chr(10) * 2)[3]}"
    lines = ["# One training step with DSEE's update", "", " ".join(how.split())]
    lines += ["", f"Rank {RANK}, alpha {ALPHA}, float32, {results['length']} tokens a sequence."]
    titles = {case: title.format(blocks=results["blocks"]) for case, title in CASES.items()}
    parts = {title: table(rows) for title, rows in steps.of_each_case(results, titles)}
    if results["supports"]:
        parts["choosing 64 entries of a matrix"] = rows = ["| matrix | way | seconds |", "|:--|:--|--:|"]
        for row in results["supports"]:
            note = f" ({row['rounds']} of 100 rounds)" if row["rounds"] != 100 else ""
            rows.append(f"| {row['size'].replace('x', ' x ')} | {row['support']}{note} | {row['seconds']:,.2f} |")
    return steps.page(results, lines, parts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One case at one number of tokens."""
    peaks = {row["variant"]: row.get("peak_bytes") for row in rows}
    lines = [
        "| variant | trains | step | x LoRA | median | peak | x LoRA | saved | of a weight's size | targets |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        cells = [*steps.shown(row, [peaks.get("lora")]), said(row.get("weight_sized")), verdict(row, peaks)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def said(count: int | None) -> str:
    """A count, or nothing where none was made."""
    return "" if count is None else str(count)


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
    parser.add_argument("--support", nargs="*", choices=SUPPORTS, default=list(SUPPORTS))
    parser.add_argument("--size", nargs="*", default=list(SIZES), help="of the matrices whose support is found")
    steps.add_arguments(parser)
    parser.add_argument("--worker", choices=("time", "memory", "support"), help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> Any:
    """What this process was started for."""
    if options.worker == "support":
        return measure_support(options.support[0], options.size[0], options)
    case, tokens = options.case[0], options.tokens[0]

    def make(variant: str, d: int) -> Any:
        return changed(build(case, options, d), case, variant)

    if options.worker == "time":
        return steps.measure_time(make, tokens, options, against="lora")
    row = steps.measure_memory(make, tokens, options, wide=3072)
    weight = 768 * 768 if case == "qv" else 768 * 3072
    same = sum(count == weight for count in row.pop("kept"))
    return row | {"weight_sized": same if tokens not in (768, 3072) else None}  # else activations look like weights


def main() -> None:
    """Measure case after case and write dsee_cost.json and dsee_cost.md after each."""
    options = parsed()
    if options.worker:
        print(json.dumps(work(options)))
        return
    results = started() | {"threads": options.threads, "device": options.device, "length": options.length}
    results |= {"blocks": options.blocks, "supports": []}

    def written() -> None:
        write(options.out, "dsee_cost", results | {"load": [*results["load"]]}, markdown)

    for case in options.case:
        for tokens in options.tokens:
            results["rows"] += steps.measure(__file__, case, tokens, options.variant, steps.passed_on(options), options)
            written()
    for size in options.size:
        for way in options.support:
            given = ["--device", options.device, "--support", way, "--size", size]
            results["supports"].append(in_process(__file__, "support", *given, threads=options.threads))
    written()


if __name__ == "__main__":
    main()
