"""Damaged inputs: each gives our one-line error, or is read and right; none raises anything else or hangs.

    python tools/fuzz.py --inputs 3000 --seed 0 [--kinds plans configs] [--show]

Good inputs of six kinds are changed at random, from a seed: weights, configs, plans, recipes, tables of data, options
of the command line. What is accepted is used (a forward pass, a reading, a run), and compared with the good input where
the change must not show: tensors gone, renamed or reshaped, and the fields of our own ``quantization_config``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit.cli import app
from ffnkit.errors import FfnkitError
from ffnkit.methods import METHODS
from ffnkit.recipe.loading import load_recipe
from ffnkit.recipe.schema import recipe_from
from ffnkit.tasks import file_task

METHOD = {each.name: each for each in METHODS}
SECONDS, MEMORY = 10, 6 << 30
WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "meal", "day"]
HUGE = 10**6
IDS = torch.arange(1, 13).view(2, 6)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, HUGE, 10**12, 1 << 63, 1e308, float("nan"), float("inf"), 0.5, -0.5, "", "x",
    "0", "a" * 5000, "../..", "\u0000", "ü\ud7ff", [], [[]], [0], ["x"], {}, {"x": 0}, {"kind": "masked"}, [1, 2, 3],
]  # fmt: skip


class Wrong(Exception):
    """An input was accepted, and what came of it is not right."""


class Hang(BaseException):
    """An input took too long."""


Input = tuple[str, Callable[[], None]]  # in words what was changed; reading it, which raises where it is not right


# --- good inputs ----------------------------------------------------------------------------------------------------


def tiny(config: Any, model: Any, **sizes: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4} | sizes
    return model(config(initializer_range=0.3, **sizes)).eval()


def bert() -> Any:
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 32}
    return tiny(transformers.BertConfig, transformers.BertForSequenceClassification, **sizes)


def llama() -> Any:
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 2}
    return tiny(transformers.LlamaConfig, transformers.LlamaForCausalLM, **sizes)


def mixtral() -> Any:
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return tiny(transformers.MixtralConfig, transformers.MixtralForCausalLM, **sizes)


PLANS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "fusion": (bert, lambda: fk.Fusion(width=0.5, layers="last:2")),
    "fusion, gated": (llama, lambda: fk.Fusion(width=0.5)),
    "fusion, experts": (mixtral, lambda: fk.Fusion(width=0.5)),
    "svd": (llama, lambda: METHOD["svd"](width=0.5)),
    "magnitude": (bert, lambda: METHOD["magnitude"](width=0.5)),
    "sketch": (bert, lambda: METHOD["sketch"](width=0.5)),
    "merging": (bert, lambda: fk.Merging(layers="0-1")),
    "ffn-drop": (bert, lambda: METHOD["ffn-drop"](layers="1")),
    "layer-drop": (llama, lambda: METHOD["layer-drop"](layers="1")),
    "heads": (llama, lambda: fk.RemoveHeads(remove=0.5, layers="last:1")),
    "masks": (bert, lambda: METHOD["unstructured"](width=0.5)),
    "prune": (llama, lambda: fk.Prune()),
    "sparsegrad": (bert, lambda: fk.SparseGrad(density=0.1, basis="none", choose="magnitude")),
    "dsee": (llama, lambda: fk.DSEE(rank=2)),
}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check_outputs(found: torch.Tensor, right: torch.Tensor, told: str, off: float = 1e-4) -> None:
    """Raises Wrong where outputs are others."""
    if found.shape != right.shape or not torch.allclose(found, right, rtol=off, atol=off, equal_nan=True):
        raise Wrong(f"other outputs {told}")


def write(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A file of tensors, whatever they share and however they lie."""
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file, metadata=metadata)


