"""Kill ffnkit at random moments while it writes, and look at what is left.

    python tools/kill.py --kills 300 --seed 0

A forked process saves, exports, saves plans and adapters or runs a recipe over and over, each time with another number
in every part of the output, and is killed with SIGKILL after a random time. Then the target must hold one number in all
of its parts, open, and keep a file of the user's; what the next output beside it does not sweep is told as well. A
recipe is killed until it comes to its end, which must be that of one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from transformers.utils import logging

import ffnkit as fk
from ffnkit.checkpoint.adapters import load_adapter, save_adapter
from ffnkit.io import workspace
from ffnkit.recipe.job import run
from ffnkit.recipe.schema import Recipe, recipe_from

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "meal", "day"]
KINDS = ("save", "export", "plan", "adapter", "run")


def model(number: float = 0.0) -> Any:
    """A tiny classifier, every weight of it the number; its config says the number too."""
    config = BertConfig(
        vocab_size=15, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, number=number
    )
    made = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(number)
    return made


def adapted(number: float) -> Any:
    """The classifier of zeros with an update whose numbers are the number."""
    made = model()
    fk.apply(made, fk.plan(made, fk.SparseGrad(density=0.05, basis="none", choose="magnitude")))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "layer" in name:
                parameter.fill_(number)
    return made


def write(kind: str, number: int, out: Path) -> None:
    """One output of a kind with this number in all of its parts."""
    if kind == "save":
        fk.save(model(number), out, card=f"number {number}", max_shard_size="3KB")
    elif kind == "export":
        fk.export(model(number), out, card=f"number {number}", max_shard_size="3KB")
    elif kind == "plan":
        fk.plan(model(), fk.Fusion(width=0.25 if number % 2 else 0.5)).save(out / "plan")
    else:
        save_adapter(adapted(number), out)


def numbers(kind: str, out: Path) -> set[float]:
    """The numbers that an output holds: one, where it is whole."""
    if kind in ("save", "export"):
        opened = fk.load(out) if kind == "save" else BertForSequenceClassification.from_pretrained(out)
        found = {float(value) for p in opened.parameters() for value in p.detach().aminmax()}
        card = float((out / "README.md").read_text().split()[1])
        shards = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
        assert {path.name for path in out.glob("*.safetensors")} == set(shards), "shards of another output"
        return found | {float(opened.config.number), card}
    if kind == "plan":
        widths = fk.Plan.load(out / "plan").widths().values()
        return {float(after) for _, after in widths}
    trained = dict(load_adapter(model(), out).named_parameters())
    return {float(v) for n, p in trained.items() if p.requires_grad and "layer" in n for v in p.detach().aminmax()}


def recipe(folder: Path) -> Recipe:
    """A recipe on the classifier with a tokenizer and sentences of its own."""
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = BertConfig(vocab_size=15, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, rows in (("train", 60), ("validation", 20)):
        lines = [
            f"{draw.choice(WORDS[3 * (i % 2) : 3 * (i % 2) + 3])} {draw.choice(WORDS[6:])} {i},{i % 2}"
            for i in range(rows)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    files = {name: str(folder / f"{name}.csv") for name in ("train", "validation")}
    return recipe_from(
        {
            "name": "kill",
            "model": str(folder / "model"),
            "task": {**files, "text": "text", "label": "label"},
            "seeds": [0],
            "stages": ["compress", "distil", "tune", "evaluate", "export"],
            "arms": {"whole": {}, "half": {"method": "fusion", "width": 0.5}},
            "tune": {"steps": 6, "batch_size": 8, "max_length": 16, "eval_every": 2},
            "distil": {"steps": 3, "batch_size": 8, "max_length": 16, "save_every": 1},
            "measure": {"latency": False},
        }
    )


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    weights = sorted(out.glob("units/*/*/*/model.safetensors"))
    return {
        "figures": [[row[name] for name in ("arm", "status", "metrics", "dev_metric", "best_step")] for row in rows],
        "weights": {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights},
    }


def forked(work: Callable[[], None], seconds: float | None) -> bool:
    """Run ``work`` in a forked process, killed after so many seconds; True where it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the process failed by itself")
    return os.WIFEXITED(status)


