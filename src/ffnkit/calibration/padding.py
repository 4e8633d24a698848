"""Which tokens count: the batch's mask as each stack, and each call inside a block, really sees it.

A model hands a stack the tokens of its mask one to one, or fewer (speech is subsampled by convolutions), or more
(padded on the right to an attention window), or other ones (images have no padding). A block may call its FFN with all
tokens at once, with chunks of the sequence, or with those that a router chose.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, decoder_given, has_decoder
from ffnkit.errors import FfnkitError, FfnkitWarning
from ffnkit.model.finding import block_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ffnkit.model.ffn import FFN

IMAGES = re.compile(r"^(vision|visual|image|pixel)")
SOUNDS = re.compile(r"^(audio|speech)")
TOKENS_FIRST = ("fsmt",)  # model types whose hidden states are (tokens, batch, d)
SUBSAMPLED = "_get_feature_vector_attention_mask"  # transformers' name for it in all speech models
PADDED = "_pad_to_"  # begins the name of what pads inputs on the right to a window or block


def token_mask(model: nn.Module, batch: Batch, name: str, stack: str, shape: tuple[int, ...]) -> Tensor | None:
    """Which of the tokens (batch, tokens) of hidden states count, bool; None where all do.

    Args:
        batch: prepared. name: path of a module that gets these hidden states. stack: its stack.
        shape: of the hidden states, without the last dimension.

    Raises:
        FfnkitError: it is not known how the batch's mask lies on hidden states of this shape.
    """
    mask = _own_mask(model, batch, name, stack)
    if mask is None:
        return None
    if shape == (len(mask),):  # one row an example: pooled
        return None
    found = _fitted(mask.ne(0), model, batch, shape, subsampled=stack != "decoder")
    if found is None:
        what = f"a mask of shape {tuple(mask.shape)} for hidden states of shape {tuple(shape)}"
        raise FfnkitError(f"the tokens of {name or type(model).__name__} that count", what, "Give data without padding")
    return found


def _own_mask(model: nn.Module, batch: Batch, name: str, stack: str) -> Tensor | None:
    """The batch's mask for one stack, ones for tokens, as it is given."""
    if stack == "decoder" and has_decoder(model):
        labels, given = batch.get("labels"), batch.get("decoder_attention_mask")
        if given is not None:
            return _tensor(given)
        if decoder_given(batch):
            return None
        if labels is not None and labels.ndim == 2:
            return _tensor(labels.ne(-100))
        # classifiers feed the inputs to the decoder too, behind a start token, and read it up to the last place of them
        return _tensor(batch.get("attention_mask")) if "input_ids" in batch else None
    parts = name.split(".")
    if any(map(IMAGES.match, parts)) or ("input_ids" in batch and any(map(SOUNDS.match, parts))):
        return None
    return _tensor(batch.get("attention_mask"))


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _fitted(mask: Tensor, model: nn.Module, batch: Batch, shape: tuple[int, ...], *, subsampled: bool) -> Tensor | None:
    ids = batch.get("input_ids")
    if mask.ndim == 3 and isinstance(ids, Tensor) and ids.ndim == 3:  # several choices, one below the other
        mask = mask.flatten(0, 1)
    if getattr(getattr(model, "config", None), "model_type", "") in TOKENS_FIRST and mask.ndim == 2:
        mask = mask.mT
    if tuple(shape) == (mask.numel(),):
        return mask.flatten()
    if tuple(mask.shape) == tuple(shape):
        return mask
    if mask.ndim != 2 or len(shape) != 2 or len(mask) != shape[0]:
        return None
    for module in model.modules():
        if subsampled and hasattr(module, SUBSAMPLED):
            given = getattr(module, SUBSAMPLED)
            more = {"add_adapter": False} if "add_adapter" in inspect.signature(given).parameters else {}
            return given(shape[1], mask.long(), **more).bool() & mask.any(-1, keepdim=True)
        if shape[1] > mask.shape[1] and any(each.startswith(PADDED) for each in dir(type(module))):
            return nn.functional.pad(mask, (0, shape[1] - mask.shape[1]), value=False)
    return None


@dataclass
class _Call:
    """One call of a block: the shape of its hidden states, how far into them its chunks have come, its other inputs."""

    block: str
    shape: tuple[int, ...]
    offset: int = 0
    others: tuple[Tensor, ...] = ()


