"""Write tests/old_files: plans, adapters and compact checkpoints, each with the outputs that it gave when written.

``python tools/old_files.py`` writes only what is missing: files that are there stay as they are, since they are
what earlier versions wrote, and tests/test_old_files.py shows that they still open. A new kind of file gets a new
name below; nothing is written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from families import FAMILIES  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_old_files import FOLDER, Case, moved, outputs  # noqa: E402

import ffnkit as fk  # noqa: E402
from ffnkit import methods  # noqa: E402

SMALL: dict[str, Any] = {"rank": 2, "nonzeros": 5}
ENTRIES: dict[str, Any] = {"share": 0.05, "batches": 2}


def built(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: methods.build(name, **settings)


# name -> family, the methods of the plan that is stored
PLANS: dict[str, tuple[str, Callable[[], Any]]] = {
    "fusion": ("bert", built("fusion", width=0.5, restarts=1)),
    "fusion-ragged": ("gpt2", built("fusion", width=0.5, restarts=1, layers="last:1")),
    "fusion-experts": ("mixtral", built("fusion", width=0.5, restarts=1)),
    "calibrated-fusion": ("llama", built("calibrated-fusion", width=0.5, refine=3)),
    "svd": ("gpt2", built("svd", width=0.5)),
    "unstructured": ("t5", built("unstructured", width=0.5)),
    "prune": ("bert", built("prune", ratio=0.5)),
    "prune-2-4": ("llama", built("prune", pattern="2:4")),
    "merging": ("gpt2", built("merging", layers="all")),
    "merging-corrected": ("bert", built("merging", layers="0-1", correct="output")),
    "layer-drop": ("bert", built("layer-drop", layers="1")),
    "ffn-drop": ("llama", built("ffn-drop", layers="2")),
    "remove-heads": ("t5", built("heads", share=1)),
    "remove-heads-grouped": ("llama", built("heads", share=1)),
    "structured": ("gpt2", built("structured", heads=1, neurons=0.25)),
    "sparsegrad": ("bert", lambda: fk.SparseGrad(**ENTRIES)),
    "sparsegrad-refresh": ("gpt2", lambda: fk.SparseGrad(**ENTRIES, basis="layer", selection="refresh")),
    "sparsegrad-step": ("llama", lambda: fk.SparseGrad(**ENTRIES, basis="none", selection="step")),
    "dsee": ("t5", lambda: fk.DSEE(**SMALL)),
    "combined": ("bert", lambda: fk.Combined([fk.SparseGrad(**ENTRIES), fk.DSEE(**SMALL)])),
    "combined-narrow": (
        "gpt2",
        lambda: fk.Combined([fk.Merging(layers="0-1"), methods.build("magnitude", width=0.5, layers="2")]),
    ),
}
ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sparsegrad": ("bert", lambda: fk.SparseGrad(**ENTRIES)),
    "sparsegrad-none": ("llama", lambda: fk.SparseGrad(**ENTRIES, basis="none", also=("head", "norms"))),
    "dsee": ("gpt2", lambda: fk.DSEE(**SMALL)),
    "dsee-all": ("bert", lambda: fk.DSEE(**SMALL, sites="all")),
    "both": ("t5", lambda: fk.Combined([fk.SparseGrad(**ENTRIES), fk.DSEE(**SMALL)])),
}
LORAS: dict[str, tuple[str, Callable[[], Any]]] = {
    "head": ("bert", lambda: fk.DSEE(rank=2, nonzeros=0)),
    "conv1d": ("gpt2", lambda: fk.DSEE(rank=3, alpha=5, nonzeros=0, sites="all")),
}
# name -> family, the methods that are applied one after the other
COMPACT: dict[str, tuple[str, list[Callable[[], Any]]]] = {
    "narrow": ("bert", [built("fusion", width=0.5, restarts=1)]),
    "ragged": ("gpt2", [built("fusion", width=0.5, restarts=1, layers="last:1")]),
    "ragged-stacks": ("t5", [built("fusion", width=0.25, restarts=1, layers="encoder:last:1")]),
    "gated-calibrated": ("llama", [built("calibrated-fusion", width=0.5, refine=3)]),
    "experts": ("mixtral", [built("fusion", width=0.5, restarts=1)]),
    "tied": ("llama", [built("merging", layers="all")]),
    "heads": ("bert", [built("heads", share=1)]),
    "heads-ragged": ("gpt2", [built("heads", share=1, layers="0")]),
    "masked": ("llama", [built("prune", ratio=0.5)]),
    "masked-experts": ("mixtral", [built("unstructured", width=0.5)]),
    "lowrank": ("gpt2", [built("svd", width=0.5)]),
    "ffns-dropped": ("bert", [built("ffn-drop", layers="1")]),
    "several": (
        "t5",
        [built("fusion", width=0.5, restarts=1), built("heads", share=1), built("prune", sites="attention")],
    ),
}


def planned(family: str, model: Any, method: Any) -> Any:
    return fk.plan(model, method, data=[labelled(family, model, seed) for seed in range(2)])


def labelled(family: str, model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Inputs with labels: the choice of entries reads the gradients of the loss."""
    inputs = FAMILIES[family].inputs(model, seed=seed)
    logits = FAMILIES[family].outputs(model, inputs)["logits"]
    draw = torch.Generator().manual_seed(seed)
    return {**inputs, "labels": torch.randint(logits.shape[-1], logits.shape[:-1], generator=draw)}


def write(case: Case) -> None:
    family = FAMILIES[case.family]
    model: Any = family.model()
    path = case.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if case.kind == "compact":
        for method in COMPACT[case.name][1]:
            fk.apply(model, planned(case.family, model, method()))
        fk.save(model, path)
        (path / "README.md").unlink()
    else:
        table = {"plans": PLANS, "adapters": ADAPTERS, "loras": LORAS}[case.kind]
        plan = planned(case.family, model, table[case.name][1]())
        fk.apply(model, plan)
        if case.kind == "plans":
            plan.save(path)
        if case.trains:
            moved(case.family, model)
        if case.kind == "adapters":
            fk.save_adapter(model, path)
        elif case.kind == "loras":
            fk.save_lora(model, path)
    case.outputs.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in outputs(case.family, model).items()}, case.outputs)


def cases() -> list[Case]:
    tables: dict[str, dict[str, Any]] = {"plans": PLANS, "adapters": ADAPTERS, "loras": LORAS, "compact": COMPACT}
    updates = ("sparsegrad", "sparsegrad-refresh", "sparsegrad-step", "dsee", "combined")
    return [
        Case(kind, name, family, kind in ("adapters", "loras") or (kind == "plans" and name in updates))
        for kind, table in tables.items()
        for name, (family, _) in table.items()
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for case in cases():
        if not case.path.exists():
            write(case)
            print(f"{case.kind}/{case.name}")
    listed = [{"kind": c.kind, "name": c.name, "family": c.family, "trains": c.trains} for c in cases()]
    (FOLDER / "index.json").write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in listed) + "\n]\n")


if __name__ == "__main__":
    main()
