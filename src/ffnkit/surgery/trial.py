"""Edits whose effect can be had by hooks are tried out: the model with them, and opened anew, gives what hooks give.

Whether a layer may move, or heads may go, hangs on what the family's code does with numbers and shapes. So it is run:
the model as it is, with what goes silenced; the model with the edits; and what plain transformers opens from the config
and the tensors that would be written, which share their memory with the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnkit.edits import Edit
from ffnkit.edits.base import Stage
from ffnkit.errors import FfnkitError
from ffnkit.io.config_text import written
from ffnkit.io.loading import no_bars
from ffnkit.model import probe, running
from ffnkit.model.finding import block_name
from ffnkit.model.layer_reads import reads
from ffnkit.nn.adapter_layer import plain_state
from ffnkit.nn.grouped_experts import run_uneven_experts
from ffnkit.surgery.description import description
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.surgery.writer import ModelWriter


def try_out(model: nn.Module, edits: Iterable[Edit], batch: Mapping[str, Any] | None = None) -> None:
    """Run the edits that leave something out, where inputs are known; the model is afterwards as it was.

    Memory: the new tensors of the edits. Three passes of a few tokens.

    Args:
        batch: inputs for ``model(**batch)``; None makes some up.

    Raises:
        FfnkitError: the model with the edits cannot run or be opened anew, or gives something else.
    """
    tried = [edit for edit in edits if type(edit).silenced is not Edit.silenced]
    if not tried or not isinstance(model, PreTrainedModel) or not _at_hand(model):
        return
    asked = tried[0].asked + (f" and {len(tried) - 1} more" if len(tried) > 1 else "")
    unlabelled = {name: value for name, value in (batch or {}).items() if not name.startswith("label")}
    given_batches = [dict(each) for each in running.beginnings(unlabelled)] if unlabelled else []
    runs = (each for each in given_batches if not isinstance(_run(model, each), str))
    batch = next(runs, None) or probe.runnable(model)
    if batch is None:
        _check_read(model, tried, asked)
        return
    wanted, idle = _silenced(model, ModelWriter(model), tried, batch)
    _check_read(model, idle, asked)
    try:
        with TemporaryPlan(model, tried):
            given = _run(model, batch)
            again = _run(_opened(model), batch)
    except FfnkitError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise FfnkitError(asked, f"the model cannot be opened anew ({_line(error)})", _DO) from error
    for found, how in ((wanted, "left out by hooks"), (given, "as it is then"), (again, "opened anew")):
        if isinstance(found, str):
            raise FfnkitError(asked, f"the model {how} does not run ({found})", _DO)
    _check_same(model, wanted, given, asked, "outputs are not those of the model with what goes left out")
    _check_same(model, given, again, asked, "outputs are others once the model is opened anew")


_DO = "Leave this out for this family"


def _at_hand(model: PreTrainedModel) -> bool:
    """Whether all of it lies in memory as plain tensors, on one device."""
    held = [*model.parameters(), *model.buffers()]
    plain = all(type(value) in (Tensor, nn.Parameter) and not value.is_meta for value in held)
    return plain and len({value.device for value in held}) == 1 and not getattr(model, "is_quantized", False)


def _run(model: nn.Module, batch: dict[str, Any]) -> list[Tensor] | str:
    """The outputs, or why there are none."""
    try:
        return running.outputs(model, batch)
    except Exception as error:  # whatever a family raises for inputs that it does not take
        return _line(error)


def _silenced(
    model: nn.Module, writer: ModelWriter, tried: list[Edit], batch: dict[str, Any]
) -> tuple[list[Tensor] | str, list[Edit]]:
    """The outputs with what goes silenced, and the edits of layers that these inputs do not reach."""
    reached: set[Edit] = set()
    handles: list[Any] = []
    try:
        for edit in tried:
            block = model.get_submodule(block_name(edit.target))
            handles.append(block.register_forward_hook(lambda *_, edit=edit: reached.add(edit)))
            handles += edit.silenced(writer)
        outputs = _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, [edit for edit in tried if edit not in reached]


def _opened(model: PreTrainedModel) -> nn.Module:
    """What plain transformers opens from the config as it is written, with the very same tensors."""
    config = written(model.config)
    if (described := description(model)) is not None:
        config.quantization_config = described
    state = {name: value.detach() for name, value in plain_state(model).items()}
    place: dict[str, Any] = {} if model.device.type == "cpu" else {"device_map": model.device}
    how = {"attn_implementation": model.config._attn_implementation} if model.config._attn_implementation else {}
    kind: Any = type(model)
    with no_bars():
        opened: nn.Module = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, **place, **how
        )
    run_uneven_experts(opened)
    return opened


def _check_same(model: PreTrainedModel, first: Any, second: Any, asked: str, found: str) -> None:
    limit = running.rounding(model.dtype) ** 0.5  # roundings lie far below, another function far above
    try:
        off = running.difference(first, second)
    except ValueError as error:
        raise FfnkitError(asked, f"{found} ({_line(error)})", _DO) from error
    if not off <= limit:
        raise FfnkitError(asked, f"{found} (they differ by {off:.2g})", _DO)


def _check_read(model: nn.Module, tried: list[Edit], asked: str) -> None:
    """For layers that no inputs reach: raises FfnkitError where they compute with their number."""
    for edit in tried:
        if edit.stage is not Stage.LAYERS:
            continue
        block = block_name(edit.target)
        inside = list(model.get_submodule(block).modules())
        number = int(block.rpartition(".")[2]) if block else -1
        known = reads(map(type, inside)).computed
        for module in inside:
            for key, value in vars(module).items():
                if key in known and type(value) is int and value == number and "layer" in key:
                    what = f"{type(module).__name__} computes with {key}, and no inputs are known to compare with"
                    raise FfnkitError(asked, what, "Give data: batches for model(**batch)")


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
