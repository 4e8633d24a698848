"""Seconds and peak memory of every method beside Torch-Pruning and optipfair, on the same FFNs in the same run.

    python benchmarks/methods_cost.py [--case llama-layer] [--only fusion ...] [--out benchmarks/results]

Planning and applying a quarter of the width, randomly initialised models in float32, one thread. Each measurement has
a process of its own: the model is built, the method runs on a tiny model so that libraries are loaded, then it is
measured; twice where it takes less than a minute, and the better seconds and the larger peak are given. Seconds are
those of the processor, so that other work on the machine counts little. Memory is beyond the loaded model, and in
multiples of the bytes of one layer's FFN. Of methods that take many equal steps some are measured and the others added.
The peers come with `pip install -e .[bench]`; without them their rows say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, Call, cost, footer, in_process, load_average, loaded_bytes, started, time_calls, write

WIDTH = 0.25
CASES = {
    "roberta-base": "RoBERTa-base, 12 layers of 768 x 3072, 6,400 tokens",
    "roberta-4": "the same with 4 layers",
    "llama-layer": "one LLaMA-2-7B layer of 4096 x 11008, gated, 2,048 tokens",
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fusion": ("fusion", {}),
    "calibrated-fusion": ("calibrated-fusion", {"refine": 100}),
    "calibrated-fusion, refine=0": ("calibrated-fusion", {"refine": 0}),
    "clustering": ("clustering", {}),
    "sketch": ("sketch", {}),
    "svd": ("svd", {}),
    "mmd": ("mmd", {}),
    "random": ("random", {}),
    "magnitude": ("magnitude", {}),
    "importance": ("importance", {}),
    "reinit": ("reinit", {}),
    "unstructured": ("unstructured", {}),
}
PEERS = {
    "Torch-Pruning": "torch_pruning",
    "optipfair": "optipfair",
    "optipfair on data": "optipfair",
}
STEPS = 100  # of mmd and of the regression of calibrated-fusion
FEWER = {  # so many of them are measured
    ("roberta-base", "mmd"): 10,
    ("llama-layer", "mmd"): 2,
    ("roberta-base", "calibrated-fusion"): 20,
    ("roberta-4", "calibrated-fusion"): 20,
    ("llama-layer", "calibrated-fusion"): 10,
}
PEAK_GROWTH = ("calibrated-fusion", "calibrated-fusion, refine=0", "fusion", "importance")


# ------------------------------------------------------------------------------------------ inside the process
def build(case: str, tiny: bool = False) -> tuple[Any, list[dict[str, Any]]]:
    """The model of a case, float32, from its config alone, and its calibration tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

    torch.manual_seed(0)
    llama = case == "llama-layer"
    d, ff, heads, vocab = (4096, 11008, 32, 128) if llama else (768, 3072, 12, 50265)
    layers = {"roberta-base": 12, "roberta-4": 4, "llama-layer": 1}[case]
    rows, batches, length = (1, 4, 512) if llama else (16, 4, 100)
    if tiny:
        d, ff, heads, vocab, layers, rows, batches, length = 16, 32, 2, 32, 2, 2, 1, 16
    shape = {"hidden_size": d, "intermediate_size": ff, "num_attention_heads": heads, "num_hidden_layers": layers}
    if llama:
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **shape))
    else:
        model = RobertaModel(RobertaConfig(vocab_size=vocab, max_position_embeddings=514, type_vocab_size=1, **shape))
    ids = torch.randint(3, vocab, (batches, rows, length), generator=torch.Generator().manual_seed(1))
    return model.eval(), [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def steps_of(label: str, model: Any, batches: list[dict[str, Any]], case: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, in order."""
    made: list[Any] = []
    if label == "Torch-Pruning":
        return {"plan": lambda: made.append(torch_pruner(model, batches[0])), "apply": lambda: made[0].step()}
    if label in PEERS:
        import optipfair

        data = batches if label == "optipfair on data" else None
        percentage = 100 * (1 - WIDTH)
        return {
            "apply": lambda: optipfair.prune_model(
                model, pruning_percentage=percentage, dataloader=data, show_progress=False
            )
        }
    import ffnkit as fk
    from ffnkit import methods

    name, settings = METHODS[label]
    if (case, label) in FEWER:
        settings = {"steps" if name == "mmd" else "refine": FEWER[case, label]}
    method = methods.build(name, width=WIDTH, **settings)
    data = batches if getattr(method, "needs_data", False) else None
    return {"plan": lambda: made.append(fk.plan(model, method, data=data)), "apply": lambda: fk.apply(model, made[0])}


def torch_pruner(model: Any, batch: dict[str, Any]) -> Any:
    """Torch-Pruning's pruner of the FFNs' hidden neurons by the norms of their groups; it traces the model."""
    import torch
    import torch_pruning as tp

    from ffnkit.model.finding import ffns

    inner = {ffn.linear(site) for ffn in ffns(model) for site in ffn.sites if site != "down"}
    others = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in inner]
    return tp.pruner.BasePruner(
        model,
        {"input_ids": batch["input_ids"][:1, :8], "use_cache": False},
        forward_fn=lambda traced, inputs: traced(**inputs)[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - WIDTH,
        ignored_layers=others,
        root_module_types=[torch.nn.Linear],
    )


def gemm_rate(dtype: str) -> float:
    """Multiplications and additions a second of torch.mm now."""
    import torch

    a = torch.randn(1536, 1536, dtype=getattr(torch, dtype))
    spent = []
    for _ in range(4):
        start = time.process_time()
        torch.mm(a, a)
        spent.append(time.process_time() - start)
    return 2 * 1536**3 / min(spent)


def floors(model: Any, label: str, width: int) -> tuple[float, str] | None:
    """Multiplications and additions that the method's core cannot do without, over all layers, and their type."""
    from ffnkit.model.finding import ffns
    from ffnkit.ops.moments import DOUBLE_UP_TO

    total, dtype = 0.0, "float32"
    for ffn in ffns(model):
        ff, d = ffn.width, ffn.d
        if label in ("fusion", "clustering"):
            tensors = ffn.raw().tensors()
            columns = sum(value.numel() // ff for name, value in tensors.items() if name != "down_bias")
            total += ff * ff * columns
        elif label.startswith("calibrated"):
            total += 2 * width * ff * (width / 2 + 2 * d)
            dtype = "float64" if ff <= DOUBLE_UP_TO else "float32"
        else:
            return None
    return total, dtype


def measure_row(case: str, label: str) -> dict[str, Any]:
    """One method or peer on one model; one row of the results."""
    import torch

    import ffnkit as fk
    from ffnkit.methods.narrow import calibrated, mmd
    from ffnkit.ops import clusters, local

    torch.manual_seed(0)
    small, few = build(case, tiny=True)
    for work in steps_of(label, small, few, case).values():
        work()
    del small
    model, batches = build(case)
    before = fk.inspect(model)
    width = round(WIDTH * before.rows[0].width)
    core = floors(model, label, width)
    rate = gemm_rate(core[1]) if core else None
    module, name = (calibrated, "choose") if label.startswith("calibrated") else (clusters, "kmeans")
    calls = time_calls(module, name, clock=time.process_time)
    repeated = time_calls(*((mmd, "step") if label == "mmd" else (local, "regress")), clock=time.process_time)
    base = loaded_bytes()
    layer = max(each.parameters for each in before.rows) * 4
    row: dict[str, Any] = {"case": case, "label": label, "layers": len(before.rows), "ffn_layer_bytes": layer}
    row |= {"load_average": load_average(), "threads": torch.get_num_threads()}
    row |= {"seconds": 0.0, "clock_seconds": 0.0, "peak_bytes": 0}
    for name, work in steps_of(label, model, batches, case).items():
        spent = cost(work, base)
        row |= {f"{name}_s": spent.processor_seconds, f"{name}_peak_bytes": spent.peak_bytes}
        row |= {"peak_exact": spent.exact, "clock_seconds": row["clock_seconds"] + spent.seconds}
        row["seconds"] += spent.processor_seconds
        row["peak_bytes"] = max(row["peak_bytes"], spent.peak_bytes)
    row["added_s"] = missing_steps(repeated, case, label)
    row["plan_s"] = row.get("plan_s", 0.0) + row["added_s"]
    row["seconds"] += row["added_s"]
    if core is not None and rate is not None:
        spent = sum(call.seconds for call in calls)
        row |= {"core_s": spent, "core_operations": core[0], "gemm_rate": rate, "gemm_type": core[1]}
        row["core_gap"] = spent / (core[0] / rate)
    after = fk.inspect(model)
    row["widths_after"] = sorted({each.width for each in after.rows})
    row["parameters_after"] = after.parameters
    return row


def missing_steps(calls: list[Call], case: str, label: str) -> float:
    """Seconds of the steps that were not measured, by those that were."""
    some = FEWER.get((case, label))
    if some is None:
        return 0.0
    return sum(call.seconds for call in calls) * (STEPS - some) / some


# ----------------------------------------------------------------------------------------- outside the process
def measured(case: str, label: str) -> dict[str, Any]:
    """The better of two, or of one that takes long; or why there is none."""
    if label in PEERS and importlib.util.find_spec(PEERS[label]) is None:
        return {"case": case, "label": label, "absent": "not installed"}
    try:
        first = in_process(__file__, case, label, threads=1)
    except subprocess.CalledProcessError:
        if label in PEERS:  # a release with another interface, say
            return {"case": case, "label": label, "absent": "failed"}
        raise
    if first["clock_seconds"] >= 60:
        return first | {"runs": 1}
    second = in_process(__file__, case, label, threads=1)
    best = min(first, second, key=lambda row: row["seconds"])
    return best | {"runs": 2, "peak_bytes": max(first["peak_bytes"], second["peak_bytes"])}


def plan_of_rows(only: list[str] | None, cases: list[str]) -> list[tuple[str, str]]:
    """What is to be measured: (case, label)."""
    found = []
    for case in cases:
        labels = [*PEERS, *METHODS]
        if case == "roberta-4":
            labels = list(PEAK_GROWTH)
        elif case != "llama-layer":
            labels = [label for label in labels if not label.startswith("optipfair")]  # gated FFNs only
        found += [(case, label) for label in labels if not only or label in only]
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Time and memory of every method",
        "",
        f"Planning and applying, width {WIDTH}, randomly initialised models in float32, one thread, each in a process "
        "of its own; the better of two runs where one takes less than a minute. Seconds are the processor's. Peak "
        "memory is beyond the loaded model; one layer is the bytes of one FFN before.",
    ]
    for case, title in CASES.items():
        rows = [row for row in results["rows"] if row["case"] == case]
        if case != "roberta-4" and rows:
            lines += ["", *table(rows, title)]
    lines += ["", *growth(results["rows"])]
    lines += ["", *core_table(results["rows"])]
    loads = [row["load_average"] for row in results["rows"] if row.get("load_average") is not None]
    rows = [row for row in results["rows"] if "absent" not in row]
    lines += ["", *footer(results, threads=1)]
    lines.append(f"- Peers: {', '.join(f'{name} {version}' for name, version in results['peers'].items())}.")
    if loads:
        lines.append(f"- Load average at the start of a measurement: {min(loads):.1f} to {max(loads):.1f}.")
    some = ", ".join(f"{label} on {case} {count}" for (case, label), count in FEWER.items())
    lines.append(f"- (*) Of {STEPS} equal steps some were measured and the others added: {some}.")
    if not all(row["peak_exact"] for row in rows):
        lines.append("- The system's high-water mark could not be reset: peaks count from the start of the process.")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], title: str) -> list[str]:
    """Seconds and peaks of one model, with ratios to the peers' seconds."""
    peers = {row["label"]: row["seconds"] for row in rows if row["label"] in PEERS and "absent" not in row}
    names = [name for name in PEERS if any(row["label"] == name for row in rows)]
    lines = [f"## {title[0].upper()}{title[1:]}", ""]
    head = ["method", "plan, s", "apply, s", "both, s", *(f"x {n}" for n in names), "peak", "in layers"]
    lines.append(f"| {' | '.join(head)} |")
    lines.append("| :-- |" + " --: |" * (5 + len(names)))
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['label']} |" + f" {row['absent']} |" + " |" * (4 + len(names)))
            continue
        star = " (*)" if row["added_s"] else ""
        plan = f"{row['plan_s']:.2f}{star}" if row["plan_s"] else ""
        ratios = "".join(f" {row['seconds'] / peers[n]:.2f} |" if n in peers else " |" for n in names)
        layers = row["peak_bytes"] / row["ffn_layer_bytes"]
        lines.append(
            f"| {row['label']} | {plan} | {row['apply_s']:.2f} | {row['seconds']:.2f} |{ratios} "
            f"{row['peak_bytes'] / 1e6:,.0f} MB | {layers:.1f} x {row['ffn_layer_bytes'] / 1e6:,.0f} MB |"
        )
    return lines


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """Peaks with 4 and with 12 layers."""
    peaks = {(row["case"], row["label"]): row["peak_bytes"] for row in rows if "absent" not in row}
    lines = ["## Memory grows with a layer, not with the model", ""]
    lines += ["| method | RoBERTa, 4 layers | 12 layers | ratio |", "| :-- | --: | --: | --: |"]
    for label in PEAK_GROWTH:
        few, many = peaks.get(("roberta-4", label)), peaks.get(("roberta-base", label))
        if few is not None and many is not None:
            lines.append(f"| {label} | {few / 1e6:,.0f} MB | {many / 1e6:,.0f} MB | {many / few:.2f} |")
    return lines


def core_table(rows: list[dict[str, Any]]) -> list[str]:
    """The core of k-means and of the choice of neurons against the fewest operations at the rate of torch.mm."""
    lines = [
        "## Distance to the floor",
        "",
        "Multiplications and additions a layer, n neurons, m numbers a neuron, c neurons left, d the model's width: "
        "k-means compares all pairs once, n^2 m (half of a product of 2 n^2 m), all restarts together; the choice of "
        "neurons takes 2 c n (c / 2 + 2 d). The gap is the measured time over that at the rate of torch.mm (1536 "
        "square, the same type, the same process).",
        "",
        "| model | method | core | operations | torch.mm | floor, s | measured, s | gap |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        if "core_s" in row:
            core = "choose" if row["label"].startswith("calibrated") else "k-means"
            lines.append(
                f"| {row['case']} | {row['label']} | {core} | {row['core_operations'] / 1e9:,.0f} G | "
                f"{row['gemm_rate'] / 1e9:.0f} G/s {row['gemm_type']} | "
                f"{row['core_operations'] / row['gemm_rate']:.2f} | {row['core_s']:.2f} | {row['core_gap']:.1f} |"
            )
    return lines


def peer_versions() -> dict[str, str]:
    """Version of each peer, or that it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch-pruning", "optipfair"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Measure one after the other and write methods_cost.json and methods_cost.md after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="default: all")
    parser.add_argument("--only", nargs="+", help="methods or peers, as in the table; the other rows are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_row(*options.worker)))
        return
    from ffnkit.io.files import write_text

    results = started() | {"peers": peer_versions()}
    wanted = plan_of_rows(options.only, options.case or list(CASES))
    file = options.out / "methods_cost.json"
    if (options.only or options.case) and file.exists():
        kept = json.loads(file.read_text())["rows"]
        results["rows"] = [row for row in kept if (row["case"], row["label"]) not in wanted]
    order = plan_of_rows(None, list(CASES))
    for case, label in wanted:
        print(f"{case}: {label} ...", file=sys.stderr, flush=True)
        row = measured(case, label)
        print(f"  {row.get('seconds', 0):.2f} s, {row.get('peak_bytes', 0) / 1e6:,.0f} MB", file=sys.stderr, flush=True)
        results["rows"].append(row)
        results["rows"].sort(key=lambda each: order.index((each["case"], each["label"])))
        write_text(file, json.dumps(results, indent=2) + "\n")
    write(options.out, "methods_cost", results, markdown)


if __name__ == "__main__":
    main()
