"""Compressing from its files: a checkpoint of LLaMA-7B's shape, its peak of memory and its speed beside a plain copy.

    python benchmarks/stream.py [--layers 8] [--arms magnitude fusion calibrated] [--folder FOLDER] [--out FOLDER]

A checkpoint of so many of the 32 layers (d 4096, ff 11008, 32 heads, 32,000 words, bf16, shards of 2 GB) is written to
a folder, random numbers of the size that trained ones have. Each arm runs in a fresh process with `stream=True`; its
memory is counted beyond what the process holds once the libraries are loaded and a tiny model was compressed, mapped
files with it. Files are read cold: the system is asked to forget them before. A copy (read, write, synced) of the same
files is timed beside each arm. "arithmetic" is what planning and applying take on one layer in memory, times the
layers. Results are kept after each arm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, resumed, table, write

D, FF, WORDS, SHARD = 4096, 11008, 32000, 2_000_000_000
TOKENS, LAYERS = 16_000, "0-3"
ARMS = {
    "magnitude": "`magnitude`, half of the neurons",
    "fusion": "`fusion`, half of the neurons, one restart",
    "calibrated": f"`calibrated-fusion` (`fast`), half of the neurons of layers {LAYERS}, {TOKENS:,} tokens",
}


# ------------------------------------------------------------------------------------------ inside the process
def config(layers: int, **more: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": D, "intermediate_size": FF, "vocab_size": WORDS, "num_attention_heads": 32}
    return LlamaConfig(**{**sizes, **more}, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])


def write_checkpoint(folder: Path, layers: int) -> None:
    """Shards of at most 2 GB, one tensor in memory at a time but for a shard's own."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    told = config(layers)
    told.dtype = "bfloat16"
    with torch.device("meta"):
        model = LlamaForCausalLM(told)
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, value in model.state_dict().items():
        if held + 2 * value.numel() > SHARD:
            shards.append({})
            held = 0
        shards[-1][name], held = value.shape, held + 2 * value.numel()
    generator, places = torch.Generator().manual_seed(0), {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        drawn = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(drawn, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    told.save_pretrained(folder)
    index = {"metadata": {"total_size": 2 * sum(p.numel() for p in model.parameters())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def method(arm: str, layers: str = "all") -> Any:
    import ffnkit as fk
    from ffnkit import methods

    if arm == "fusion":
        return fk.Fusion(width=0.5, restarts=1, layers=layers)
    if arm == "magnitude":
        return methods.build("magnitude", width=0.5, layers=layers)
    return fk.CalibratedFusion(width=0.5, layers=LAYERS if layers == "all" else layers, effort="fast")


def batches(arm: str, words: int, tokens: int) -> Any:
    """Random sequences of 500 tokens, two in a batch."""
    import torch

    if arm != "calibrated":
        return None
    ids = torch.randint(0, words, (max(tokens // 500, 2), 500), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


def measure_arm(arm: str, folder: str) -> dict[str, Any]:
    """One row of the results."""
    import torch
    from transformers import LlamaForCausalLM

    import ffnkit as fk
    from ffnkit.report.environment import machine

    place = Path(folder)
    with tempfile.TemporaryDirectory(dir=place.parent) as aside:
        small, out = Path(aside) / "small", Path(aside) / "out"
        tiny = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 2}
        LlamaForCausalLM(config(4, **tiny)).save_pretrained(small)
        fk.compress(small, method(arm), out, batches(arm, 64, 1000), stream=True)
        forget(place)
        base = loaded_bytes()
        data = batches(arm, WORDS, TOKENS)
        spent = cost(lambda: fk.compress(place, method(arm), out, data, stream=True), base)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        read = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        forget(place)
        copied = copy_seconds(place, Path(aside) / "copy")
    return {
        "name": arm,
        "what": ARMS[arm],
        "seconds": spent.seconds,
        "processor_s": spent.processor_seconds,
        "peak_beyond_bytes": spent.peak_bytes,
        "interpreter_bytes": base,
        "read_bytes": read,
        "written_bytes": written,
        "copy_s": copied,
        "one_layer": None if arm == "calibrated" else one_layer(arm),
        "threads": torch.get_num_threads(),
        "cpu": machine()["cpu"],
        "load_average": load_average(),
    }


def one_layer(arm: str) -> dict[str, float]:
    """Seconds of the clock and of the processor that planning and applying take on one layer in memory."""
    from transformers import LlamaForCausalLM

    import ffnkit as fk

    model = LlamaForCausalLM(config(1, vocab_size=64)).bfloat16()
    spent = cost(lambda: fk.apply(model, fk.plan(model, method(arm))), loaded_bytes())
    return {"seconds": spent.seconds, "processor_s": spent.processor_seconds, "peak_bytes": spent.peak_bytes}


def forget(folder: Path) -> None:
    """Have the system drop its pages of a folder's files, so that they are read from the disk."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy_seconds(folder: Path, out: Path) -> float:
    out.mkdir()
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as source, open(out / file.name, "wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            target.flush()
            os.fsync(target.fileno())
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------- outside the process
def page(results: dict[str, Any]) -> str:
    layers = results["conditions"]["layers"]
    rows = [["", "peak", "seconds", "of the processor", "arithmetic", "of the processor", "a copy"]]
    rows.append(["---", *["---:"] * 6])
    for row in results["rows"]:
        took = [row["seconds"], row["processor_s"]]
        one = row["one_layer"] and [row["one_layer"][name] * layers for name in ("seconds", "processor_s")]
        cells = [f"{value:.0f}" for value in took] + ([f"{value:.0f}" for value in one] if one else ["", ""])
        rows.append([row["what"], f"{row['peak_beyond_bytes'] / 1e9:.2f} GB", *cells, f"{row['copy_s']:.0f}"])
    whole = results["rows"][0]["read_bytes"] / 1e9
    loads = ", ".join(f"{row['load_average']:.1f}" for row in results["rows"])
    lines = [
        f"# Compressing {layers} layers of LLaMA-7B's shape from their files",
        "",
        f"d {D}, ff {FF}, {WORDS:,} words, bf16, {whole:.1f} GB in shards of 2 GB. A layer is 0.4 GB, its FFN 0.27 GB.",
        "Memory hangs on one layer, not on how many there are; seconds grow with them (32 layers: 13.5 GB).",
        "",
        table(rows),
        "",
        *footer(results, results["rows"][0]["threads"]),
        f"- peak: beyond interpreter and libraries. arithmetic: plan and apply on one layer in memory, times {layers}.",
        "- a copy: seconds to read and write the files that are read, synced.",
        *(f"- {row['what']}: on {row['cpu']}." for row in results["rows"] if row["cpu"] != results["machine"]["cpu"]),
        f"- The machine had other work, which seconds of the clock hold: load averages {loads}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ffnkit-7b")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure_arm(*args.worker)))
        return
    folder = args.folder / f"{args.layers}-layers"
    if not (folder / "model.safetensors.index.json").is_file():
        write_checkpoint(folder, args.layers)
    results = resumed(args.out, "stream", {"layers": args.layers})
    for arm in args.arms:
        results["rows"] = [row for row in results["rows"] if row["name"] != arm]
        results["rows"].append(in_process(__file__, arm, str(folder)))
        results["rows"].sort(key=lambda row: list(ARMS).index(row["name"]))
        write(args.out, "stream", results, page)


if __name__ == "__main__":
    sys.exit(main())
