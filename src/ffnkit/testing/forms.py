"""The two forms of checkpoints, in the same process and in fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

import ffnkit as fk
from ffnkit.io.config_text import written
from ffnkit.io.formats import is_compact
from ffnkit.model.fresh import built
from ffnkit.nn.pruned_attention import plain_class
from ffnkit.plans import Plan
from ffnkit.testing.contract import (
    RELOADED,
    Case,
    ContractError,
    Snapshot,
    checking,
    difference,
    distance,
    eager,
    require,
    snapshot,
    special_layers,
)


def check_usual(model: Any, original: Any, name: str) -> None:
    """Raises ContractError unless a model is an ordinary one: its modules and the names of its tensors are those of the
    original, or, where something was removed, those of a fresh model of its config."""
    names, reference = set(model.state_dict()), original
    if names != set(original.state_dict()):
        reference = built(type(model), written(model.config))
        odd = sorted(names ^ set(reference.state_dict()))
        what = f"{odd[:1]} is not both there and in a fresh model of its config"
        require(not odd, "the config says what there is", what)
    classes = {path: type(module) for path, module in reference.named_modules()}
    for path, module in model.named_modules():
        usual = classes.get(path) in (plain_class(module), type(module))
        require(usual, name, f"{path} is a {type(module).__name__} in the place of {classes.get(path)}")


def check_forms(plan: Plan, case: Case, folder: Path) -> None:
    """Raises ContractError unless both forms open as the very model, and saving leaves it alone."""
    model = eager(fk.apply(case.model(), plan))
    expected, before = case.run(model), snapshot(model)
    name = "the compact form reloads"
    with checking(name):
        fk.save(model, folder / "compact")
        for loaded in (fk.load(folder / "compact"), type(model).from_pretrained(folder / "compact")):
            odd = "" if plan.trains else _other(before, snapshot(eager(loaded)))
            require(not odd, name, f"{odd} is another")
            gap = distance(case.run(eager(loaded)), expected)
            require(gap < RELOADED, name, f"outputs differ by {gap:.2g}, relative")
    name = "the standard form reloads"
    with checking(name):
        fk.export(model, folder / "standard")
        plain = eager(type(model).from_pretrained(folder / "standard"))
        gap = distance(case.run(plain), expected)
        require(gap < RELOADED, name, f"outputs differ by {gap:.2g}, relative")
        require(not special_layers(plain), name, "it holds reparametrized layers")
        check_usual(plain, case.model(), name)
        written = json.loads((folder / "standard" / "config.json").read_text(encoding="utf-8"))
        require("quantization_config" not in written, name, "its config speaks of a quantization")
    odd = difference(before, snapshot(model))
    require(not odd, "saving changes nothing", f"{odd} changed")
    _note(case, model, expected, folder)


def _other(before: Snapshot, now: Snapshot) -> str:
    """Where a loaded model differs. Loading forgets which fixed positions trained, and notes things in the config."""

    def bare(state: Snapshot) -> Snapshot:
        tensors = {
            n: (t, b, trains and "embed_positions" not in n) for n, (t, b, trains) in sorted(state["tensors"].items())
        }
        modules = {n: (cls.__name__, training) for n, (cls, training, *_) in state["modules"].items()}
        return {"tensors": tensors, "modules": modules, "config": {}}

    return difference(bare(before), bare(now), identity=False)


# --- fresh processes


def _note(case: Case, model: nn.Module, expected: dict[str, Tensor], folder: Path) -> None:
    """What a fresh process needs: the class, inputs and expected outputs."""
    inputs = {name: value for name, value in case.inputs(model).items() if isinstance(value, Tensor)}
    for name, tensors in (("inputs", inputs), ("outputs", expected)):
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    ours = is_compact(getattr(model.config, "quantization_config", None))
    told = {"module": type(model).__module__, "class": type(model).__name__, "ours": ours}
    (folder / "case.json").write_text(json.dumps(told), encoding="utf-8")


_WORKER = """
import importlib, json, sys
from pathlib import Path

root, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "plain":
    sys.modules["ffnkit"] = None  # importing it raises
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
if kind == "ffnkit":
    import ffnkit as fk


def found(folder, case):
    try:
        cls = getattr(importlib.import_module(case["module"]), case["class"])
        model = fk.load(folder) if kind == "ffnkit" else cls.from_pretrained(folder)
        if any(p.ndim == 3 for p in model.parameters()) and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        with torch.no_grad():
            outputs = model.eval()(**load_file(folder.parent / "inputs.safetensors"))
        expected = load_file(folder.parent / "outputs.safetensors")
        return max(((outputs[k] - v).norm() / v.norm().clamp_min(1e-30)).item() for k, v in expected.items())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


answers = {}
for path in sorted(root.rglob("case.json")):
    case = json.loads(path.read_text())
    for form in ("compact", "standard"):
        if (path.parent / form).is_dir() and (kind, form) != ("ffnkit", "standard"):
            answers[f"{path.parent.relative_to(root)}/{form}"] = found(path.parent / form, case)
print(json.dumps(answers))
"""


def reopened(folder: str | Path, *, with_ffnkit: bool) -> dict[str, float | str]:
    """What a fresh process finds in checkpoints: the largest relative error of the outputs of each, or an error.

    Args:
        folder: of :func:`check_method`, or one that holds several of them.
        with_ffnkit: whether ffnkit may be imported there; it opens compact forms then, else both by transformers alone.
    """
    kind = "ffnkit" if with_ffnkit else "plain"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _WORKER, str(folder), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ContractError("a fresh process opens it", done.stderr[-1000:])
    answers: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def check_reopened(folder: str | Path) -> None:
    """Raises ContractError unless fresh processes open what :func:`check_method` left: compact forms with ffnkit,
    standard ones without it; a compact form that is no ordinary checkpoint they refuse without it."""
    name, root = "a fresh process opens it", Path(folder)
    require(any(root.rglob("case.json")), name, f"{folder} holds no checkpoints of check_method")
    for with_ffnkit in (True, False):
        for path, found in reopened(root, with_ffnkit=with_ffnkit).items():
            ours = json.loads((root / path).parent.joinpath("case.json").read_text(encoding="utf-8"))["ours"]
            if not with_ffnkit and path.endswith("compact") and ours:
                require(isinstance(found, str), name, f"{path} opens without ffnkit, {found} off")
            else:
                right = isinstance(found, float) and found <= RELOADED
                require(right, name, f"{path}, {'with' if with_ffnkit else 'without'} ffnkit: {found}")
