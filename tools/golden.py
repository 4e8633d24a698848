"""Two golden records of what the code computes and says, to be compared before and after a change of its structure.

    golden.py record --numbers NUMBERS.json --texts TEXTS.json [--source PATH/src] [--jobs 2] [--families bert,gpt2]
                     [--cases fusion,lora]
    golden.py compare OLD.json NEW.json [--renames FILE]

*Numbers*: hashes (sha256 of bytes, dtype and shape) of a plan's tensors, of the state after apply, fold, three steps of
training, saving and reading back in a fresh process, exporting and reading back, and of the outputs at each point.
Every family gets "fusion" (uniform and ragged), float32. Every other method, chains of methods, and every tuner run
on KINDS, which hold each kind of FFN and of attention; five of them (HALF) run the methods in bfloat16 too. Refusals
are recorded as their class, other exceptions as their type.

*Texts*: plans, what inspect says, the configs of both forms, refusals of bad calls, the command line's help and lists,
and what a few commands answer.

Hashes hang on the CPU and on the libraries: both records are made on one machine. RENAMES is a JSON list of
[regular expression, replacement], applied to every key and text of OLD.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = (
    "bert", "gpt2", "llama", "phi3", "t5", "switch", "mixtral", "llama4", "albert", "bart", "vit", "gpt-neox",
    "qwen2-moe",
)  # fmt: skip
HALF = ("bert", "gpt2", "llama", "t5", "mixtral")
TUNED = ("bert", "gpt2", "llama", "t5", "mixtral", "albert", "phi3", "vit")
Record = dict[str, Any]


def first_of(*homes: str) -> Any:
    """The first of several "module:name" that there is: things without a public name may move."""
    for home in homes:
        module, _, name = home.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(homes)}")


# --- cases ------------------------------------------------------------------------------------------------------------


def method_cases() -> dict[str, list[Callable[[], Any]]]:
    """Name -> methods that are applied one after the other, with a step of training between them."""
    import ffnkit as fk
    from ffnkit import methods

    def one(name: str, **settings: Any) -> list[Callable[[], Any]]:
        return [lambda: methods.build(name, **settings)]

    def entries(**more: Any) -> Callable[[], Any]:
        return lambda: fk.SparseGrad(**{"share": 0.05, "batches": 2} | more)

    def dsee(**more: Any) -> Callable[[], Any]:
        return lambda: fk.DSEE(**{"rank": 2, "nonzeros": 5, "batches": 2} | more)

    half = {"width": 0.5}
    fused = {**half, "restarts": 1}
    return {
        "fusion": one("fusion", **fused),
        "fusion-ragged": one("fusion", **fused, layers="last:1"),
        "fusion-count": one("fusion", width=7, seed=3),
        "calibrated-fusion": one("calibrated-fusion", **half, refine=3),
        "calibrated-sequential": one("calibrated-fusion", **half, refine=0, sequential=True),
        "merging": one("merging", layers="all"),
        "merging-window": one("merging", window=2, anchor="last", features="hidden"),
        "merging-corrected": one("merging", layers="0-1", correct="output"),
        "merging-similar": one("merging", groups="similar", keep=2, take="random", seed=2),
        "clustering": one("clustering", **fused),
        "sketch": one("sketch", **half, keep=3),
        "svd": one("svd", **half),
        "mmd": one("mmd", **half, steps=3),
        "random": one("random", **half),
        "magnitude": one("magnitude", **half),
        "importance": one("importance", **half),
        "reinit": one("reinit", **half),
        "unstructured": one("unstructured", **half),
        "prune": one("prune", ratio=0.5),
        "prune-row": one("prune", ratio=0.3, scope="row", sites="ffn"),
        "prune-2-4": one("prune", pattern="2:4"),
        "prune-wanda": one("prune", ratio=0.4, by="wanda"),
        "heads": one("heads", share=1),
        "heads-activation": one("heads", share=0.5, by="activation"),
        "structured": one("structured", heads=1, neurons=0.25),
        "structured-budget": one("structured", flops=0.75, spread="budget", multiple=1, by="activation"),
        "layer-drop": one("layer-drop", layers="1"),
        "layer-drop-window": one("layer-drop", window=1),
        "ffn-drop": one("ffn-drop", layers="0"),
        "ffn-drop-window": one("ffn-drop", window=1),
        "combined": [
            lambda: fk.Combined([fk.Merging(layers="0-1"), methods.build("magnitude", width=0.5, layers="last:1")])
        ],
        "sparsegrad": [entries()],
        "sparsegrad-layer": [entries(basis="layer", selection="refresh", every=2)],
        "sparsegrad-all": [entries(by="all", sites="all")],
        "sparsegrad-step": [entries(basis="none", selection="step", also=("head", "norms"))],
        "sparsegrad-random": [entries(basis="none", choose="random", seed=4)],
        "dsee": [dsee()],
        "dsee-grebsmo": [dsee(support="grebsmo", sites="ffn")],
        "dsee-gradient": [dsee(support="gradient", sites="all", also=())],
        "dsee-random": [dsee(support="random", rank=0, share=0.1)],
        "combined-updates": [lambda: fk.Combined([entries()(), dsee()()])],
        "chain-merging-entries": [*one("merging", layers="all", match=False), entries(basis="none")],
        "chain-dsee-heads": [dsee(), *one("heads", share=1, by="update")],
        "chain-dsee-structured": [dsee(sites="all"), *one("structured", heads=1, neurons=0.25, by="both")],
        "chain-updates-prune": [entries(basis="none"), dsee(), *one("prune", ratio=0.5)],
        "chain-fusion-heads-prune": [
            *one("fusion", **fused), *one("heads", share=1), *one("prune", ratio=0.5, sites="attention"),
        ],
    }  # fmt: skip


EVERYWHERE = ("fusion", "fusion-ragged")  # on all families


def tuner_cases() -> dict[str, dict[str, Any]]:
    entries = {"name": "sparsegrad", "share": 0.05, "batches": 2}
    dsee = {"name": "dsee", "rank": 2, "nonzeros": 5, "batches": 2}
    return {
        "tuner-full": {"name": "full"},
        "tuner-ffn": {"name": "ffn"},
        "tuner-ffn-also": {"name": "ffn", "also": ["norms", "biases"], "head": False},
        "tuner-head": {"name": "head"},
        "tuner-lora": {"name": "lora", "rank": 2},
        "tuner-lora-all": {"name": "lora", "rank": 3, "alpha": 5, "targets": "all", "bias": "lora_only"},
        "tuner-sparsegrad": entries,
        "tuner-sparsegrad-step": {**entries, "selection": "step", "basis": "none", "keep_zeros": True},
        "tuner-dsee": dsee,
        "tuner-dsee-coefficients": {**dsee, "coefficients": 0.1},
        "tuner-mask": {"name": "mask", "share": 0.05},
        "tuner-mask-magnitude": {"name": "mask", "choose": "magnitude", "count": 9},
        "tuner-meprop": {"name": "meprop", "share": 0.05},
        "tuner-meprop-outputs": {"name": "meprop", "of": "outputs", "share": 0.1},
        "tuner-combined": {"name": "combined", "parts": [entries, {**dsee, "targets": "qv"}]},
    }


# --- hashes -----------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    import torch

    data = value.detach().contiguous().cpu()
    bits = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
    told = f"{data.dtype} {tuple(data.shape)}".encode()
    return hashlib.sha256(told + b"\0" + bits).hexdigest()[:16]


def digests(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in tensors.items()}


def aligned(model: Any) -> Any:
    """The same bits at fresh places: the order of a sum may follow where a tensor lies in a file that is mapped."""
    seen: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
    return model


def state_of(family: Any, model: Any) -> Record:
    """The state, who trains, and the outputs."""
    trains = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {
        "state": digests(model.state_dict()),
        "trains": hashlib.sha256("\n".join(trains).encode()).hexdigest()[:16],
        "outputs": digests(family.outputs(model)),
    }


def of_plan(plan: Any, folder: Path) -> Record:
    from safetensors import safe_open

    path = folder / "plan.safetensors"
    plan.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    path.unlink()
    quantities = json.dumps(plan.quantities, sort_keys=True, default=repr)
    return {"tensors": tensors, "quantities": hashlib.sha256(quantities.encode()).hexdigest()[:16]}


# --- a case -----------------------------------------------------------------------------------------------------------


def labelled(family: Any, model: Any, seed: int) -> dict[str, Any]:
    """Inputs, with labels where the model has logits: some methods read the gradients of a loss."""
    import torch

    inputs = family.inputs(model, seed=seed)
    logits = family.outputs(model, inputs).get("logits")
    if logits is None:
        return inputs
    draw = torch.Generator().manual_seed(seed)
    return {**inputs, "labels": torch.randint(logits.shape[-1], logits.shape[:-1], generator=draw)}


def train(family: Any, model: Any, steps: int = 3) -> None:
    """AdamW on a loss of every output, in eval mode."""
    import torch

    import ffnkit as fk

    optimizer = torch.optim.AdamW(fk.trainable_parameters(model), lr=1e-2, weight_decay=0.01)
    for _ in range(steps):
        draw = torch.Generator().manual_seed(0)
        found = family.outputs(model, grad=True)
        sum((value * torch.randn(value.shape, generator=draw)).sum() for value in found.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


class Case:
    """Runs one case, a stage at a time; each stage is recorded by what it gives or by what it raises."""

    def __init__(self, family: Any, name: str, dtype: str, folder: Path) -> None:
        import torch

        self.family, self.name, self.folder = family, name, folder
        self.dtype = getattr(torch, dtype)
        self.numbers: Record = {}
        self.texts: Record = {}
        folder.mkdir(parents=True, exist_ok=True)

    def model(self) -> Any:
        return self.family.model().to(self.dtype)

    def stage(self, name: str, work: Callable[[], Record | None]) -> bool:
        import ffnkit as fk

        try:
            found = work()
        except fk.FfnkitError as error:
            self.numbers[name] = {"refused": type(error).__name__}
            self.texts[f"{name} refused"] = clean(str(error), self.folder)
            return False
        except Exception as error:
            self.numbers[name] = {"raised": type(error).__name__}
            return False
        if found is not None:
            self.numbers[name] = found
        return True

    def write(self, model: Any) -> None:
        """Save and export; a fresh process reads them (`reload`)."""
        import ffnkit as fk

        def save() -> None:
            fk.save(model, self.folder / "compact")
            self.texts["compact config"] = clean((self.folder / "compact" / "config.json").read_text(), self.folder)
            self.texts["compact card"] = clean((self.folder / "compact" / "README.md").read_text(), self.folder)

        def export() -> Record:
            report = fk.export(model, self.folder / "standard")
            self.texts["standard config"] = clean((self.folder / "standard" / "config.json").read_text(), self.folder)
            return {"padded": list(report.padded), "heads": list(report.padded_heads), "bytes": report.bytes}

        self.stage("save", save)
        self.stage("export", export)

    def run_methods(self, built: list[Callable[[], Any]]) -> None:
        import torch

        import ffnkit as fk

        torch.manual_seed(0)
        model = self.model()
        data = [labelled(self.family, model, seed) for seed in range(2)]
        for number, build in enumerate(built):
            held: dict[str, Any] = {}
            mark = f" {number}" if number else ""

            def make(build: Any = build, held: dict[str, Any] = held, mark: str = mark) -> Record:
                plan = held["plan"] = fk.plan(model, build(), data=data)
                self.texts[f"plan{mark}"] = str(plan)
                return of_plan(plan, self.folder)

            def put(held: dict[str, Any] = held) -> Record:
                fk.apply(model, held["plan"])
                return state_of(self.family, model)

            if number:
                train(self.family, model, 1)
            if not (self.stage(f"plan{mark}", make) and self.stage(f"apply{mark}", put)):
                return
        self.texts["inspect"] = str(fk.inspect(model))
        self.stage("fold", lambda: state_of(self.family, fk.fold(copy.deepcopy(model))))
        self.stage("trained", lambda: train(self.family, model) or state_of(self.family, model))
        self.stage("trained fold", lambda: state_of(self.family, fk.fold(copy.deepcopy(model))))
        self.write(model)
        if any(name in self.name for name in ("sparsegrad", "dsee", "updates")) and "chain" not in self.name:
            self.stage("save adapter", lambda: fk.save_adapter(model, self.folder / "adapter") and None)
        if "dsee" in self.name:
            self.stage("save lora", lambda: fk.save_lora(model, self.folder / "lora") and file_digests(self.folder))

    def run_tuner(self, settings: dict[str, Any]) -> None:
        import torch

        import ffnkit as fk

        prepare = first_of("ffnkit.tune.tuners:prepare", "ffnkit.tune:prepare")
        finish = first_of("ffnkit.tune.tuners:finish", "ffnkit.tune:finish")
        tuner = fk_tune().get(settings)
        held: dict[str, Any] = {}

        def ready() -> Record:
            torch.manual_seed(0)
            model = self.model()
            if getattr(tuner.method, "needs_data", False):
                data = [labelled(self.family, model, seed) for seed in range(2)]
                try:
                    with_data = first_of("ffnkit.tune.planned:prepare", "ffnkit.tune:prepare")
                except ImportError:  # what a tuner does itself, today
                    held["model"] = tuner.prepare(model, data)
                else:
                    held["model"] = with_data(model, tuner, data)
            else:
                held["model"] = prepare(model, tuner)
            return state_of(self.family, held["model"])

        def finished() -> Record:
            held["plain"] = finish(held["model"], tuner)
            return state_of(self.family, held["plain"])

        if not self.stage("prepare", ready):
            return
        model = held["model"]
        if self.stage("trained", lambda: train(self.family, model) or state_of(self.family, model)):
            if tuner.method is not None:
                self.stage("save adapter", lambda: fk.save_adapter(model, self.folder / "adapter") and None)
            if self.stage("finish", finished):
                self.write(held["plain"])


def fk_tune() -> Any:
    return import_module("ffnkit.tune")


def file_digests(folder: Path) -> Record:
    from safetensors.torch import load_file

    return {"lora": digests(load_file(folder / "lora" / "adapter_model.safetensors"))}


def clean(text: str, folder: Path) -> str:
    """Without what differs from run to run."""
    text = text.replace(str(folder), "FOLDER")
    return re.sub(r"\b\d+\.\d+ (s|seconds)\b", "TIME", text)


# --- reading back in a fresh process ----------------------------------------------------------------------------------


def reload(root: Path) -> Record:
    """What every folder below ``root`` gives when it is read."""
    import torch
    import transformers
    from families import FAMILIES

    import ffnkit as fk

    def opened(family: Any, folder: Path, form: str, dtype: str) -> Record:
        if form == "compact":
            model = fk.load(folder)
        elif form == "standard":
            model = getattr(transformers, family.model_class).from_pretrained(folder)
        else:
            model = fk.load_adapter(family.model().to(getattr(torch, dtype)), folder)
        if family.has_experts:
            model.set_experts_implementation("eager")
        return state_of(family, aligned(model.eval()))

    found: Record = {}
    for case in sorted(root.iterdir()):
        name, _, dtype = case.name.split("@")
        for form in ("compact", "standard", "adapter"):
            if (case / form).is_dir():
                try:
                    record: Record = opened(FAMILIES[name], case / form, form, dtype)
                except fk.FfnkitError as error:
                    record = {"refused": type(error).__name__}
                except Exception as error:
                    record = {"raised": type(error).__name__}
                found.setdefault(case.name, {})[f"reloaded {form}"] = record
    return found


# --- texts beside the cases -------------------------------------------------------------------------------------------


def bad_calls() -> dict[str, Callable[[], Any]]:
    """Calls that are refused, by the Python API."""
    from families import FAMILIES

    import ffnkit as fk
    from ffnkit import methods

    def plan(family: str, name: str, data: bool = False, **settings: Any) -> Callable[[], Any]:
        def call() -> Any:
            model = FAMILIES[family].model()
            batches = [labelled(FAMILIES[family], model, 0)] if data else None
            return fk.plan(model, methods.build(name, **settings), data=batches)

        return call

    def after(family: str, first: Any, second: Any) -> Callable[[], Any]:
        def call() -> Any:
            model = FAMILIES[family].model()
            batches = [labelled(FAMILIES[family], model, 0)]
            fk.apply(model, fk.plan(model, first, data=batches))
            return fk.apply(model, fk.plan(model, second, data=batches))

        return call

    def other(times: int, family: str) -> Callable[[], Any]:
        def call() -> Any:
            made = fk.plan(FAMILIES["bert"].model(), fk.Fusion(width=0.5, restarts=1))
            return fk.apply(FAMILIES[family].model(times=times), made)

        return call

    def poisoned() -> Any:
        model = FAMILIES["bert"].model()
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
        return fk.plan(model, fk.Fusion(width=0.5))

    fused = fk.Fusion(width=0.5, restarts=1)
    entries = fk.SparseGrad(share=0.1, basis="none", choose="random")
    return {
        "width 0": plan("bert", "fusion", width=0),
        "width 41": plan("bert", "fusion", width=41),
        "width 1.5": plan("bert", "fusion", width=1.5),
        "width text": plan("bert", "fusion", width="wide"),
        "no width": plan("bert", "fusion"),
        "unknown method": plan("bert", "magic"),
        "unknown setting": plan("bert", "fusion", widht=0.5),
        "layers beyond": plan("bert", "fusion", width=0.5, layers="7-9"),
        "layers of no stack": plan("bert", "fusion", width=0.5, layers="decoder:all"),
        "layers last:9": plan("bert", "fusion", width=0.5, layers="last:9"),
        "width by a wrong name": plan("bert", "magnitude", width={"nowhere": 3}),
        "seed": plan("bert", "fusion", width=0.5, seed=-1),
        "no data": plan("bert", "calibrated-fusion", width=0.5),
        "ridge": plan("bert", "calibrated-fusion", True, width=0.5, ridge=-1),
        "svd of experts": plan("mixtral", "svd", width=0.5),
        "merging nothing": plan("bert", "merging", True),
        "merging experts": plan("mixtral", "merging", True, layers="all"),
        "merging both": plan("bert", "merging", True, layers="all", window=2),
        "window too long": plan("bert", "merging", True, window=9),
        "similar alone": plan("bert", "merging", True, groups="similar"),
        "prune ratio": plan("bert", "prune", ratio=1.5),
        "prune pattern": plan("bert", "prune", pattern="4:2"),
        "prune scope": plan("bert", "prune", scope="all"),
        "prune sites": plan("bert", "prune", sites="nothing"),
        "prune wanda": plan("bert", "prune", by="wanda"),
        "heads all": plan("bert", "heads", share=2),
        "heads half": plan("bert", "heads", share=0.25),
        "heads by": plan("bert", "heads", share=1, by="magic"),
        "heads update": plan("bert", "heads", share=1, by="update"),
        "structured nothing": plan("bert", "structured", heads=0, neurons=0),
        "structured flops": plan("bert", "structured", flops=0.01),
        "layer-drop all": plan("bert", "layer-drop", layers="all"),
        "layer-drop none": plan("bert", "layer-drop"),
        "combined twice": lambda: fk.plan(
            FAMILIES["bert"].model(), fk.Combined([fused, fk.Fusion(width=0.25, layers="1")])
        ),
        "combined one": lambda: fk.Combined([]),
        "sparsegrad share": lambda: fk.plan(FAMILIES["bert"].model(), fk.SparseGrad(share=0)),
        "sparsegrad no data": lambda: fk.plan(FAMILIES["bert"].model(), fk.SparseGrad()),
        "sparsegrad twice": after("bert", entries, entries),
        "dsee rank": lambda: fk.plan(FAMILIES["bert"].model(), fk.DSEE(rank=0, nonzeros=0)),
        "dsee lora": lambda: fk.plan(FAMILIES["bert"].model(), fk.DSEE(lora="/nowhere")),
        "dsee of experts": lambda: fk.plan(FAMILIES["mixtral"].model(), fk.DSEE(sites="ffn")),
        "fusing twice": after("bert", fused, fused),
        "svd twice": after("gpt2", methods.build("svd", width=0.5), methods.build("svd", width=0.5)),
        "masks twice": after("bert", fk.Prune(), fk.Prune()),
        "a plan of another width": other(2, "bert"),
        "a plan of another model": other(1, "gpt2"),
        "NaN": poisoned,
        "no plan": lambda: fk.Plan.load("/nowhere/plan"),
        "no folder": lambda: fk.load("/nowhere/model"),
        "no adapter on it": lambda: fk.save_adapter(FAMILIES["bert"].model(), "/nowhere/adapter"),
        "no adapter there": lambda: fk.load_adapter(FAMILIES["bert"].model(), "/nowhere/adapter"),
        "no low rank": lambda: fk.save_lora(FAMILIES["bert"].model(), "/nowhere/lora"),
        "unknown tuner": lambda: fk_tune().get("magic"),
        "tuner setting": lambda: fk_tune().get({"name": "lora", "rank": 0}),
        "tuner unknown setting": lambda: fk_tune().get({"name": "lora", "rnak": 2}),
        "tuner combined of one": lambda: fk_tune().get({"name": "combined", "parts": [{"name": "dsee"}]}),
        "tuner combined of lora": lambda: fk_tune().get(
            {"name": "combined", "parts": [{"name": "dsee"}, {"name": "lora"}]}
        ),
        "tuner routers": lambda: fk_tune().get({"name": "ffn", "routers": "trained"}).prepare(FAMILIES["bert"].model()),
        "tuner targets": lambda: fk_tune().get({"name": "lora", "targets": "("}).prepare(FAMILIES["bert"].model()),
    }


WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "meal", "day"]


def small_bert(folder: Path) -> Path:
    """A BERT for two classes with a tokenizer of ten words."""
    import torch
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def commands(bert: str, root: Path) -> dict[str, list[str]]:
    """Calls of the command line on a small model: refused ones, and a few that work."""
    table = root / "train.csv"
    rows = [f"{a} {b} {c},{'yes' if i < 3 else 'no'}" for i, a in enumerate(WORDS[:6]) for b in WORDS[6:] for c in "xy"]
    table.write_text("text,liked\n" + "\n".join(rows) + "\n")
    fuse = ["compress", bert, "-m", "fusion"]
    half = [*fuse, "-s", "width=0.5"]
    out = ["--out", str(root / "out")]
    rows_of = ["--train-file", str(table), "--text-column", "text", "--label-column", "liked"]
    tune = ["tune", bert, *rows_of, "--quiet", "--json"]
    small = ["--steps", "4", "--batch-size", "8", "--eval-every", "2", "--lr", "1e-3"]
    return {
        "bare": [],
        "version": ["--version"],
        "compess": ["compess"],
        "no model": ["compress"],
        "seed x": ["compress", "m", "--seed", "x"],
        "form zip": ["compress", "m", "--form", "zip"],
        "tune without out": ["tune", "m", "--task", "sst2"],
        "width 0": [*fuse, "-s", "width=0", *out],
        "width 41": [*fuse, "-s", "width=41", *out],
        "width nan": [*fuse, "-s", "width=nan", *out],
        "no width": [*fuse, *out],
        "colour": [*half, "-s", "colour=red", *out],
        "layers 7-9": [*half, "--layers", "7-9", *out],
        "layers some": [*half, "--layers", "some", *out],
        "seed twice": [*half, "-s", "seed=1", "--seed", "1", *out],
        "cuda:99": [*half, "--device", "cuda:99", *out],
        "dtype": [*half, "--dtype", "int3", *out],
        "no out": half,
        "magic": ["compress", bert, "-m", "magic", "--dry-run"],
        "no method": ["compress", bert, "--dry-run"],
        "tuner magic": ["tune", bert, "--task", "sst2", "--tuner", "magic", *out],
        "task magic": ["eval", bert, "--task", "magic"],
        "no such folder": ["inspect", str(root / "nothing")],
        "a file": ["inspect", f"{bert}/config.json"],
        "empty folder": ["inspect", str(root)],
        "run nothing": ["run", str(root / "none.yaml")],
        "out is read": [*half, "--out", bert],
        "calibrated without text": ["compress", bert, "-m", "calibrated-fusion", "-s", "width=0.5", *out],
        "export nothing": ["export", str(root / "nothing"), *out],
        "inspect": ["inspect", bert],
        "inspect json": ["inspect", bert, "--json"],
        "dry run": [*half, "--dry-run"],
        "dry run json": [*half, "--dry-run", "--json"],
        "compress": [*half, "--layers", "last:2", "--out", str(root / "small"), "--form", "both", "--json"],
        "inspect compact": ["inspect", str(root / "small" / "compact")],
        "export": ["export", str(root / "small" / "compact"), "--out", str(root / "final")],
        "heads": ["compress", bert, "-m", "heads", "-s", "share=1", "--dry-run"],
        "tune": [*tune, "--tuner", "lora", *small, "--out", str(root / "tuned")],
        "tune full": [*tune, "--tuner", "full", *small, "--out", str(root / "tuned2"), "--seed", "3"],
        "tune sparsegrad": [
            *tune, "--tuner", "sparsegrad", *small, "--out", str(root / "tuned3"), "--tuner-set", "batches=2",
        ],
        "distil": [
            "tune", str(root / "small" / "compact"), *rows_of, "--quiet", "--json", *small,
            "--out", str(root / "tuned4"), "--distil-from", bert,
            "--distil-set", "steps=2", "--distil-set", "batch_size=8",
        ],
        "eval": ["eval", str(root / "tuned"), *rows_of, "--json", "--quiet"],
        "eval dev": ["eval", str(root / "tuned2"), *rows_of, "--split", "dev", "--quiet"],
        "no column": ["tune", bert, "--train-file", str(table), "--text-column", "text", *out],
        "wrong metric": [*tune, "--metric", "bleu", *out],
        "wrong schedule": [*tune, "--schedule", "zigzag", *out],
        "wrong tuner setting": [*tune, "--tuner-set", "rank=2", *out],
        "methods json": ["methods", "--json"],
        "tuners json": ["tuners", "--json"],
        "tasks json": ["tasks", "--json"],
        "methods": ["methods"],
        "tuners": ["tuners"],
        "tasks": ["tasks"],
    }  # fmt: skip


# Fields of answers that hold times, memory or versions.
VOLATILE = re.compile(r'("[\w]*(?:seconds|memory|per_second|runtime|time|version|revision|commit|date)[\w]*"): [^,\n]+')


def spoken(root: Path) -> Record:
    """Help, lists, refusals, and what inspect says of each family."""
    import typer
    from families import FAMILIES
    from typer.testing import CliRunner

    import ffnkit as fk

    app = first_of("ffnkit.cli:app")
    bert = str(small_bert(root / "bert"))

    def told(words: list[str]) -> str:
        result = CliRunner().invoke(app, words)
        text = f"exit code {result.exit_code}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"
        text = text.replace(str(root), "ROOT")
        return re.sub(r"\b\d+(\.\d+)? ?(ms|s|min|seconds)\b", "TIME", VOLATILE.sub(r"\1: VOLATILE", text))

    found: Record = {"help": told(["--help"])}
    for name in sorted(typer.main.get_command(app).commands):  # type: ignore[attr-defined]
        found[f"help {name}"] = told([name, "--help"])
    for name, words in commands(bert, root).items():
        found[f"command {name}"] = told(words)
        step(f"command {name}")
    for name, call in bad_calls().items():
        try:
            call()
            found[f"call {name}"] = "not refused"
        except Exception as error:
            found[f"call {name}"] = f"{type(error).__name__}: {error}".replace(str(root), "ROOT")
    for name, family in FAMILIES.items():
        try:
            found[f"inspect {name}"] = str(fk.inspect(family.model()))
        except Exception as error:
            found[f"inspect {name}"] = f"{type(error).__name__}: {error}"
    return found


# --- running ----------------------------------------------------------------------------------------------------------


def step(text: str) -> None:
    print(f"[{os.environ.get('GOLDEN_JOB', '-')}] {text}", file=sys.stderr, flush=True)


def quiet() -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def chosen(families: list[str], cases: list[str]) -> Iterator[tuple[str, str, str]]:
    """(family, case, dtype) of the record."""
    from families import NAMES

    methods, tuners = method_cases(), tuner_cases()
    for family in NAMES:
        for case in (*methods, *tuners):
            on = NAMES if case in EVERYWHERE else KINDS if case in methods else TUNED
            if family not in on or (families and family not in families) or (cases and case not in cases):
                continue
            yield family, case, "float32"
            if family in HALF and case in methods:
                yield family, case, "bfloat16"


def work(todo: list[tuple[str, str, str]], out: Path) -> None:
    """One job: run its cases, then read all folders back in one fresh process."""
    from families import FAMILIES

    import ffnkit as fk

    source = os.environ["GOLDEN_SOURCE"]
    assert Path(fk.__file__).is_relative_to(source), f"ffnkit is {fk.__file__}, not below {source}"
    quiet()
    methods, tuners = method_cases(), tuner_cases()
    numbers: Record = {}
    texts: Record = {}
    root = out / "cases"
    root.mkdir()
    began = time.perf_counter()
    for number, (name, case, dtype) in enumerate(todo):
        if number % 20 == 0:
            step(f"{number}/{len(todo)}, {time.perf_counter() - began:.0f} s: {name} {case} {dtype}")
        key = f"{name}@{case}@{dtype}"
        run = Case(FAMILIES[name], case, dtype, root / key)
        if case in methods:
            run.run_methods(methods[case])
        else:
            run.run_tuner(tuners[case])
        numbers[key] = run.numbers
        if dtype == "float32":
            texts[key] = run.texts
    step(f"{len(todo)} cases, {time.perf_counter() - began:.0f} s; reading back")
    command = [sys.executable, __file__, "_reload", str(root), str(out / "reloaded.json")]
    subprocess.run(command, check=True)
    for key, found in json.loads((out / "reloaded.json").read_text()).items():
        numbers[key] |= found
    (out / "numbers.json").write_text(json.dumps(numbers))
    (out / "texts.json").write_text(json.dumps(texts))
    shutil.rmtree(root)


def record(given: argparse.Namespace) -> None:
    source = Path(given.source).resolve()
    path = os.pathsep.join([str(source), str(ROOT / "tests")])
    base = os.environ | {
        "PYTHONPATH": path, "GOLDEN_SOURCE": str(source), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore",
        "PYTHONHASHSEED": "0",
    }  # fmt: skip
    command = [sys.executable, __file__, "_list", "--families", given.families, "--cases", given.cases]
    listed = subprocess.run(command, env=base, check=True, capture_output=True, text=True).stdout
    todo = json.loads(listed.splitlines()[-1])
    numbers: Record = {}
    texts: Record = {}
    with tempfile.TemporaryDirectory() as held:
        running = []
        for job in range(given.jobs):
            folder = Path(held) / str(job)
            folder.mkdir()
            (folder / "todo.json").write_text(json.dumps(todo[job :: given.jobs]))
            spoken_too = ["--spoken"] if job == 0 and given.texts and not given.no_spoken else []
            command = [sys.executable, __file__, "_work", str(folder), *spoken_too]
            running.append(subprocess.Popen(command, env=base | {"GOLDEN_JOB": str(job)}))
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"a job failed: {codes}")
        for job in range(given.jobs):
            numbers |= json.loads((Path(held) / str(job) / "numbers.json").read_text())
            texts |= json.loads((Path(held) / str(job) / "texts.json").read_text())
    for target, found in ((given.numbers, numbers), (given.texts, texts)):
        if target:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


# --- comparing --------------------------------------------------------------------------------------------------------


def flat(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(record, dict):
        if not record:
            yield path, {}
        for key, value in record.items():
            yield from flat(value, (*path, key))
    else:
        yield path, record


def renamed(record: Any, rules: list[list[str]]) -> Any:
    def turn(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        return text

    if isinstance(record, dict):
        return {turn(key): renamed(value, rules) for key, value in record.items()}
    if isinstance(record, list):
        return [renamed(value, rules) for value in record]
    return turn(record) if isinstance(record, str) else record


def compare(given: argparse.Namespace) -> int:
    old, new = (json.loads(Path(path).read_text()) for path in (given.old, given.new))
    if given.renames:
        old = renamed(old, json.loads(Path(given.renames).read_text()))
    if given.common:  # of a record of some families only
        old = {key: value for key, value in old.items() if key in new}
    before, after = dict(flat(old)), dict(flat(new))
    count = 0
    for path in sorted({*before, *after}):
        if path in before and path in after and before[path] == after[path]:
            continue
        count += 1
        place = " / ".join(path)
        if path not in after:
            print(f"gone: {place}: {str(before[path])[:100]}")
        elif path not in before:
            print(f"new: {place}: {str(after[path])[:100]}")
        elif isinstance(before[path], str) and "\n" in before[path]:
            print(f"text: {place}")
            lines = difflib.unified_diff(before[path].split("\n"), str(after[path]).split("\n"), lineterm="", n=0)
            print("\n".join(f"    {line}" for line in list(lines)[2:]))
        else:
            print(f"differs: {place}: {before[path]} -> {after[path]}")
    cases = {path[0] for path in {*before, *after} if before.get(path) != after.get(path)}
    print(f"{len(after)} entries, {count} differences in {len(cases)} of {len({*old, *new})} cases")
    return 1 if count else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    one = sub.add_parser("record")
    one.add_argument("--source", default=str(ROOT / "src"))
    one.add_argument("--numbers")
    one.add_argument("--texts")
    one.add_argument("--jobs", type=int, default=1)
    one.add_argument("--families", default="", help="these only, with commas")
    one.add_argument("--cases", "--methods", default="", help="these only, with commas")
    one.add_argument("--no-spoken", action="store_true", help="no help, lists and refusals in the texts")
    two = sub.add_parser("compare")
    two.add_argument("old")
    two.add_argument("new")
    two.add_argument("--renames")
    two.add_argument("--common", action="store_true", help="leave out the cases that NEW does not have")
    for name in ("_list", "_work", "_reload"):
        inner = sub.add_parser(name)
        if name == "_list":
            inner.add_argument("--families", default="")
            inner.add_argument("--cases", default="")
        else:
            inner.add_argument("folder", type=Path)
        if name == "_work":
            inner.add_argument("--spoken", action="store_true")
        if name == "_reload":
            inner.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given)
    if given.command == "record":
        record(given)
    elif given.command == "_list":
        names = ([part for part in text.split(",") if part] for text in (given.families, given.cases))
        print(json.dumps(list(chosen(*names))))
    elif given.command == "_reload":
        quiet()
        given.out.write_text(json.dumps(reload(given.folder)))
    else:
        work([tuple(row) for row in json.loads((given.folder / "todo.json").read_text())], given.folder)
        if given.spoken:
            (given.folder / "spoken").mkdir()
            path = given.folder / "texts.json"
            found = json.loads(path.read_text()) | {"spoken": spoken(given.folder / "spoken")}
            path.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
