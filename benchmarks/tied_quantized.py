"""A decoder whose layers share an FFN, in 4 bits or int8, with adapters: bytes, and perplexity on stories.

    FFNKIT_MODELS=... FFNKIT_DATA=... python benchmarks/tied_quantized.py [--steps 200] [--out benchmarks/results]

stories260K; three of its five layers share one FFN (the best window), which is tuned whole for a while. That model is
quantized when it is opened, and LoRA adapters on all FFNs train over it: one that the three layers share, or one for
each. Needs `pip install -e '.[quantized]'`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, footer, started, write

SETTINGS = {"batch_size": 4, "max_length": 256}
BASES = ("float32", "int8 (torchao)", "int8", "nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of the recovery, and of each run of LoRA")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = started()
    results["steps"] = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        measured(Path(folder), arguments.steps, results)
    write(arguments.out, "tied_quantized", results, page)


def measured(folder: Path, steps: int, results: dict[str, Any]) -> None:
    import ffnkit as fk
    from ffnkit import tasks, tune

    source = Path(os.environ["FFNKIT_MODELS"]) / "stories260K"
    task: Any = tasks.get("tinystories")
    splits = task.splits(os.environ["FFNKIT_DATA"], seed=0)
    tokenizer = task.load_tokenizer(str(source))

    def perplexity(model: Any) -> float:
        return float(tune.evaluate(model, tokenizer, task, splits.report, max_length=256, batch_size=16)["perplexity"])

    def trained(model: Any, tuner: Any, rate: float, name: str) -> Any:
        settings = tune.TrainSettings(steps=steps, eval_every=steps, learning_rate=rate, **SETTINGS)
        where = folder / name.replace(" ", "-")
        return tune.train(model, tokenizer, task, splits, settings, tuner=tuner, seed=0, out_dir=where, progress=False)

    def row(name: str, model: Any, **more: Any) -> None:
        entry = {"name": name, "perplexity": perplexity(model), "bytes": held(model), **more}
        results["rows"].append(entry)
        print(entry, flush=True)

    model: Any = task.load_model(str(source), tokenizer=tokenizer)
    row("as it came", model)
    calibration = tune.CalibrationSettings(tokens=6400, max_length=256)
    batches = tune.calibration_batches(model, tokenizer, calibration, task=task, rows=splits.train)
    fk.apply(model, fk.plan(model, fk.Merging(window=3), data=batches))
    row("three layers tied", model)
    fk.save(trained(model, "full", 1e-3, "recovery").model, folder / "tied", tokenizer=tokenizer)
    for base in BASES:
        opened = fk.load(folder / "tied", quantization_config=quantization(base))
        fk.save(opened, folder / "file")
        size = (folder / "file" / "model.safetensors").stat().st_size
        row(f"tied and tuned, {base}", opened, file=size)
        for tied in ("shared", "each"):
            fresh = fk.load(folder / "tied", quantization_config=quantization(base))
            start = time.perf_counter()
            result = trained(fresh, {"name": "lora", "tied": tied, "head": False}, 3e-3, f"{base} {tied}")
            seconds = time.perf_counter() - start
            row(f"LoRA {tied} on {base}", result.model, trained=result.trainable_parameters, seconds=seconds)


def quantization(base: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if base == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if base == "float32":
        return None
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def held(model: Any) -> int:
    """Bytes of the model's tensors, scales of quantized weights included, shared ones once."""
    found: dict[int, int] = {}
    for value in model.state_dict().values():
        parts = [value]
        if hasattr(value, "__tensor_flatten__") and type(value).__module__.startswith("torchao"):
            parts = [part for name in value.__tensor_flatten__()[0] if (part := getattr(value, name)) is not None]
        found |= {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    return sum(found.values())


def page(results: dict[str, Any]) -> str:
    rows = results["rows"]
    lines = [
        "# A tied decoder, quantized and adapted",
        "",
        f"stories260K on the stories kept for the report, {results['steps']} steps of recovery of the whole model, "
        f"then {results['steps']} of LoRA (rank 8) on its FFNs; one seed. Bytes are of the tensors in memory, adapters "
        "merged in float at the end; a file is of the compact form.",
        "",
        "| | perplexity | bytes in memory | bytes of the file | trained | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        extra = [f"{row['file']:,}" if "file" in row else "", f"{row['trained']:,}" if "trained" in row else ""]
        extra.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        lines.append(f"| {row['name']} | {row['perplexity']:.3f} | {row['bytes']:,} | {' | '.join(extra)} |")
    loads = ", ".join(f"{each:.1f}" for each in results["load"] if each is not None)
    return "\n".join([*lines, "", *footer(results), f"- Load of the machine at the start and the end: {loads}.", ""])


if __name__ == "__main__":
    main()
