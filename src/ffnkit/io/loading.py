"""Opening checkpoints of the hub or of a folder, with one-line errors and a check of the weights."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import os
import socket
import sys
import traceback
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ffnkit.errors import FfnkitError
from ffnkit.io import placing, quickstart
from ffnkit.io.apart import ADAPTERS, base_of, is_apart, with_updates
from ffnkit.io.backends import is_of_quantizer, quantizer_reason
from ffnkit.io.conversions import forget_few_bits, from_few_bits
from ffnkit.io.fitting import check_fits, is_head
from ffnkit.io.progress import phase
from ffnkit.io.sentences import sentence_folder
from ffnkit.io.sizes import check_config, checkpoint_files, stored_shapes
from ffnkit.io.workspace import put_aside
from ffnkit.nn.grouped_experts import run_uneven_experts

logger = logging.getLogger(__name__)
_REPORTERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
# Settings of from_pretrained that find the config as well as the weights.
HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "force_download")
_PIECE = 1 << 20  # numbers that are summed at a time: in a wider dtype they are copied
_NOT_HERE = "there is no such folder"
_FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


@dataclass
class Trust:
    """Whether models may run code of their own where the caller does not say it."""

    given: bool = False


trust = Trust()


def load_pretrained(auto_class: Any, name_or_dir: str | Path, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(name_or_dir, **kwargs)``, checked.

    Compact checkpoints open too. Custom code runs only with ``trust_remote_code=True`` among ``kwargs``.

    Raises:
        FfnkitError: no such model, files that cannot be read, a network that cannot be reached, weights of another
            shape than the config's, weights that are not there (those of a new task head may be), or a weight that is
            NaN or infinite.
    """
    return load_with_info(auto_class, name_or_dir, **kwargs)[0]


def load_with_info(auto_class: Any, name_or_dir: str | Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """:func:`load_pretrained`, and transformers' loading info: missing, unexpected and mismatched keys.

    The load report of transformers is printed unless the task head alone is new.
    """
    name = check_name(name_or_dir)
    redraw = kwargs.pop("ignore_mismatched_sizes", False)
    kwargs = {"trust_remote_code": trust.given, **kwargs}
    told = vars(kwargs["config"]) if kwargs.get("config") is not None else _told(name, **kwargs)
    with open_errors(f"model {name}"):
        if os.path.isdir(name) and (stored := stored_shapes(checkpoint_files(name))):
            from ffnkit.io.architectures import read_config

            config = kwargs.get("config") or read_config(name, trust_remote_code=kwargs["trust_remote_code"])
            check_config(auto_class, config, stored, f"model {name}")
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True, **placing.asked(), **kwargs}
    plain = from_few_bits(told.get("quantization_config"), asked)
    with phase(f"loading {name}"), open_errors(f"model {name}"), hub_or_cache(), _held_reports() as held, plain as how:
        model, info = auto_class.from_pretrained(name, **how)
    forget_few_bits(model, name)
    classes = _told(name, **kwargs).get("architectures") if info["missing_keys"] else None
    check_fits(model, info, name, classes or [], redraw=redraw)
    if not _only_head(model, info):
        for record in held:
            logging.getLogger(record.name).handle(record)
    placing.check_placed(model, name)
    _check_numbers(model, name)
    check_weights(model, name)
    _note_drawn(model, info)
    model._ffnkit_opened = {key: kwargs[key] for key in ("revision", "cache_dir", "subfolder") if kwargs.get(key)}
    if "experts_implementation" not in kwargs:
        run_uneven_experts(model)
    return with_updates(model, name_or_dir), info


