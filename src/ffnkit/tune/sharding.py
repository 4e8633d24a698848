"""Parameters in shards over several processes (FSDP2): groups that fit shared FFNs, whole weights in and out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.io import processes
from ffnkit.model.finding import block_name, ffns
from ffnkit.nn.adapter_layer import full_tensor, sharded_as
from ffnkit.surgery.journal import State


class SharedLinear(nn.Linear):
    """A linear that several layers share, under a class name that wrapping policies can name."""


class SharedConv1D(Conv1D):
    """A Conv1D that several layers share, under a class name that wrapping policies can name."""


def wrap_classes(model: nn.Module) -> list[str]:
    """Class names for ``transformer_cls_names_to_wrap``: the model's layers, and what layers share.

    FSDP2 refuses a parameter that lies in two groups. What layers share gets a group of its own, wrapped before the
    layers: the class of the FFN where layers share it whole, :class:`SharedLinear` where they share its linears; those
    linears change their class for it, and nothing else of them. Layers are named by what holds the FFNs:
    ``_no_split_modules`` of some families names the embeddings too, which accelerate shards a second time.

    Raises:
        FfnkitError: layers keep something of their own beside a weight that they share: no module is shared then.
    """
    names = []
    base = getattr(model, "get_base_model", lambda: model)()
    for ffn in ffns(base):
        owners = list(ffn.owners.values())
        names += [type(base.get_submodule(block_name(name))).__name__ for name in ffn.owners]
        if len(owners) < 2:
            continue
        if ffn.differing:
            found = f"{' and '.join(ffn.owners)} share weights and each keeps something of its own beside them"
            do = "Train it unsharded (DDP), or by LoRA, which gives each layer weights of its own"
            raise FfnkitError(f"FSDP of {type(base).__name__}", found, do)
        if all(owner is owners[0] for owner in owners):
            names.append(type(owners[0]).__name__)
            continue
        for site in ffn.sites:
            linear: Any = ffn.linear(site)
            for plain, shared in ((nn.Linear, SharedLinear), (Conv1D, SharedConv1D)):
                if type(linear) is plain:
                    linear.__class__ = shared
            names.append(type(linear).__name__)
    return list(dict.fromkeys(names))


def fsdp_plugin(model: nn.Module, **settings: Any) -> Any:
    """accelerate's plugin for FSDP2 (``Accelerator(fsdp_plugin=...)``) that fits a model with shared FFNs.

    Args:
        model: transformers model, before ``prepare``. settings: of ``FullyShardedDataParallelPlugin``.
    """
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(**{**_groups(model), **settings})


def _groups(model: nn.Module) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": wrap_classes(model),
    }


def is_asked() -> bool:
    """Whether the launcher asks for FSDP, as ``accelerate launch --use_fsdp`` does by the environment."""
    return processes.count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


@contextmanager
def ties_in_one_group(model: nn.Module) -> Iterator[None]:
    """While the block runs, what FSDP2 shards takes every module along that holds one of its weights too.

    accelerate puts a head and the embeddings that it is tied to into one group, and torch refuses a weight that lies in
    two. Encoder-decoders tie the embeddings of both stacks as well, masked language models a bias.
    """
    from torch.distributed import fsdp

    plain: Any = fsdp.fully_shard

    def together(module: Any, **how: Any) -> Any:
        given = [module] if isinstance(module, nn.Module) else list(module)
        held = {id(parameter) for each in given for parameter in each.parameters()}
        inside = {id(inner) for each in given for inner in each.modules()}
        more = [
            other
            for other in model.modules()
            if id(other) not in inside and any(id(p) in held for p in other.parameters(recurse=False))
        ]
        return plain([*given, *more] if more else module, **how)

    fsdp.fully_shard = together
    try:
        yield
    finally:
        fsdp.fully_shard = plain


@contextmanager
def in_shards(model: nn.Module, arguments: TrainingArguments) -> Iterator[None]:
    """A training inside the block may lay the model in shards, where that is asked for; behind it the model is whole.

    Where the block fails, weights are as they were before it.

    Args:
        arguments: get what accelerate's plugin is made of; what they leave open is the launcher's to say.
    """
    if not is_asked():
        yield
        return
    before = State.of(model.cpu())  # shards go to their devices from there
    arguments.fsdp_plugin_args = {
        **_groups(model),
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,  # it would have the model on meta for a while, and new parameters
    }
    try:
        with ties_in_one_group(model):
            yield
        values = {name: full_tensor(p).detach() for name, p in model.named_parameters(remove_duplicate=False)}
    finally:
        before.restore()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = values.pop(name)
        place = whole.device
        parameter.data = whole.to(parameter.dtype, copy=True)  # what was gathered lies in more memory than its own
    model.to(place)


def on_any_device(accelerator: Any, plugin: Any) -> None:
    """Let accelerate shard on a CPU as it does on accelerators; by itself it would take DDP there, and say nothing."""
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """Load a state of whole tensors into a model that may lie in shards; what it lacks is told as by torch."""
    own = model.state_dict(keep_vars=True)
    return model.load_state_dict({k: sharded_as(v, own[k]) if k in own else v for k, v in state.items()}, strict=False)
