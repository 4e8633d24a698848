"""One process of several that train together: ``python together.py OUT CASE ...``; RANK and WORLD_SIZE say which.

A case is trained on 8 examples a step, however many processes share them, and the first leaves the state in OUT/CASE.
Started alone it trains what two processes are to end with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

STEPS, ROWS = 4, 32
NAMES: dict[str, Any] = {
    "full": "full",
    "ffn": "ffn",
    "head": "head",
    "bitfit": "bitfit",
    "lora": {"name": "lora", "rank": 2},
    "lora-norms": {"name": "lora", "rank": 2, "modules_to_train": ["norms"]},
    "mask": {"name": "mask", "density": 0.1},
    "mask-magnitude": {"name": "mask", "density": 0.1, "choose": "magnitude"},
    "dsee": {"name": "dsee", "rank": 2, "nonzeros": 9, "support": "gradient", "batches": 2},
    "dsee-coefficients": {"name": "dsee", "rank": 2, "nonzeros": 9, "coefficients": 0.3},
    "sparsegrad": {"name": "sparsegrad", "density": 0.1, "batches": 2},
    "refresh": {"name": "sparsegrad", "selection": "refresh", "density": 0.1, "every": 2},
    "step": {"name": "sparsegrad", "selection": "step", "density": 0.1, "modules_to_train": ["norms"]},
    "masked-gradient": {"name": "sparsegrad", "selection": "masked-gradient", "density": 0.1},
    "meprop": {"name": "meprop", "density": 0.1},
    "meprop-outputs": {"name": "meprop", "of": "outputs", "density": 0.2},
    "combined": {
        "name": "combined",
        "parts": [
            {"name": "sparsegrad", "targets": "ffn", "density": 0.1},
            {"name": "dsee", "targets": "qv", "rank": 2, "nonzeros": 5},
        ],
    },
    "bottleneck": {"name": "bottleneck", "size": 4},
    "prefix": {"name": "prefix", "tokens": 3},
}


def model_of(kind: str) -> Any:
    """A small model in float64; "tied": all of its layers share one FFN.

    "differing": they share one and keep a scale, a bias and a thin difference each.
    """
    from test_tune import bert, llama

    import ffnkit as fk
    from ffnkit.methods.share.merging import Merging

    model: Any = (llama if kind == "llama" else bert)(
        **({} if kind == "llama" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    if kind == "tied":
        model = fk.apply(model, fk.plan(model, Merging(layers="all", match=False)))
    if kind == "differing":
        data: list[Any] = [{"input_ids": torch.arange(64).view(8, 8) % 20 + 1}]
        method = fk.CalibratedMerging(layers="all", refine=0, extra_rank=1)
        model = fk.apply(model, fk.plan(model, method, data=data))
    return model.double()


def trained(case: str, out: Path, world: int, **more: Any) -> Any:
    """The result of a case ("NAME", or "KIND:NAME"; "fsdp" before it where parameters lie in shards)."""
    from test_tune import TASK, TOKENIZER, settings, splits

    from ffnkit.tune import train

    kind, _, name = case.removeprefix("fsdp:").rpartition(":")
    how = {"batch_size": 8 // world, "epochs": 1, "eval_every": 2, "keep_best": False, "learning_rate": 0.01, **more}
    # adapter_dir lies beside the checkpoints, and is written once
    tuner = NAMES[name] if isinstance(NAMES[name], dict) else {"name": NAMES[name]}
    if name in ("lora", "dsee", "sparsegrad"):
        tuner = {**tuner, "adapter_dir": str(out.with_name(out.name + "-adapter"))}
    return train(
        model_of(kind), TOKENIZER, TASK, splits(train=ROWS), settings(**how), tuner=tuner, out_dir=out, progress=False
    )


def killed(case: str, out: Path, world: int) -> None:
    """Train until the third step is about to begin, after a checkpoint."""
    from ffnkit.tune.loop import Loop

    original = Loop.training_step

    def step(self: Any, *given: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *given)

    Loop.training_step = step  # type: ignore[method-assign]
    try:
        trained(case, out, world)
    except KeyboardInterrupt:
        return
    finally:
        Loop.training_step = original  # type: ignore[method-assign]
    raise AssertionError("it was not stopped")


def main() -> None:
    from safetensors.torch import save_file

    from ffnkit.io import processes

    torch.set_num_threads(1)
    if os.environ.get("FFNKIT_TEST_ALONE"):  # the gradients of the processes stay their own
        torch.nn.parallel.DistributedDataParallel.forward = lambda self, *given, **named: self.module(*given, **named)  # type: ignore[method-assign]
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        os.environ["ACCELERATE_USE_FSDP"] = str("fsdp:" in case).lower()
        whole = case.removeprefix("killed:")
        folder = out / f"{number}-run"
        if whole != case:
            killed(whole, folder, processes.count())
        result = trained(whole, folder, processes.count())
        if processes.is_first():
            state = {name: value.clone() for name, value in result.model.state_dict().items()}
            save_file(state, out / case.replace(":", "-"))
    processes.leave()


if __name__ == "__main__":
    main()
