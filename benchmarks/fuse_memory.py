"""Seconds and peak memory of fusing: a RoBERTa-base and one LLaMA layer of 4096 x 11008, randomly initialised.

    python benchmarks/fuse_memory.py [--device cuda] [--out benchmarks/results]

Each case runs in a process of its own: the model is built, a tiny model is fused so that libraries are loaded, then
`plan` and `apply` are measured. Memory is counted beyond that of the loaded model, and given in multiples of the bytes
of one layer's FFN. Random weights have no clusters, so k-means takes at least as many steps as on a trained model.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def time_kmeans(sync: Callable[[], None]) -> list[dict[str, Any]]:
    """Let every k-means of the method note its seconds and steps in the list that is returned."""
    from ffnkit.methods import fusion

    calls: list[dict[str, Any]] = []
    original = fusion.kmeans

    def timed(*args: Any, **kwargs: Any) -> Any:
        sync()
        start = time.perf_counter()
        result = original(*args, **kwargs)
        sync()
        calls.append({"seconds": time.perf_counter() - start, "iterations": result.iterations})
        return result

    fusion.kmeans = timed
    return calls


def release() -> None:
    """Give freed memory back to the system, so that it is not found free by what is measured next."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_case(case: str, device: str) -> dict[str, Any]:
    """Fuse one model; one row of the results."""
    import torch

    import ffnkit as fk
    from ffnkit.report import measure

    def sync() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    method = fk.Fusion(width=WIDTH)
    warm = build("tiny").to(device)
    fk.apply(warm, fk.plan(warm, method))
    del warm
    model = build(case).to(device)
    before = fk.inspect(model)
    calls = time_kmeans(sync)
    release()
    made: list[Any] = []
    steps = {"plan": lambda: made.append(fk.plan(model, method)), "apply": lambda: fk.apply(model, made[0])}
    row: dict[str, Any] = {
        "case": case,
        "device": device,
        "method": {"name": method.name, **dataclasses.asdict(method)},
        "ffns": len(before.rows),
        "model_bytes": before.parameters * 4,
        "ffn_layer_bytes": max(each.parameters for each in before.rows) * 4,
        "rss_loaded_bytes": measure.resident_bytes(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    base = torch.cuda.memory_allocated() if device == "cuda" else row["rss_loaded_bytes"]
    for name, work in steps.items():
        with measure.peak_memory(device) as peak:
            start = time.perf_counter()
            work()
            sync()
            row[f"{name}_s"] = time.perf_counter() - start
        top = peak.device_peak_bytes if peak.device_peak_bytes is not None else peak.peak_bytes
        row[f"{name}_peak_beyond_model_bytes"] = max(0, top - base)
        row["peak_exact"] = peak.exact or device == "cuda"
    row["peak_in_layers"] = max(row[f"{n}_peak_beyond_model_bytes"] for n in steps) / row["ffn_layer_bytes"]
    row["kmeans_s"] = sum(call["seconds"] for call in calls)
    row["kmeans_share"] = row["kmeans_s"] / (row["plan_s"] + row["apply_s"])
    row["kmeans_iterations"] = max(call["iterations"] for call in calls)
    row["parameters_after"] = fk.inspect(model).parameters
    return row


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    machine, versions = results["machine"], results["versions"]
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
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:.1f} GB; accelerator: {machine['accelerator']}; {machine['os']}.",
        f"- python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"ffnkit {versions['ffnkit']}. One run of each; other work on the machine is in the seconds.{busy}",
    ]
    if not all(row["peak_exact"] for row in results["rows"]):
        lines.append("- The system's high-water mark could not be reset: peaks count from the start of the process.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases one after the other and write fuse_memory.json and fuse_memory.md."""
    import torch

    from ffnkit.files import write_text
    from ffnkit.report import measure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append", help="default: all that there are")
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_case(options.case[0], options.device[0])))
        return
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results: dict[str, Any] = {"machine": measure.machine(), "versions": measure.versions(), "rows": []}
    for device in devices:
        for case in options.case or CASES:
            print(f"{CASES[case]}, {device} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--worker", "--case", case, "--device", device]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results["rows"].append(json.loads(done.stdout.splitlines()[-1]))
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "fuse_memory.json", json.dumps(results, indent=2) + "\n")
    write_text(options.out / "fuse_memory.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
