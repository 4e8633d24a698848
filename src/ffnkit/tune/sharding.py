"""Models with shared FFNs in several processes: what FSDP must keep in groups of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ffnkit.model.finding import block_name, ffns


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
    """
    names = []
    for ffn in ffns(model):
        owners = list(ffn.owners.values())
        names += [type(model.get_submodule(block_name(name))).__name__ for name in ffn.owners]
        if len(owners) < 2:
            continue
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

    own = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": wrap_classes(model),
    }
    return FullyShardedDataParallelPlugin(**{**own, **settings})
