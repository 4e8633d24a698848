"""One training step with SparseGrad beside full fine-tuning, a frozen FFN and peft's LoRA, SHiRA and Super-Tuning.

    python benchmarks/sparsegrad_cost.py [--case ffn ...] [--tokens 2048 ...] [--variant "lora r 8" ...]
                                         [--core 400x250 ...] [--threads 1] [--out benchmarks/results]

Steps, seconds and memory as steps.py says; all weights but those of the FFNs are frozen, in full fine-tuning too unless
--all is given. SparseGrad's bases and coordinates are random in a leading core of so many rows (wide side) and columns
(narrow side); cost does not depend on which they are. A refresh itself is not in the seconds of "refresh", which come
between refreshes.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import steps
from common import started, write

CASES = {
    "ffn": "an FFN of 768 -> {wide} -> 768, GELU",
    "bert": "{blocks} blocks of BERT-base's shape, 768 x {wide}",
    "llama": "{blocks} blocks of LLaMA's form, 768 x {wide}, gated",
}
WIDE = {"ffn": 3072, "bert": 3072, "llama": 2048}
TOKENS = (512, 2048, 8192)
SHARE = 0.01
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
    if variant.startswith(("sparsegrad", "mask")):
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


def with_sparsegrad(model: Any, found: dict[str, Any], selection: str, core: str = "") -> None:
    """Layers of SparseGrad in place: bases by shape, shared, and coordinates, both random; "mask": no bases."""
    import torch

    from ffnkit.nn.sparsegrad import Bases, SparseGradLinear

    high, low = (int(word) for word in core.split("x")) if core else (0, 0)
    draw = torch.Generator().manual_seed(0)
    shared: dict[tuple[str, tuple[int, ...]], Bases] = {}
    for order, (name, linear) in enumerate(found.items()):
        out, inner = linear.weight.shape
        if not core:
            index = torch.randperm(out * inner, generator=draw)[: round(SHARE * out * inner)].sort().values
            model.set_submodule(name, SparseGradLinear(linear, index=index, count=len(index)))
            continue
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
        if selection in ("fixed", "refresh"):
            given["index"] = torch.randperm(rows * columns, generator=draw)[:count].sort().values
        if selection == "refresh":
            given["every"] = 1 << 30
        model.set_submodule(name, SparseGradLinear(linear, bases=shared[key], **given))


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# One training step with SparseGrad", ""]
    what = "all weights" if results["all"] else "the FFNs, the rest frozen"
    lines += [
        f"Forward, backward and AdamW, float32, {results['length']} tokens a sequence, random weights; full "
        f"fine-tuning is of {what}. SparseGrad trains 1% of the entries inside a leading core of rows x columns of "
        "random bases; the mask 1% of the entries of the weights themselves. "
        "Seconds are the fewest of several rounds in which the variants take turns; beside their ratio "
        "to full fine-tuning the median of the ratios within a round. Peak memory is of a process each, with weights, "
        "gradients and moments. Saved: what backward keeps, without parameters.",
    ]
    titles = {case: title.format(wide=WIDE[case], blocks=results["blocks"]) for case, title in CASES.items()}
    return steps.page(results, lines, {title: table(rows) for title, rows in steps.of_each_case(results, titles)})


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One case at one number of tokens."""
    by_name = {row["variant"]: row for row in rows}
    lora, full = (by_name.get(name, {}).get("peak_bytes") for name in ("lora r 8", "full"))
    lines = [
        "| variant | trains | step | x full | median | peak | x full | x LoRA r 8 | saved | targets |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        lines.append(f"| {' | '.join([*steps.shown(row, [full, lora]), verdict(row, lora)])} |")
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
    parser.add_argument("--all", action="store_true", help="full fine-tuning trains all weights, not the FFNs alone")
    parser.add_argument("--name", default="sparsegrad_cost", help="of the files")
    steps.add_arguments(parser)
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    return parser.parse_args()


def variants_of(options: argparse.Namespace) -> list[str]:
    """What is measured, in the order of the tables."""
    found = [*PEERS, *(f"sparsegrad {selection} {options.core[0]}" for selection in SELECTIONS)]
    found += [*(f"sparsegrad fixed {core}" for core in options.core[1:]), "mask 1%"]
    return [name for name in found if not options.variant or any(name.startswith(word) for word in options.variant)]


def work(options: argparse.Namespace) -> Any:
    """What this process was started for."""
    case, tokens = options.case[0], options.tokens[0]

    def make(variant: str, d: int) -> Any:
        return changed(build(case, options, d), case, variant)

    if options.worker == "time":
        return steps.measure_time(make, tokens, options, against="full")
    row = steps.measure_memory(make, tokens, options, WIDE[case])
    del row["kept"]
    return row


def main() -> None:
    """Measure case after case and write JSON and a page after each."""
    options = parsed()
    if options.worker:
        print(json.dumps(work(options)))
        return
    results = started() | {"threads": options.threads, "device": options.device, "length": options.length}
    results |= {"blocks": options.blocks, "all": options.all}
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    same = [*steps.passed_on(options), *["--all"] * options.all]
    for case in options.case:
        for tokens in options.tokens:
            results["rows"] += steps.measure(__file__, case, tokens, variants_of(options), same, options)
            write(options.out, options.name, results | {"load": [*results["load"]]}, markdown)


if __name__ == "__main__":
    main()
