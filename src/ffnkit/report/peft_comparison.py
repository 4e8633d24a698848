"""Results in the fields of PEFT's method comparison: ``python -m ffnkit.report.peft_comparison RUN --out DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import write_text

PACKAGES = ("transformers", "peft", "datasets", "torch")
OWN = (
    "status",
    "settings",
    "parameters",
    "ffn_parameters",
    "flops_per_token",
    "bytes_on_disk_compact",
    "bytes_on_disk_standard",
    "bytes_on_disk_apart",
    "latency_s",
    "latency_ratio",
    "peak_memory_bytes",
    "process_memory_bytes",
    "updated_parameters",
    "trainable_body",
    "trainable_share",
    "samples_per_second",
    "steps_per_second",
    "heads_removed",
    "neurons_removed",
    "seconds",
    "zeros",
    "zeros_merged",
    "pruning",
    "neutral_loss",
    "machine",
)


def to_peft_comparison(row: Mapping[str, Any], recipe: Mapping[str, Any], metric: str = "accuracy") -> dict[str, Any]:
    """One row of results.json as PEFT writes the result of one experiment: ``run_info``, ``train_info``, ``meta_info``.

    Fields that are not known here, or that say something else there, are left out: dates, commits, the accelerator's
    reserved memory, the size of the adapter's file, losses by step. What PEFT has no field for stands under ``ffnkit``.

    Args:
        row: of results.json. recipe: as results.json holds it under "recipe". metric: the main one.

    Source: PEFT, method_comparison/MetaMathQA, ``log_results`` in utils.py.
    Differs: ``num_total_params`` counts the model that came out, with updates merged; ``peft_config`` is there for
        LoRA, null for whole-model tuning as in PEFT, and left out for the tuners that PEFT does not have.
    """
    tune = {**recipe["tune"], **(row["settings"].get("tune") or {})}
    tuner = row["settings"]["tuner"]
    seconds = dict(row.get("seconds") or {})
    run: dict[str, Any] = {
        "total_time": sum(seconds.values()),
        "experiment_name": f"{tuner['name']}/{row['arm']}-seed{row['seed']}",
        "train_config": _train_config(recipe["model"], tune, row["seed"]),
        "error_msg": row.get("error") or "",
    }
    if tuner["name"] in ("lora", "full"):
        run["peft_config"] = _lora(tuner, recipe["model"]) if tuner["name"] == "lora" else None
    train: dict[str, Any] = {
        "train_time": seconds.get("tune", 0.0) + seconds.get("recover", 0.0),
        "num_trainable_params": row.get("trainable_parameters"),
        "num_total_params": row.get("parameters"),
        "status": "success" if row["status"] == "done" else "failed",
        "metrics": _metrics(row, tune.get("best_metric") or metric),
    }
    packages = {f"{name}-version": row["versions"][name] for name in PACKAGES if name in (row.get("versions") or {})}
    accelerator = (row.get("machine") or {}).get("accelerator")
    meta: dict[str, Any] = {"package_info": packages}
    if accelerator is not None:
        meta["system_info"] = {"accelerator": accelerator}
    return {
        "run_info": run,
        "train_info": {key: value for key, value in train.items() if value is not None},
        "meta_info": meta,
        "ffnkit": {"version": (row.get("versions") or {}).get("ffnkit"), "tune": tune}
        | {key: row[key] for key in OWN if key in row},
    }


def _train_config(model: str, tune: Mapping[str, Any], seed: int) -> dict[str, Any]:
    steps = {"max_steps": tune["steps"]} if tune.get("steps") is not None else {}
    every = {"eval_steps": tune["eval_every"]} if tune.get("eval_every") is not None else {}
    return {
        "model_id": model,
        "dtype": "float32",  # of the weights, whatever is computed in
        "use_amp": tune["precision"] != "fp32",
        "max_seq_length": tune["max_length"],
        "batch_size": tune["batch_size"],
        "batch_size_eval": tune["eval_batch_size"],
        **steps,
        **every,
        "seed": seed,
        "grad_norm_clip": tune["max_grad_norm"],
        "optimizer_type": tune["optimizer"],
        "optimizer_kwargs": {"lr": tune["learning_rate"], "weight_decay": tune["weight_decay"]},
        "lr_scheduler": tune["schedule"],
    }


def _lora(tuner: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What peft's LoraConfig calls the tuner's settings; those that the row leaves out have their defaults."""
    from ffnkit.tune.tuners import get

    full = get(dict(tuner)).model_dump()
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "r": full["rank"],
        "lora_alpha": full["alpha"],
        "lora_dropout": full["dropout"],
        "bias": full["bias"],
    }


def _metrics(row: Mapping[str, Any], chosen: str) -> list[dict[str, Any]]:
    """What was measured on dev at the best step, and the metrics on the split that is only reported."""
    entries: list[dict[str, Any]] = []
    if row.get("dev_metric") is not None:
        entries.append({"step": row.get("best_step"), f"valid {chosen}": row["dev_metric"]})
    if row.get("metrics"):
        entries.append({"step": row.get("steps"), **{f"test {name}": value for name, value in row["metrics"].items()}})
    return entries


def write_peft_comparison(run: str | Path, out: str | Path) -> list[Path]:
    """One file for each row of a run that was run, ``ARM-seedN.json``; the paths come back.

    Raises:
        FfnkitError: the folder holds no results.json.
    """
    path = Path(run) / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recipe, rows = content["recipe"], content["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise FfnkitError(
            f"run {run}", f"its results.json cannot be read ({error})", "Name a folder of a run"
        ) from None
    written = []
    for row in rows:
        if row["status"] == "not run":
            continue
        target = Path(out) / f"{row['arm']}-seed{row['seed']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(to_peft_comparison(row, recipe, content["metric"]), indent=2) + "\n")
        written.append(target)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; 1 where the run cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m ffnkit.report.peft_comparison", description=__doc__)
    parser.add_argument("run", help="folder of a run, with its results.json")
    parser.add_argument("--out", required=True, help="folder for one JSON file an arm and seed")
    given = parser.parse_args(arguments)
    try:
        written = write_peft_comparison(given.run, given.out)
    except FfnkitError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{len(written)} files in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