def good_plans(base: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    made = {}
    for name, (model, method) in PLANS.items():
        try:
            data = [{"input_ids": IDS}] if isinstance(chosen := method(), fk.Merging) else None
            fk.plan(model(), chosen, data=data).save(file := base / f"{name}.plan")
        except (FfnkitError, TypeError) as error:
            print(f"no plan of {name}: {error}", file=sys.stderr)
            continue
        made[name] = (file, model)
    return made


def good_models(base: Path, plans: dict[str, tuple[Path, Callable[[], Any]]]) -> dict[str, Path]:
    """Compact checkpoints of each plan that changes weights, and a plain one."""
    chosen = {name: made for name, made in plans.items() if name not in ("sparsegrad", "dsee")}
    for name, (path, model) in chosen.items():
        fk.save(fk.apply(model(), fk.Plan.load(path)), base / name)
    bert().save_pretrained(base / "plain")
    return {name: base / name for name in (*chosen, "plain")}


def good_recipe(base: Path) -> str:
    files = {"train": str(base / "train.csv"), "validation": str(base / "validation.csv")}
    return yaml.safe_dump(
        {
            "name": "fuzz",
            "model": str(base / "model"),
            "task": {**files, "text": "text", "label": "label"},
            "seeds": [0, 1],
            "stages": ["compress", "distil", "tune", "evaluate", "export"],
            "arms": {"whole": {}, "half": {"method": "fusion", "width": 0.5, "layers": "last:1"}},
            "tune": {"learning_rate": 1e-3, "steps": 2, "batch_size": 8, "max_length": 16},
            "distil": {"steps": 1, "batch_size": 8},
            "measure": {"latency": False},
            "export": "both",
        },
        sort_keys=False,
    )


def good_data(base: Path) -> None:
    """A model with a tokenizer, and tables for it."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    bert().save_pretrained(base / "model")
    transformers.BertTokenizer(str(base / "vocab.txt")).save_pretrained(base / "model")
    for name, rows in (("train", 60), ("validation", 20)):
        lines = [f"{WORDS[i % 6]} {WORDS[6 + i % 4]} {i},{i % 2}" for i in range(rows)]
        (base / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        rows_of = [{"text": line.split(",")[0], "label": int(line[-1])} for line in lines]
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))


# --- changes --------------------------------------------------------------------------------------------------------


def changed_bytes(data: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """Some bytes flipped, taken out, doubled or put in; in the first ``head`` of them."""
    end = min(len(data), head or len(data))
    place, length = draw.randrange(max(end, 1)), draw.choice((1, 1, 1, 2, 8, 200))
    before, part, after = data[:place], data[place : place + length], data[place + length :]
    how = draw.randrange(5)
    if how == 0:
        return before
    if how == 1:
        return before + after
    if how == 2:
        return before + bytes(draw.randrange(256) for _ in range(length)) + part + after
    if how == 3:
        return before + part * 2 + after
    return before + bytes(b ^ (1 << draw.randrange(8)) for b in part) + after


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed_data(data: Any, draw: random.Random, within: tuple[Any, ...] = ()) -> tuple[str, Any]:
    """Plain data with one or two values exchanged, gone, renamed, doubled or a little off."""
    data = copy.deepcopy(data)
    told = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        paths = [path for path in places(data) if path[: len(within)] == within]
        if not paths:
            break
        path = draw.choice(paths)
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        key, how = path[-1], draw.randrange(8)
        old = holder[key]
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", f"{key}x", ""))] = holder.pop(key)
        elif how == 2 and isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(draw.choice(holder)))
        elif how in (3, 4) and isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = draw.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), old * HUGE))
        elif how == 5 and (same := [p for p in paths if p != path]):
            other = data
            for each in draw.choice(same):
                other = other[each]
            holder[key] = copy.deepcopy(other)
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        there = how and key in (holder if isinstance(holder, dict) else range(len(holder)))
        told.append(f"{'.'.join(map(str, path))[:80]} -> {str(holder[key])[:60] if there else 'gone'}")
    return "; ".join(told), data


def changed_tensor(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A tensor of another shape, dtype or with numbers that cannot be."""
    value = value.clone()
    how = draw.randrange(10)
    if how == 0 and value.ndim:
        return value[: draw.randrange(len(value) + 1)].contiguous()
    if how == 1:
        return torch.cat([value, value]) if value.ndim else value.repeat(3)
    if how == 2:
        return value.flatten()
    if how == 3:
        return value.T.contiguous() if value.ndim == 2 else value[None]
    if how == 4:
        return value.to(draw.choice([torch.int64, torch.bool, torch.float64, torch.float16, torch.int8, torch.uint8]))
    if how == 5:
        return value.new_empty(0)
    if value.numel() and value.dtype != torch.bool:
        extreme = [float("nan"), float("inf"), 1e3] if value.is_floating_point() else [-1, 127, value.numel()]
        value.view(-1)[draw.randrange(value.numel())] = draw.choice(extreme)
    return value


# --- kinds ----------------------------------------------------------------------------------------------------------


class Weights:
    """Files of tensors: damaged bytes, and tensors gone, renamed, added, of other shapes and dtypes."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.models = good_models(base, good_plans(base))
        self.right = {name: outputs(fk.load(path)) for name, path in self.models.items()}

    def copied(self, draw: random.Random) -> tuple[str, Path]:
        """One of the good models, and a copy of it to damage."""
        name, work = draw.choice(sorted(self.models)), self.base / "work"
        shutil.rmtree(work, ignore_errors=True)
        return name, shutil.copytree(self.models[name], work)

    def one(self, draw: random.Random) -> Input:
        name, work = self.copied(draw)
        file = work / "model.safetensors"
        if draw.random() < 0.4:
            data = file.read_bytes()
            file.write_bytes(changed_bytes(data, draw, head=draw.choice((8, 200, 3000, None))))
            return f"{name}: bytes", lambda: self.open(work, None)
        tensors = load_file(file)
        key = draw.choice(sorted(key for key in tensors if "classifier" not in key and "lm_head" not in key))
        how = draw.choice(("gone", "renamed", "changed", "added", "swapped"))
        same = how == "added"
        if how == "gone":
            del tensors[key]
        elif how == "renamed":
            tensors[key + draw.choice(("x", ".weight", ""))[:7] or key] = tensors.pop(key)
        elif how == "changed":
            old = tensors[key]
            tensors[key] = changed_tensor(old, draw)
            same = bool(tensors[key].shape == old.shape and torch.equal(tensors[key].to(old.dtype), old))
        elif how == "added":
            parent = key.rpartition(".")[0]
            tensors[f"{parent}.{draw.choice(('mask', 'scale', 'first', 'second', 'extra'))}"] = torch.ones(3)
        else:
            other = draw.choice(sorted(tensors))
            tensors[key], tensors[other] = tensors[other], tensors[key]
            same = key == other
        write(tensors, file, {"format": "pt"})
        valued = how in ("changed", "swapped") and not same
        return f"{name}: {key} {how}", lambda: self.open(work, None if valued else self.right[name])

    @staticmethod
    def open(work: Path, right: torch.Tensor | None) -> None:
        found = outputs(fk.load(work))
        if right is not None:
            check_outputs(found, right, "than the model's")


class Configs(Weights):
    """config.json of compact and plain checkpoints; what our own description says may not change outputs."""

    def one(self, draw: random.Random) -> Input:
        name, work = self.copied(draw)
        file = work / "config.json"
        text = file.read_text()
        if draw.random() < 0.2:
            file.write_bytes(changed_bytes(text.encode(), draw))
            return f"{name}: bytes", lambda: self.use(work, None)
        data = json.loads(text)
        own = "quantization_config" in data and draw.random() < 0.7
        told, data = changed_data(data, draw, ("quantization_config",) if own else ())
        file.write_text(json.dumps(data))
        heads = "attention" in told  # which heads stayed shows in the numbers alone
        return f"{name}: {told}", lambda: self.use(work, self.right[name] if own and not heads else None)

    def use(self, work: Path, right: torch.Tensor | None) -> None:
        model = fk.load(work)
        if right is None and model.config.vocab_size < 13:
            return
        found = outputs(model)
        if right is not None:
            check_outputs(found, right, "than the model's")
            fk.save(model, work / "again")
            check_outputs(outputs(fk.load(work / "again")), right, "once it is saved")


class Plans:
    """Files of plans and adapters: bytes, their description, their tensors."""

    def __init__(self, base: Path) -> None:
        self.base, self.plans = base, good_plans(base)

    def one(self, draw: random.Random) -> Input:
        name = draw.choice(sorted(self.plans))
        path, model = self.plans[name]
        file = self.base / "work.plan"
        if draw.random() < 0.2:
            file.write_bytes(changed_bytes(path.read_bytes(), draw, head=draw.choice((8, 2000, None))))
            return f"{name}: bytes", lambda: self.use(file, model)
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if draw.random() < 0.5 and tensors:
            key = draw.choice(sorted(tensors))
            told = f"tensor {key}"
            tensors[key] = changed_tensor(tensors[key], draw)
        else:
            told, data = changed_data(json.loads(metadata["ffnkit_plan"]), draw)
            metadata["ffnkit_plan"] = json.dumps(data)
        write(tensors, file, metadata)
        return f"{name}: {told}", lambda: self.use(file, model)

    def use(self, file: Path, make: Callable[[], Any]) -> None:
        plan, model = fk.Plan.load(file), make()
        str(plan), plan.saved_parameters, plan.widths()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            fk.apply(model, plan)
        except FfnkitError:
            after = model.state_dict()
            if after.keys() != before.keys() or not all(torch.equal(after[key], before[key]) for key in before):
                raise Wrong("the model is not as before") from None
            raise
        found = outputs(model)
        if plan.trains:
            return
        fk.save(model, self.base / "saved")
        check_outputs(outputs(fk.load(self.base / "saved")), found, "once it is saved", 1e-3)


class Recipes:
    """Recipes: text and data."""

    def __init__(self, base: Path) -> None:
        good_data(base)
        self.base, self.text = base, good_recipe(base)

    def one(self, draw: random.Random) -> Input:
        file = self.base / "recipe.yaml"
        if draw.random() < 0.5:
            file.write_bytes(changed_bytes(self.text.encode(), draw))
            return "bytes", lambda: self.use(file)
        told, data = changed_data(yaml.safe_load(self.text), draw)
        file.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        return told, lambda: self.use(file)

    @staticmethod
    def use(file: Path) -> None:
        read = load_recipe(file)
        again = recipe_from(json.loads(json.dumps(read.to_dict())))
        if again.to_dict() != read.to_dict():
            raise Wrong("what it says is read otherwise again")


class Data:
    """Tables of texts and labels: csv and jsonl."""

    def __init__(self, base: Path) -> None:
        good_data(base)
        self.base = base

    def one(self, draw: random.Random) -> Input:
        kind = draw.choice(("csv", "jsonl"))
        good = (self.base / f"train.{kind}").read_bytes()
        file = self.base / f"changed.{kind}"
        if draw.random() < 0.5 or kind == "csv":
            for _ in range(draw.choice((1, 1, 3, 20))):
                good = changed_bytes(good, draw)
            file.write_bytes(good)
            return f"{kind}: bytes", lambda: self.use(file)
        rows = [json.loads(line) for line in good.decode().splitlines()]
        told, rows = changed_data(rows, draw)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{kind}: {told}", lambda: self.use(file)

    def use(self, file: Path) -> None:
        task = file_task(file, text=("text",), label="label")
        splits = task.splits(None, seed=0)
        tokenizer = task.load_tokenizer(str(self.base / "model"))
        for split in (splits.train, splits.dev, splits.report):
            if not len(split):
                raise Wrong("an empty split")
            task.encode(split, tokenizer, 16) if hasattr(task, "encode") else None


class Options:
    """Words of the command line."""

    def __init__(self, base: Path) -> None:
        good_data(base)
        self.base = base
        (base / "recipe.yaml").write_text(good_recipe(base).replace(str(base / "model"), str(base / "nowhere")))
        fk.save(fk.apply(model := fk.load(base / "model"), fk.plan(model, fk.Fusion(width=0.5))), base / "small")
        fk.plan(bert(), fk.Fusion(width=0.5)).save(base / "plan")
        table = ["--train-file", base / "train.csv", "--text-column", "text", "--label-column", "label"]
        model_, out = base / "model", base / "out"
        training = ["--steps", 1, "--batch-size", 8, "--max-length", 16, "--lr", 1e-3, "--seed", 1]
        commands: list[list[Any]] = [
            ["inspect", model_, "--json"],
            ["methods", "fusion"],
            ["tuners", "lora"],
            ["tasks", "sst2"],
            ["compress", model_, "--method", "fusion", "--set", "width=0.5", "--layers", "last:1", "--dry-run"],
            ["compress", model_, "--plan", base / "plan", "--out", out, "--form", "both", "--overwrite"],
            ["compress", model_, "--budget", "0.5", "--multiple", 2, "--text", base / "train.csv", "--dry-run"],
            ["tune", model_, *table, *training, "--tuner", "full", "--out", out, "--overwrite", "--restart"],
            ["tune", model_, *table, *training, "--tuner", "lora", "--tuner-set", "rank=2", "--out", out, "--restart"],
            ["eval", model_, *table, "--split", "dev", "--batch-size", 8, "--limit", 5],
            ["export", base / "small", "--out", out, "--overwrite"],
            ["run", base / "recipe.yaml", "--out", base / "run", "--restart", "--json"],
            ["analyze", model_, "--methods", "fusion", "--width", "0.5", "--text", base / "train.csv", "--no-ntk"],
        ]
        self.commands = [[str(word) for word in command] for command in commands]

    def one(self, draw: random.Random) -> Input:
        words = list(draw.choice(self.commands))
        odd = [
            "", "x", "-1", "0", "1e400", "nan", "inf", "true", "None", "[", "{}", "a" * 5000, "ü", "--", "-", ".", "/",
            "/dev/null", "0-99", "last:0", "last:99", "width=", "=", "width=nan", "width=true", "width=half",
            "rank=1e9", "x=y=z", "../..", "$HOME", "~", "*", "1_0", "0x10", "1.5", "٣", str(10**30), "all", "--json",
            "--quiet",
        ]  # fmt: skip
        place, how = draw.randrange(1, len(words)), draw.randrange(4)
        if how == 0:
            del words[place]
        elif how == 1:
            words.insert(place, draw.choice(odd))
        elif how == 2 and len(words) > 2:
            other = draw.randrange(1, len(words))
            words[place], words[other] = words[other], words[place]
        else:
            words[place] = draw.choice(odd)
        if words[0] == "run" and str(self.base / "recipe.yaml") not in words:
            words.insert(1, str(self.base / "recipe.yaml"))  # else it is the quickstart, which takes its time
        return " ".join(word[:40] for word in words), lambda: self.use(words)

    def use(self, words: list[str]) -> None:
        with contextlib.chdir(self.base):
            result = CliRunner().invoke(app, words)
        if result.exit_code not in (0, 2):
            raise Wrong(f"exit code {result.exit_code}: {result.output[-300:]}")
        if result.exit_code == 2:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ffnkit: error: ")]
            if len(lines) != 1 or len(lines[0]) > 1000:
                raise Wrong(f"no one line: {result.stderr[-300:]}")
            raise FfnkitError("", lines[0], "")


KINDS: dict[str, tuple[Any, float]] = {
    "weights": (Weights, 0.2),
    "configs": (Configs, 0.2),
    "plans": (Plans, 0.2),
    "recipes": (Recipes, 0.2),
    "data": (Data, 0.1),
    "options": (Options, 0.1),
}


# --- trying them ----------------------------------------------------------------------------------------------------


def tried(use: Callable[[], None]) -> tuple[str, str]:
    """What became of an input (refused, accepted, raised, hung, wrong), and where it went wrong."""

    def hung(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            use()
        return "accepted", ""
    except FfnkitError as error:
        line = str(error)
        return ("refused", "") if "\n" not in line and len(line) < 2000 else ("WRONG", f"a line of {len(line)}")
    except Wrong as error:
        return "WRONG", str(error)
    except Hang:
        return "HANG", f"over {SECONDS} s"
    except BaseException as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if "ffnkit" in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        return "RAISED", f"{type(error).__name__} at {where}: {str(error)[:150]}"
    finally:
        signal.alarm(0)


def main() -> int:
    """Print the counts of each kind; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", type=int, help="the number of one input of a kind, to look into")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    bad, total, begin = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ffnkit-fuzz-") as folder:
        for kind in given.kinds:
            made, share = KINDS[kind]
            (base := Path(folder) / kind).mkdir()
            source = made(base)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
            counts, slowest = Counter[str](), 0.0
            number = round(given.inputs * share / sum(KINDS[each][1] for each in given.kinds))
            for index in range(number) if given.only is None else [given.only]:
                told, use = source.one(random.Random(f"{given.seed} {kind} {index}"))
                start = time.perf_counter()
                if given.only is not None:
                    print(told)
                    use()
                outcome, where = tried(use)
                slowest = max(slowest, seconds := time.perf_counter() - start)
                if seconds > SECONDS:
                    outcome, where = "HANG", f"{seconds:.1f} s"
                counts[outcome] += 1
                if outcome.isupper():
                    print(f"{kind} {index}: {outcome} {where} [{told[:200]}]", flush=True)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            total += number
            bad += sum(count for outcome, count in counts.items() if outcome.isupper())
            listed = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            print(f"{kind}: {number} inputs: {listed}; the slowest {slowest:.1f} s", flush=True)
    print(f"{total} inputs, {bad} bad, {time.perf_counter() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
