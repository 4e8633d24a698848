"""Every method on MiniLM before any tuning: FFN output, hidden states and the NTK, at a quarter and half of the width.

    FFNKIT_DATA=... OMP_NUM_THREADS=1 python benchmarks/methods_table.py [--rows 872] [--first] [--out FOLDER]

As MLP Fusion has it, the kernel is that at the start of fine-tuning: the pretrained body with a fresh head (drawn with
seed 0, the same for all rows), f = softmax(logits)[0], theta the FFN tensors of all layers. Methods that measure
activations see 6,400 tokens of the train split; all figures are of rows of the official validation split, at most
--rows of them. Results are kept after each task and width: run again, it goes on. With --first as in the released check
of MLP Fusion: the first layer alone is compressed, and theta are its FFN's tensors; with a fresh head, and with a model
that was tuned for 60 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ffnkit as fk
from ffnkit import methods, tasks, tune
from ffnkit.analysis.ntk import NtkSettings
from ffnkit.analysis.result import Analysis
from ffnkit.analysis.study import Candidate
from ffnkit.io.files import write_text
from ffnkit.io.quickstart import model_path
from ffnkit.report.environment import machine, versions
from ffnkit.tasks.running import by_length

TASKS, WIDTHS = ("sst2", "mrpc"), (0.25, 0.5)
NAMES = (
    *("fusion", "calibrated-fusion", "clustering", "sketch", "svd", "mmd"),
    *("random", "magnitude", "importance", "reinit", "unstructured"),
)
FOLDED = ("fusion", "calibrated-fusion")
MAX_LENGTH, BATCH, EXAMPLES, MEMORY, TOKENS, SEED = 128, 16, 48, 1536 << 20, 6400, 0
TUNED = tune.TrainSettings(steps=60, learning_rate=2e-4, batch_size=32, max_length=64, eval_every=60, device="cpu")
SHORT = ("absolute", "relative", "centred")
COLUMNS = ("FFN output", "hidden", "NTK sgd", "NTK adam", "ccos sgd", "ccos adam")


class Study:
    """One task at a time; methods that see weights only are planned once a width for all tasks."""

    def __init__(self, rows: int, layers: str = "all") -> None:
        self.rows, self.layers = rows, layers
        self.plans: dict[tuple[str, float], Any] = {}

    def analyse(self, name: str, width: float, head: str = "fresh") -> Analysis:
        """All methods on one task at one width; ``head`` "tuned" tunes the whole model first."""
        task = tasks.get(name)
        tokenizer = task.load_tokenizer(model_path())
        tune.seed_everything(SEED)
        model = task.load_model(model_path(), tokenizer=tokenizer)
        splits = task.splits(seed=SEED, report_limit=self.rows)
        if head == "tuned":
            self.plans.clear()  # of other weights
            with tempfile.TemporaryDirectory() as folder:
                few = task.splits(seed=SEED, dev=200)
                model = tune.train(model, tokenizer, task, few, TUNED, out_dir=folder, progress=False).model
        settings = tune.CalibrationSettings(tokens=TOKENS, max_length=MAX_LENGTH)
        calibration = tune.calibration_batches(model, tokenizer, settings, task=task, rows=splits.train, seed=SEED)
        encoded = task.encode(splits.report, tokenizer, MAX_LENGTH)
        rest = [int(i) for i in by_length(encoded) if i >= EXAMPLES]
        order = [*range(EXAMPLES), *rest]  # the kernel is of the first rows, whatever their length
        collate = task.collator(tokenizer, model)
        batches = [collate([encoded[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        ntk = NtkSettings(examples=EXAMPLES, layers=self.layers, memory=MEMORY)
        return fk.analyze(model, self.candidates(model, width, calibration), data=batches, ntk=ntk)

    def candidates(self, model: Any, width: float, calibration: list[Any]) -> dict[str, Candidate]:
        found = {}
        for name in NAMES:
            method = methods.build(name, width=width, layers=self.layers)
            needed = getattr(method, "needs_data", False)
            if needed or (name, width) not in self.plans:
                self.plans[name, width] = fk.plan(model, method, data=calibration if needed else None)
            plan = self.plans[name, width]
            found[name] = Candidate(plan)
            if name in FOLDED:
                found[f"{name}, folded"] = Candidate(plan, fold=True)
        return found


def table(results: dict[str, Any], width: float) -> str:
    """A line a method: the figures of each task beside each other."""
    runs = {task: results["runs"].get(f"{task} {width}") for task in TASKS}
    runs = {task: run for task, run in runs.items() if run is not None}
    header = ["", *(f"{task} {column}" for task in runs for column in COLUMNS)]
    lines = [header, [":--", *["--:"] * (len(header) - 1)]]
    for number, row in enumerate(next(iter(runs.values()))["rows"]):
        cells = [row["name"]]
        for run in runs.values():
            own, total = run["rows"][number], run["rows"][number]["ntk"]["total"]
            figures = [own["output_error"]["mean"], own["hidden_error"]["last"][""]]
            figures += [total[kind][key] for key in ("relative", "centred") for kind in ("sgd", "adam")]
            cells += [f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}" for value in figures]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said = results["conditions"]
    parts = ["# Every method before any tuning (MiniLM)", ""]
    for width, words in zip(WIDTHS, ("A quarter of the width", "Half of the width"), strict=True):
        if any(f"{task} {width}" in results["runs"] for task in TASKS):
            parts += [f"## {words}", "", table(results, width), ""]
    rows = ", ".join(
        f"{run['rows_measured']} of {key.split()[0]}" for key, run in results["runs"].items() if "0.25" in key
    )
    parts += [
        "- FFN output: relative error of each FFN's output on the uncompressed model's inputs, mean over the six.",
        "- hidden: relative error of the last block's output, both models run whole.",
        "- NTK: ||K_after - K_before||_F / ||K_before||_F; sgd: K = G G^T, adam: K = G sign(G)^T.",
        "- ccos: cosine of the two kernels without their row and column means, 1 where they tell examples apart alike;"
        " without centring it is at least 0.96 for every method (in the JSON), for the gradients of a fresh head share"
        " a large common part.",
        f"- Kernels on {said['examples']} validation rows, gradients of the FFN tensors of all layers,"
        f" f = softmax(logits)[0]; pretrained body and a fresh head drawn with seed {said['seed']}, as at the start of"
        " fine-tuning.",
        f"- Errors on validation rows: {rows}; padding masked, at most {said['max_length']} tokens a row.",
        f"- Methods that measure activations saw {said['calibration_tokens']:,} tokens of the task's train split.",
        "- folded: the factor in front of down multiplied into it; the same function with another kernel.",
        f"- torch {results['versions']['torch']}, transformers {results['versions']['transformers']};"
        f" {results['machine']['torch_threads']} thread of {results['machine']['cpu']}.",
    ]
    return "\n".join(parts) + "\n"


def told(results: dict[str, Any]) -> dict[str, Any]:
    """The results with a short record for each line of the tables, which pages are traced to."""
    rows = [
        {
            **{"name": row["name"], "run": key, "FFN output": row["output_error"]["mean"]},
            "hidden": row["hidden_error"]["last"][""],
            **{kind: {k: row["ntk"]["total"][kind][k] for k in SHORT} for kind in ("sgd", "adam")},
        }
        for key, run in results["runs"].items()
        for row in run["rows"]
    ]
    return {**results, "table": rows}


def first_page(results: dict[str, Any]) -> str:
    """The Markdown page of the first layer alone."""
    parts = ["# The kernel of the first layer alone, a quarter of its width (MiniLM)", ""]
    for key, run in results["runs"].items():
        task, head = key.split()
        size = run["rows"][0]["ntk"]["total"]["adam"]
        before = size["absolute"] / size["relative"]
        parts += [f"## {task}, {head} {'model' if head == 'tuned' else 'head'}: the kernel's size is {before:.4g}", ""]
        parts += ["|  | FFN output | NTK adam, absolute | relative | ccos adam | NTK sgd, relative |"]
        parts += ["| :-- | --: | --: | --: | --: | --: |"]
        for row in run["rows"]:
            total = row["ntk"]["total"]
            figures = [row["output_error"]["mean"]]
            figures += [total["adam"][name] for name in ("absolute", "relative", "centred")] + [
                total["sgd"]["relative"]
            ]
            parts.append(f"| {row['name']} | {' | '.join(f'{value:.4g}' for value in figures)} |")
        parts.append("")
    said = results["conditions"]
    parts += [
        "- As in the released check of MLP Fusion: the FFN of layer 0 is compressed, theta are its up, down and biases,"
        " f = softmax(logits)[0], the distance is ||K_after - K_before||_F with K = G sign(G)^T.",
        f"- {said['examples']} validation rows, where the released check takes all of them; pretrained body and a head"
        f" drawn with seed {said['seed']} (fresh), or the whole model tuned for {TUNED.steps} steps before (tuned).",
        f"- torch {results['versions']['torch']}, transformers {results['versions']['transformers']};"
        f" {results['machine']['torch_threads']} thread of {results['machine']['cpu']}.",
    ]
    return "\n".join(parts) + "\n"


def first(rows: int, out: Path) -> None:
    """The first layer alone, a quarter of its width."""
    conditions = {
        **{"model": "sentence-transformers/all-MiniLM-L6-v2", "seed": SEED, "rows": rows, "layers": "0"},
        **{"max_length": MAX_LENGTH, "examples": EXAMPLES, "calibration_tokens": TOKENS, "width": WIDTHS[0]},
    }
    file = out / "methods_ntk_first.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if results.get("conditions") != conditions:
        results = {"conditions": conditions, "versions": versions(), "machine": machine(), "runs": {}}
    for head in ("fresh", "tuned"):
        for task in TASKS:
            if (key := f"{task} {head}") in results["runs"]:
                continue
            found = Study(rows, "0").analyse(task, WIDTHS[0], head)
            results["runs"][key] = found.to_dict()
            write_text(file, json.dumps(told(results), indent=1) + "\n")
            write_text(out / "methods_ntk_first.md", first_page(results))
            print(f"{key}\n{found}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--first", action="store_true", help="the first layer alone")
    options = parser.parse_args()
    if options.first:
        first(options.rows, options.out)
        return
    conditions = {
        **{"model": "sentence-transformers/all-MiniLM-L6-v2", "seed": SEED, "rows": options.rows},
        **{"max_length": MAX_LENGTH, "examples": EXAMPLES, "calibration_tokens": TOKENS, "ntk_layers": "all"},
    }
    file = options.out / "methods_ntk.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if results.get("conditions") != conditions:
        results = {"conditions": conditions, "versions": versions(), "machine": machine(), "runs": {}}
    study = Study(options.rows)
    for width in WIDTHS:
        for task in TASKS:
            key = f"{task} {width}"
            if key in results["runs"]:
                continue
            found = study.analyse(task, width)
            count = min(options.rows, {"sst2": 872, "mrpc": 408}[task])
            results["runs"][key] = {"rows_measured": count, **found.to_dict()}
            write_text(file, json.dumps(told(results), indent=1) + "\n")
            write_text(options.out / "methods_ntk.md", page(results))
            print(f"{key}\n{found}\n", flush=True)


if __name__ == "__main__":
    main()