def load_tokenizer(name_or_dir: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a hub name or a folder.

    Raises:
        FfnkitError: no such model, or no tokenizer files beside it.
    """
    from transformers import AutoTokenizer

    name = check_name(name_or_dir)
    kwargs = {"trust_remote_code": trust.given, **kwargs}
    do = "Name a model or folder that has tokenizer files with --tokenizer (tokenizer= in Python)"
    with open_errors(f"tokenizer of {name}", do), hub_or_cache():
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise FfnkitError(f"tokenizer of {name}", "there are no tokenizer files beside the model", do)
    return tokenizer


def check_name(name_or_dir: str | Path) -> str:
    """``name_or_dir`` as from_pretrained wants it, with ``~`` expanded; the base where updates lie apart from it.

    "quickstart" is the model that comes with a package (``io.quickstart``).

    Raises:
        FfnkitError: it is a file, a path to nothing, or a folder without config.json.
    """
    text = str(name_or_dir)
    if not text.strip():
        raise FfnkitError("model ''", "the name is empty", "Name a folder, or a model of the hub")
    if text == quickstart.NAME:
        return str(quickstart.model_path())
    path, asked = Path(text).expanduser(), f"model {text}"
    if os.path.isfile(path):
        raise FfnkitError(asked, "this is a file", "Name the folder that holds config.json, or a model of the hub")
    if os.path.isdir(path):
        if is_apart(path):
            return str(base_of(path))
        if (held := sentence_folder(path)) is not None:
            return str(held.root / held.transformer)
        if not any((path / file).is_file() for file in ("config.json", "tokenizer_config.json")):
            if any((path / file).is_file() for file in ADAPTERS):
                do = "Open the model that it was made for, then fk.load_adapter (tune.load_adapter where it is LoRA)"
                raise FfnkitError(asked, "the folder holds an adapter without its model", do)
            raise FfnkitError(asked, "the folder has no config.json", "Name a folder that save_pretrained wrote")
        return str(path)
    if (aside := put_aside(path)) is not None:
        found = f"a save was killed while it replaced it; its content is put aside in {aside}"
        raise FfnkitError(asked, found, f"Rename that to {text}, or save something beside it, which brings it back")
    if text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or os.path.isabs(text):
        do = (
            f"Did you mean the folder {near}?"
            if (near := _near(text))
            else "Check the path, or name a model of the hub"
        )
        raise FfnkitError(asked, _NOT_HERE, do)
    return text


@contextlib.contextmanager
def open_errors(asked: str, do: str | None = None) -> Iterator[None]:
    """Turns what others' code raises on files that it cannot use into one FfnkitError about ``asked``.

    Faults of our own pass: errors that our code raises itself, other than of the kinds that files cause.
    """
    from safetensors import SafetensorError

    try:
        yield
    except FfnkitError:
        raise
    except SafetensorError as error:
        found = f"its safetensors file is corrupted or cut short ({_first_line(error)})"
        raise FfnkitError(asked, found, "Save or download it again") from error
    except Exception as error:
        usual_kinds = (OSError, ValueError, KeyError, RuntimeError, ImportError)
        if not isinstance(error, usual_kinds) and _raised_here(error):
            raise
        found, usual = _reason(error)
        if found.startswith(_NOT_HERE):  # what is wrong is the name, whatever was wanted of it
            name = asked.rpartition(" ")[2]
            do = f"Did you mean the folder {near}?" if (near := _near(name)) else usual
        raise FfnkitError(asked, found, do or usual) from error


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars for files that are read and written."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Has the hub's libraries look in their caches only while the hub is out of reach, instead of retrying a minute."""
    if hub_reachable():
        yield
        return
    from huggingface_hub import constants

    # datasets keeps a copy of the flag; it is changed where datasets is imported already.
    holders = [constants, *(module for module in [sys.modules.get("datasets.config")] if module is not None)]
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    for holder in holders:
        holder.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@cache
def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers (True behind a proxy, where this cannot be told); asked once a process.

    Args:
        timeout: seconds to wait for a connection.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.hostname is None or (address.scheme or "https") in urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=timeout):
            return True
    except OSError:
        return False


def check_weights(model: Any, name: str) -> None:
    """Raises FfnkitError naming the first floating-point weight that is NaN or infinite. Reads each weight once."""
    import torch

    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Quantized tensors are subclasses that claim the float type which they stand for.
            plain = type(tensor.data) is torch.Tensor
            if not plain or tensor.is_meta or str(tensor.dtype) not in _FLOATS:
                continue
            bad = torch.isnan if not isinstance(tensor, torch.nn.Parameter) else _not_finite
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            # A finite sum clears a tensor; only the others are looked at number by number.
            parts = tensor.view(-1).split(_PIECE) if tensor.is_contiguous() else (tensor,)
            sums = tensor.new_zeros(len(parts), dtype=wide)
            for number, part in enumerate(parts):  # a result kept behind each copy would have the heap grow by them all
                sums[number] = part.sum(dtype=wide)
            if bool(sums.isfinite().all()) or not (count := sum(int(bad(part).sum()) for part in parts)):
                continue
            found = f"{count} of {tensor.numel()} numbers of {key} are NaN or infinite"
            raise FfnkitError(f"model {name}", found, "Use another checkpoint, or one from before training diverged")