def kill_writes(kind: str, kills: int, draw: random.Random, base: Path) -> Counter[str]:
    """Kill a process that writes outputs of one kind; what was found."""
    out, found = base / "out [1]", Counter[str]()
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    begin = time.perf_counter()
    write(kind, 1, out)
    span = 2.5 * (time.perf_counter() - begin)

    def work(start: int) -> None:
        for number in range(start, start + 1000):
            write(kind, number, out)

    for number in range(kills):
        before = numbers(kind, out)
        forked(lambda start=1000 * number + 2: work(start), draw.uniform(0, span))  # type: ignore[misc]
        left = [name for place in (base, out) for name in os.listdir(place) if name.startswith(workspace.PREFIX)]
        found["killed while it wrote"] += bool(left)
        try:
            now = numbers(kind, out)
            found["the old output" if now == before else "a new output"] += 1
            found["WRONG: a mixture"] += len(now) != 1
        except Exception as error:
            found[f"WRONG: it does not open: {type(error).__name__}: {error}"[:150]] += 1
        found["WRONG: a file of the user's is gone"] += (out / "mine.txt").read_text() != "mine"
        fk.plan(model(), fk.Fusion(width=0.5)).save(base / "beside")
        write(kind, 1, out)
        left = [str(path) for path in base.rglob(f"{workspace.PREFIX}*")]
        found["WRONG: leftovers are not swept"] += bool(left)
    return found


def kill_runs(kills: int, draw: random.Random, base: Path) -> Counter[str]:
    """Kill a recipe until it comes to its end, again and again."""
    base.mkdir()
    wanted, found, number = recipe(base), Counter[str](), 0
    begin = time.perf_counter()
    assert forked(lambda: _run(wanted, base / "calm"), None)
    span, expected = time.perf_counter() - begin, outcome(base / "calm")
    while found["kills"] < kills:
        number += 1
        out = base / f"out-{number}"
        while found["kills"] < kills and not forked(lambda out=out: _run(wanted, out), draw.uniform(0, 0.6 * span)):  # type: ignore[misc]
            found["kills"] += 1
            found["WRONG: results.json is broken"] += (out / "results.json").exists() and not _reads(out)
            for weights in out.glob("units/*/*/compact/model.safetensors"):
                fk.load(weights.parent)
        assert forked(lambda out=out: _run(wanted, out), None)  # type: ignore[misc]
        found["runs that came to their end"] += 1
        found["WRONG: another outcome"] += outcome(out) != expected
        found["WRONG: leftovers are not swept"] += any(out.rglob(f"{workspace.PREFIX}*"))
    return found


def _run(wanted: Recipe, out: Path) -> None:
    results = run(wanted, out, progress=False, isolate=False)
    assert results.ok, results.failed


def _reads(out: Path) -> bool:
    try:
        json.loads((out / "results.json").read_text())
    except ValueError:
        return False
    return True


def main() -> int:
    """Print what was found of each kind; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wrong, begin = 0, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ffnkit-kill-") as folder:
        for index, kind in enumerate(given.kinds):
            kills = given.kills // len(given.kinds) + (index < given.kills % len(given.kinds))
            draw = random.Random(f"{given.seed} {kind}")
            base = Path(folder) / kind
            found = kill_runs(kills, draw, base) if kind == "run" else kill_writes(kind, kills, draw, base)
            told = ", ".join(f"{what}: {count}" for what, count in found.items() if count)
            print(f"{kind}: {kills} kills; {told}", flush=True)
            wrong += sum(count for what, count in found.items() if what.startswith("WRONG"))
    print(f"{wrong} wrong; {time.perf_counter() - begin:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
