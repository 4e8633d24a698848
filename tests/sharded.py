"""One process of distributed runs: ``python sharded.py OUT {ddp,fsdp}:FAMILY:WHAT ...``; RANK, WORLD_SIZE say which.

The runs are made one after the other, so that the imports are paid for once; each leaves its state in a file of OUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from families import FAMILIES
from torch import nn

import ffnkit as fk
from ffnkit.methods.share.merging import Merging
from ffnkit.methods.update.coefficients import with_coefficients

STEPS = 3


def tied(name: str) -> Any:
    """A model of the family whose layers share one FFN."""
    model = FAMILIES[name].model()
    return fk.apply(model, fk.plan(model, Merging(layers="all", match=False)))


def made(name: str, what: str) -> Any:
    """A tied model, one with reparametrized linears, or one with updates: DSEE's, or SparseGrad's of that selection."""
    if what == "tied":
        return tied(name)
    model = FAMILIES[name].model()
    if what in ("scaled", "lowrank", "masked"):
        method = {"scaled": "fusion", "lowrank": "svd", "masked": "prune"}[what]
        more = {"sparsity": 0.5} if what == "masked" else {"width": 0.5}
        return fk.apply(model, fk.plan(model, fk.methods.build(method, **more)))
    if what == "dsee":
        plan = fk.plan(model, fk.DSEE(targets="all", rank=2, nonzeros=40, modules_to_train=("head", "norms")))
        return fk.apply(model, with_coefficients(model, plan, l1=0.01))
    inputs = FAMILIES[name].inputs(model)
    data = [inputs | {"labels": torch.arange(len(inputs["input_ids"])) % 2}]
    settings = {"density": 0.1, "core": 1.0, "every": 2, "modules_to_train": ("head", "norms"), "selection": what}
    return fk.apply(model, fk.plan(model, fk.SparseGrad(**settings), data=data))


def train(model: nn.Module, inputs: dict[str, torch.Tensor], rank: int, world: int) -> None:
    """A few steps of SGD on this process's rows, the gradient of each in two parts."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        for part in (0.25, 0.75):
            output = model(**{key: value[rank::world] for key, value in inputs.items()})
            (part * output[0].float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(kind: str, name: str, what: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The state of the whole model after the steps, once it was loaded again."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    model = made(name, what)
    inputs = FAMILIES[name].inputs(model)
    if kind == "ddp":
        train(nn.parallel.DistributedDataParallel(model), inputs, rank, world)
        return model.state_dict()
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from ffnkit.tune.sharding import fsdp_plugin, ties_in_one_group

    # accelerate takes FSDP on accelerators only; this is what it does to a model there
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=fsdp_plugin(model, cpu_ram_efficient_loading=False)),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        torch_device_mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)),
    )
    with ties_in_one_group(model):
        model = fsdp2_prepare_model(accelerator, model)
    train(model, inputs, rank, world)
    whole = StateDictOptions(full_state_dict=True)
    if what != "tied":  # torch distributes a parameter under one of its names only
        set_model_state_dict(model, get_model_state_dict(model, options=whole), options=whole)
    return get_model_state_dict(model, options=whole)


def main() -> None:
    import torch.distributed as dist
    from safetensors.torch import save_file

    out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for case in cases:
        kind, name, what = case.split(":")
        state = sharded(kind, name, what, rank, world)
        if rank == 0:
            save_file({key: value.clone() for key, value in state.items()}, Path(out) / f"{kind}-{name}-{what}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