def _check_numbers(model: Any, name: str) -> None:
    """Raises FfnkitError for a weight of truth values or whole numbers, with which no model computes."""
    for key, parameter in model.named_parameters():
        plain = str(type(parameter.data)) == "<class 'torch.Tensor'>" and not getattr(model, "is_quantized", False)
        if plain and not (parameter.is_floating_point() or parameter.is_complex()):
            found = f"{key} holds {parameter.dtype} in the file"
            raise FfnkitError(f"model {name}", found, "Use a checkpoint whose weights are floats")


def newly_initialized(model: Any) -> tuple[str, ...]:
    """Parameters of the head that were in no file when ffnkit opened the model; none once any of them has changed."""
    drawn = getattr(model, "_ffnkit_newly_initialized", {})
    now = dict(model.named_parameters())
    for key, first in drawn.items():
        if key not in now or not first.to(now[key].dtype).equal(_sample(now[key])):
            return ()
    return tuple(drawn)


def _note_drawn(model: Any, info: dict[str, Any]) -> None:
    absent = {*info.get("missing_keys", ()), *(key for key, *_ in info.get("mismatched_keys", ()))}
    named = dict(model.named_parameters())
    model._ffnkit_newly_initialized = {
        key: _sample(named[key]) for key in named if key in absent and is_head(model, key)
    }


def _sample(parameter: Any) -> Any:
    """Some of its numbers, on the CPU."""
    return parameter.detach().flatten()[:256].clone().cpu()


def _not_finite(tensor: Any) -> Any:
    return ~tensor.isfinite()


def _only_head(model: Any, info: dict[str, Any]) -> bool:
    """Whether what the load report tells is only that this model has another head than the checkpoint's."""
    if info.get("mismatched_keys") or info.get("error_msgs") or info.get("conversion_errors"):
        return False
    body = getattr(model, getattr(model, "base_model_prefix", "") or "base_model", None)
    own = {child for child, _ in body.named_children()} if body is not None and body is not model else set()
    unexpected = [key for key in info.get("unexpected_keys", ()) if key.split(".")[0] in own - {"pooler"}]
    strange = [key for key in info.get("unexpected_keys", ()) if not is_head(model, key)]
    return not unexpected and not strange and all(is_head(model, key) for key in info.get("missing_keys", ()))


def _told(name: str, **kwargs: Any) -> dict[str, Any]:
    """The config that lies in the files of a checkpoint, as data, whatever config it was opened with."""
    from transformers import PreTrainedConfig

    hub = {key: kwargs[key] for key in HUB if key in kwargs}
    with open_errors(f"model {name}"), hub_or_cache():
        return PreTrainedConfig.get_config_dict(name, **hub)[0]


@contextlib.contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Collects transformers' load reports instead of printing them."""
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    loggers = [logging.getLogger(name) for name in _REPORTERS]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield held
    finally:
        for each in loggers:
            each.removeFilter(keep)


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost code is ours."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _near(name: str) -> str | None:
    """A folder beside where ``name`` would be whose name is much like it."""
    path = Path(name).expanduser()
    try:
        folders = {each.name: each for each in itertools.islice(path.parent.iterdir(), 10_000) if each.is_dir()}
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, folders, n=1)
    return str(folders[close[0]]) if close else None


def _reason(error: Exception) -> tuple[str, str]:
    """What was found, and what to do, for an error of from_pretrained."""
    text = str(error)
    if is_of_quantizer(error):
        return quantizer_reason(error)
    if "connect" in text.lower() or "LocalEntryNotFound" in text or "offline mode" in text:
        found = f"{_NOT_HERE}; it is not in the cache, and the hub cannot be reached"
        return found, "Check the path; for a model of the hub connect to the network"
    if "is not a local folder and is not a valid model identifier" in text or "Repo id must be" in text:
        return f"{_NOT_HERE}, and no such model on the hub", "Check the name"
    if "Unrecognized configuration class" in text:
        do = "Choose another model or another task; one that writes text classifies by label words (--head words)"
        return "transformers has no model of this kind for its architecture", do
    if "trust_remote_code" in text:
        return (
            "it needs code of its own",
            "If you trust its authors, pass trust_remote_code=True, or ffnkit --trust-remote-code",
        )
    if "size mismatch" in text:
        line = next((part.strip() for part in text.splitlines() if "size mismatch" in part), "sizes do not match")
        return line.rstrip("."), "Use a checkpoint whose config.json fits its weights and the task"
    if isinstance(error, ImportError) and "pip install" in text:
        return _first_line(error), "Install what its code needs in this environment"
    if "no file named" in text:
        return _first_line(error), "Name a folder that save_pretrained wrote"
    return _first_line(error), "Check the name and the files of the model"
