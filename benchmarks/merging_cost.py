"""What merging costs and saves: the search on the shapes of GPT-2 Large, and a tied model beside the untied one.

    python benchmarks/merging_cost.py [--case search] [--case tied] [--layers 36] [--window 2]

`search`: features of 10,000 tokens of every FFN, then every window of so many layers matched; a randomly initialised
model in float32. Features lie in files that are memory-mapped; memory is that of the process without mapped files,
sampled, beyond the loaded model. `tied`: GPT-2's small shape, seven of twelve FFNs made one, saved in both forms; each
is opened in a fresh process, compared, and takes one step of AdamW.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, cost, footer, in_process, load_average, loaded_bytes, started, time_calls, write

TOKENS = 10_000
LENGTH = 500
VOCABULARY = 1024  # of the search's model: the embedding plays no part


# ------------------------------------------------------------------------------------------ inside the process
def anonymous_bytes() -> int:
    """Resident memory of the process without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell the memory apart from mapped files (RssAnon)")


@contextmanager
def sampled(every: float = 0.01) -> Iterator[Callable[[], int]]:
    """The highest anonymous memory so far, sampled in a thread."""
    top, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            top[0] = max(top[0], anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: top[0]
    finally:
        stop.set()
        thread.join()


def gpt2(d: int, heads: int, layers: int, vocabulary: int) -> Any:
    """A decoder of GPT-2's form, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=d, n_head=heads, n_layer=layers, n_positions=LENGTH)
    return GPT2LMHeadModel(config).eval()


def search(layers: int, window: int) -> dict[str, Any]:
    """Features and the search of all windows."""
    import torch

    import ffnkit as fk
    from ffnkit.methods.share import merging

    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (TOKENS // LENGTH, LENGTH), generator=draw)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    small = gpt2(32, 2, 4, VOCABULARY)
    fk.plan(small, fk.Merging(window=2, tokens=100), data=data[:1])  # loads what is loaded once
    del small
    model = gpt2(1280, 20, layers, VOCABULARY)
    calls = {name: time_calls(merging, name, keep=False) for name in ("Features", "spread", "correlation", "assign")}
    loaded_bytes()  # gives freed memory back
    base = anonymous_bytes()
    row: dict[str, Any] = {"case": "search", "layers": layers, "ff": 5120, "tokens": TOKENS, "window": window}
    row |= {"threads": torch.get_num_threads(), "load_average": load_average()}
    with sampled() as top:
        start = time.perf_counter()
        plan = fk.plan(model, fk.Merging(window=window), data=data)
        row["seconds"] = time.perf_counter() - start
        row["peak_beyond_model_bytes"] = top() - base
    row["pairs"] = len(calls["assign"])
    row |= {f"{name.lower()}_s": sum(call.seconds for call in made) for name, made in calls.items()}
    row["assignment_share"] = row["assign_s"] / row["seconds"]
    row["feature_bytes"] = layers * 5120 * TOKENS * 4
    row["pair_matrix_bytes"] = 5120 * 5120 * 4
    row["chosen"] = plan.report["groups"]
    return row


def make_tied(folder: Path) -> None:
    """The tied model in both forms, and what it answers."""
    import torch
    from safetensors.torch import save_file

    import ffnkit as fk

    model = gpt2(768, 12, 12, 50257)
    fk.apply(model, fk.plan(model, fk.Merging(layers="3-9", match=False)))
    fk.save(model, folder / "tied")
    fk.export(model, folder / "untied")
    ids = torch.arange(128)[None]
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits[0, -1].contiguous()}, folder / "answer.safetensors")


def opened(form: str, folder: Path) -> dict[str, Any]:
    """One form in this process: bytes, outputs, a step of tuning."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import ffnkit as fk
    from ffnkit.report import measure

    small = gpt2(32, 2, 2, 64)
    ids = torch.arange(128)[None]
    step(small, ids % 64)
    del small
    base = loaded_bytes()
    path = folder / form
    model = (fk.load(path) if form == "tied" else AutoModelForCausalLM.from_pretrained(path)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what is mapped from the file becomes memory of the process
    row: dict[str, Any] = {"case": form, "parameters": sum(p.numel() for p in model.parameters())}
    row["bytes_on_disk"] = measure.bytes_on_disk(path).total
    row["loaded_bytes"] = loaded_bytes() - base
    with torch.no_grad():
        answer = model(input_ids=ids).logits[0, -1]
        started_at = time.perf_counter()
        for _ in range(5):
            model(input_ids=ids)
        row["forward_s"] = (time.perf_counter() - started_at) / 5
    wanted = load_file(folder / "answer.safetensors")["logits"]
    row["largest_difference"] = (answer - wanted).abs().max().item()
    spent = cost(lambda: step(model, ids), base)
    return row | {"step_s": spent.seconds, "step_peak_bytes": spent.peak_bytes}


def step(model: Any, ids: Any) -> None:
    """One step of AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


# ----------------------------------------------------------------------------------------- outside the process
def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# What merging costs and saves", ""]
    for row in results["rows"]:
        if row["case"] != "search":
            continue
        rest = row["seconds"] - sum(row[f"{name}_s"] for name in ("features", "spread", "correlation", "assign"))
        mega, peak = row["pair_matrix_bytes"] / 1e6, row["peak_beyond_model_bytes"] / 1e6
        shape = f"{row['layers']} layers, ff 5120, random weights, {row['tokens']:,} tokens"
        lines += [
            f"Search on GPT-2 Large's shape ({shape}), windows of {row['window']}: {row['pairs']} pairs, "
            f"{row['threads']} thread.",
            "",
            "| part | seconds | share |",
            "|:--|--:|--:|",
            *(
                f"| {word} | {seconds:.1f} | {seconds / row['seconds']:.0%} |"
                for word, seconds in (
                    ("features, one forward pass", row["features_s"]),
                    ("means and deviations", row["spread_s"]),
                    ("correlations", row["correlation_s"]),
                    ("assignments", row["assign_s"]),
                    ("else", rest),
                    ("all", row["seconds"]),
                )
            ),
            "",
            f"Peak memory beyond the loaded model and the mapped features ({row['feature_bytes'] / 1e9:.1f} GB of "
            f"files): {peak:,.0f} MB, {peak / mega:.1f} times one pair's matrix of {mega:.0f} MB. A pair takes "
            f"{(row['correlation_s'] + row['assign_s']) / max(row['pairs'], 1):.1f} s.",
            "",
        ]
    forms = [row for row in results["rows"] if row["case"] != "search"]
    if forms:
        lines += [
            "GPT-2's small shape, FFNs 3 to 9 made one, opened in fresh processes:",
            "",
            "| form | parameters | on disk | loaded | a step of AdamW, peak | forward | step | outputs differ by |",
            "|:--|--:|--:|--:|--:|--:|--:|--:|",
            *(
                f"| {row['case']} | {row['parameters'] / 1e6:.1f} M | {row['bytes_on_disk'] / 1e6:.0f} MB "
                f"| {row['loaded_bytes'] / 1e6:.0f} MB | {row['step_peak_bytes'] / 1e6:,.0f} MB "
                f"| {row['forward_s'] * 1e3:.0f} ms | {row['step_s']:.2f} s | {row['largest_difference']:.1e} |"
                for row in forms
            ),
            "",
            "Tying saves bytes, not operations: forward passes take as long.",
            "",
        ]
    lines += footer(results, results["rows"][0].get("threads"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases one after the other and write merging_cost.json and merging_cost.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=("search", "tied", "untied"), action="append", help="default: all")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case = options.case[0]
        row = search(options.layers, options.window) if case == "search" else opened(case, options.folder)
        print(json.dumps(row))
        return
    results = started()
    cases = options.case or ["search", "tied", "untied"]
    with tempfile.TemporaryDirectory() as folder:
        if set(cases) & {"tied", "untied"}:
            make_tied(Path(folder))
        for case in cases:
            print(f"{case} ...", file=sys.stderr, flush=True)
            more = ["--layers", str(options.layers), "--window", str(options.window), "--folder", folder]
            results["rows"].append(in_process(__file__, "--case", case, *more, threads=options.threads))
    write(options.out, "merging_cost", results, markdown)


if __name__ == "__main__":
    main()