class TokenMasks:
    """Which rows of what modules get count, while a model runs.

    Args:
        places: by the key that :meth:`of` is asked with, the stack, and the paths of the module or modules (those that
            share weights) in the model.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, tuple[str, Iterable[str]]]) -> None:
        self.model = model
        self._batch: Batch = {}
        self._stacks: dict[str, str] = {}
        self._by_block: dict[str, list[str]] = {}
        self._routers: dict[str, list[tuple[str, str]]] = {}
        self._calls: dict[str, _Call] = {}
        self._routed: dict[str, tuple[Any, ...]] = {}
        self._fitted: dict[tuple[str, bool, tuple[int, ...]], Tensor | None] = {}
        self._told: set[str] = set()
        for key, (stack, paths) in places.items():
            self._stacks[key] = stack
            for path in paths:
                if (block := block_name(path)) and key not in self._by_block.setdefault(block, []):
                    self._by_block[block].append(key)
                if (expert := re.match(r"(.*\bexperts)\.([^.]+)", path)) is not None:
                    self._routers.setdefault(expert[1], []).append((key, expert[2]))

    @classmethod
    def of_ffns(cls, model: nn.Module, found: Iterable[FFN]) -> TokenMasks:
        """Asked with the FFNs' names."""
        return cls(model, {ffn.name: (ffn.stack, list(ffn.owners)) for ffn in found})

    def start(self, batch: Batch) -> None:
        """Another batch, prepared."""
        self._batch = batch
        self._calls.clear()
        self._routed.clear()
        self._fitted.clear()

    @contextmanager
    def watching(self) -> Iterator[TokenMasks]:
        """Hooks on the blocks while the ``with`` block runs."""
        handles = []
        try:
            for block, keys in self._by_block.items():
                hook = partial(self._enter, block, keys)
                handles.append(self.model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True))
            for path, experts in self._routers.items():
                container = self.model.get_submodule(path)
                names = [name for name, _ in container.named_children()]
                hook = partial(self._route, {key: names.index(name) for key, name in experts}, len(names))
                handles.append(container.register_forward_pre_hook(hook, with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def of(self, key: str, x: Tensor, *, quiet: bool = False) -> Tensor | None:
        """(n,) float32 ones for rows of ``x`` (..., columns) that count and zeros for others; None where all do.

        To be asked once for each call of the module, in the order of its chunks.

        Args:
            quiet: rows that are no tokens of the stack are no reason to warn (positions, say).
        """
        rows = self._rows(key, x, quiet=quiet)
        return None if rows is None else rows.reshape(-1).to(x.device, torch.float32)

    def _rows(self, key: str, x: Tensor, *, quiet: bool) -> Tensor | None:
        call = self._calls.get(key) or _Call(key, tuple(x.shape[:-1]))
        if any(_same(x, other) for other in call.others):  # keys and values of cross-attention
            return self._mask(call.block, key, tuple(x.shape[:-1]), "encoder")
        whole = self._mask(call.block, key, call.shape, self._stacks[key])
        if whole is None:
            return None
        if x.numel() // x.shape[-1] == whole.numel():
            return whole.mT if _turned(x, whole) else whole
        if x.ndim == 4 and x.shape[1:3] == whole.shape:
            return whole.expand(x.shape[:-1])
        stop = call.offset + x.shape[1] if x.ndim == 3 else 0
        if x.ndim == 3 and len(x) == len(whole) and stop <= whole.shape[1]:
            part = whole[:, call.offset : stop]
            call.offset = stop
            return part
        chosen = self._chosen(key, x)
        if chosen is not None:
            return whole.reshape(-1)[chosen.to(whole.device)]
        if not quiet:
            self._tell(key, f"{tuple(x.shape[:-1])} of its {tuple(whole.shape)} tokens come to it, not known which")
        return None

    def _mask(self, block: str, key: str, shape: tuple[int, ...], stack: str) -> Tensor | None:
        other = stack != self._stacks[key]
        if (block, other, shape) not in self._fitted:
            try:
                # another stack's tokens are named by that stack alone
                found = token_mask(self.model, self._batch, "" if other else block, stack, shape)
            except FfnkitError as error:
                self._tell(stack, error.found)
                found = None
            self._fitted[block, other, shape] = found
        return self._fitted[block, other, shape]

    def _tell(self, what: str, found: str) -> None:
        if what not in self._told:
            self._told.add(what)
            name = f"{type(self.model).__name__} {what}".strip()
            warnings.warn(f"{name}: {found}; padding counts as data there", FfnkitWarning, stacklevel=2)

    # --- hooks

    def _enter(self, block: str, keys: list[str], _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        first = kwargs.get("hidden_states") if not args else args[0]
        if not isinstance(first, Tensor) or first.ndim < 3:
            for key in keys:
                self._calls.pop(key, None)
            return
        others = tuple(v for v in given if v is not first and v.ndim == 3 and v.shape[-1] == first.shape[-1])
        for key in keys:
            # of several streams of the same tokens (Gemma 3n, streams first) an FFN gets one
            self._calls[key] = _Call(block, tuple(first.shape[-3:-1]), others=others)

    def _route(self, numbers: dict[str, int], count: int, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for key, number in numbers.items():
            self._routed[key] = (number, count, *tensors[:2])

    def _chosen(self, key: str, x: Tensor) -> Tensor | None:
        """The tokens that a router gave to an expert that is a module of its own, where they are these."""
        number, count, *given = self._routed.get(key, (0, 0))
        if len(given) < 2:
            return None
        tokens = given[0].reshape(-1, given[0].shape[-1])
        choices = given[1].reshape(len(tokens), -1) if given[1].numel() % len(tokens) == 0 else None
        if choices is None:
            return None
        one_hot = choices.shape[1] == count
        rows = torch.where(choices[:, number] != 0 if one_hot else (choices == number).any(1))[0]
        return rows if len(rows) == x.numel() // x.shape[-1] else None


def _turned(x: Tensor, mask: Tensor) -> bool:
    """Whether rows are (tokens, batch), as inside of Longformer's attention."""
    if x.ndim != 3 or mask.ndim != 2 or x.shape[:2] != mask.shape[::-1]:
        return False
    return mask.shape[0] != mask.shape[1] or x.stride(0) < x.stride(1)


def _same(x: Tensor, other: Tensor) -> bool:
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape
