"""Seconds and peak memory of fusing: a RoBERTa-base and one LLaMA layer of 4096 x 11008, randomly initialised.

    python benchmarks/fuse_memory.py [--device cuda] [--out benchmarks/results]

Each case runs in a process of its own: the model is built, a tiny model is fused so that libraries are loaded, then
`plan` and `apply` are measured. Memory is counted beyond that of the loaded model, and given in multiples of the bytes
of one layer's FFN. Random weights have no clusters, so k-means takes at least as many steps as on a trained model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, started, time_calls, write

WIDTH = 0.25
CASES = {
    "roberta-base": "RoBERTa-base, all 12 layers of 768 x 3072",
    "llama-layer": "one LLaMA layer of 4096 x 11008, gated",
}


# ------------------------------------------------------------------------------------------ inside the process
def build(case: str) -> Any:
    """The model of a case, fp32, from its config alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

    torch.manual_seed(0)
    if case == "roberta-base":
        return RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    if case == "llama-layer":
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, vocab_size=128)
        )
    small = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=32, num_attention_heads=2)
    return LlamaForCausalLM(small)


def measure_case(case: str, device: str) -> dict[str, Any]:
    """Fuse one model; one row of the results."""
    import torch

    import ffnkit as fk
    from ffnkit.ops import clusters

    method = fk.Fusion(width=WIDTH)
    warm = build("tiny").to(device)
    fk.apply(warm, fk.plan(warm, method))
    del warm
    model = build(case).to(device)
    before = fk.inspect(model)
    calls = time_calls(clusters, "kmeans", device)
    base = loaded_bytes(device)
    made: list[Any] = []
    steps = {"plan": lambda: made.append(fk.plan(model, method)), "apply": lambda: fk.apply(model, made[0])}
    row: dict[str, Any] = {
        "case": case,
        "device": device,
        "method": {"name": method.name, **dataclasses.asdict(method)},
        "ffns": len(before.rows),
        "model_bytes": before.parameters * 4,
        "ffn_layer_bytes": max(each.parameters for each in before.rows) * 4,
        "loaded_bytes": base,
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
    }
    for name, work in steps.items():
        spent = cost(work, base, device)
        row |= {f"{name}_s": spent.seconds, f"{name}_peak_beyond_model_bytes": spent.peak_bytes}
        row["peak_exact"] = spent.exact
    row["peak_in_layers"] = max(row[f"{n}_peak_beyond_model_bytes"] for n in steps) / row["ffn_layer_bytes"]
    row["kmeans_s"] = sum(call.seconds for call in calls)
    row["kmeans_share"] = row["kmeans_s"] / (row["plan_s"] + row["apply_s"])
    row["kmeans_iterations"] = max(call.result.iterations for call in calls)
    row["parameters_after"] = fk.inspect(model).parameters
    return row


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Time and memory of fusing",
        "",
        f"`plan` and `apply` of `Fusion(width={WIDTH})`, randomly initialised models in float32, each in a process of "
        "its own. Peak memory is beyond that of the loaded model; one layer is the bytes of one FFN before fusing.",
        "",
        "| model | device | plan | apply | k-means' share | model | peak: plan | peak: apply | in layers |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        peaks = [row[f"{name}_peak_beyond_model_bytes"] for name in ("plan", "apply")]
        lines.append(
            f"| {CASES[row['case']]} | {row['device']} | {row['plan_s']:.2f} s | {row['apply_s']:.2f} s "
            f"| {row['kmeans_share']:.0%} | {row['model_bytes'] / 1e6:,.0f} MB | {peaks[0] / 1e6:,.0f} MB "
            f"| {peaks[1] / 1e6:,.0f} MB | {row['peak_in_layers']:.1f} x {row['ffn_layer_bytes'] / 1e6:,.1f} MB |"
        )
    loads = [row["load_average"] for row in results["rows"] if row["load_average"] is not None]
    busy = f" Load average at the start: up to {max(loads):.1f}." if loads else ""
    restarts = results["rows"][0]["method"]["restarts"] if results["rows"] else None
    lines += [
        "",
        f"- k-means: {restarts} restarts. Random weights have no clusters.",
        *footer(results),
        "- One run of each; other work on the machine is in the seconds." + busy,
    ]
    if not all(row["peak_exact"] for row in results["rows"]):
        lines.append("- The system's high-water mark could not be reset: peaks count from the start of the process.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases one after the other and write fuse_memory.json and fuse_memory.md."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append", help="default: all that there are")
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_case(options.case[0], options.device[0])))
        return
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results = started()
    for device in devices:
        for case in options.case or CASES:
            print(f"{CASES[case]}, {device} ...", file=sys.stderr, flush=True)
            results["rows"].append(in_process(__file__, "--case", case, "--device", device))
    write(options.out, "fuse_memory", results, markdown)


if __name__ == "__main__":
    main()
