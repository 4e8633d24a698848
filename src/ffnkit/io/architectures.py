"""A checkpoint as the class that it was saved from, whatever its task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def read_config(name_or_dir: str, **kwargs: Any) -> Any:
    """The config of a hub name or a folder; ``kwargs`` as for ``from_pretrained`` (revision, token, num_labels, ...).

    With ``return_unused_kwargs`` also those that are not about the config.

    Raises:
        FfnkitError: there is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    from ffnkit.io.loading import check_name, hub_or_cache, open_errors, trust

    name = check_name(name_or_dir)
    with open_errors(f"model {name}"), hub_or_cache():
        config = AutoConfig.from_pretrained(name, **{"trust_remote_code": trust.given, **kwargs})
    told = config[0] if isinstance(config, tuple) else config
    names = getattr(told, "architectures", None)
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(each, str) for each in names)):
        found = f"architectures in its config.json is {str(names)[:60]}"
        raise FfnkitError(f"model {name}", found, "Write the name of its class there, in a list")
    return config


def architecture_class(config: PretrainedConfig, name: str, **kwargs: Any) -> Any:
    """The class that ``config.architectures`` names.

    Args:
        kwargs: as for ``from_pretrained``: with ``trust_remote_code`` it may be a class of the checkpoint's own code.

    Raises:
        FfnkitError: no class is named, or transformers has none of that name.
    """
    import transformers

    from ffnkit.io.loading import HUB, trust

    names = getattr(config, "architectures", None) or []
    if not names:
        found = "its config.json names no class (architectures), so that nothing tells whether it has a head"
        likely = _of_type(config)
        raise FfnkitError(f"model {name}", found, f'Write "architectures": ["{likely}"], or another class, into it')
    own = {ref.rpartition(".")[2]: ref for ref in getattr(config, "auto_map", {}).values() if isinstance(ref, str)}
    if names[0] in own and kwargs.get("trust_remote_code", trust.given):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        hub = {key: kwargs[key] for key in HUB if key in kwargs and key != "trust_remote_code"}
        return get_class_from_dynamic_module(own[names[0]], name, **hub)
    found = getattr(transformers, names[0], None) or _registered(config, names[0])
    if found is None:
        do = "Open it in Python with its own class, and use ffnkit.plan, ffnkit.apply and ffnkit.save"
        raise FfnkitError(f"model {name}", f"transformers has no class {names[0]}", do)
    return found


def widened(name_or_dir: str) -> str | None:
    """In words, that a model which is stored in less than float32 trains, and is saved, in float32; else None."""
    import torch

    dtype = getattr(read_config(name_or_dir), "dtype", None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize >= torch.float32.itemsize:
        return None
    return f"{name_or_dir} is stored in {str(dtype).removeprefix('torch.')}; it trains and is saved in float32"


def _of_type(config: PretrainedConfig) -> str:
    """The class that models of this type mostly are."""
    from transformers.models.auto import modeling_auto as auto

    tables: tuple[Any, ...] = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    return str(next((table[config.model_type] for table in tables if config.model_type in table), "..."))


def _registered(config: PretrainedConfig, name: str) -> Any:
    """A class that someone registered with one of transformers' Auto classes (``AutoModel.register``)."""
    from transformers.models.auto import modeling_auto

    for mapping in vars(modeling_auto).values():
        added = getattr(mapping, "_extra_content", {}).get(type(config), ())
        for each in added if isinstance(added, tuple) else (added,):
            if each.__name__ == name:
                return each
    return None


def is_own(model: Any) -> bool:
    """Whether a model is of a class of ffnkit's own, which transformers opens once ffnkit is imported."""
    return type(model).__module__.startswith(f"{__name__.partition('.')[0]}.")


def is_ffnkit_config(config: PretrainedConfig) -> bool:
    """Whether ``config`` is of a compact checkpoint, whose true widths only ffnkit's hook knows."""
    from ffnkit.io.formats import is_compact

    return is_compact(getattr(config, "quantization_config", None))


def load_any(name_or_dir: str, **kwargs: Any) -> PreTrainedModel:
    """Load a standard or compact checkpoint as the class that it was saved from, in eval mode.

    Args:
        name_or_dir: hub name or folder.
        kwargs: for ``from_pretrained`` (dtype, num_labels, ...).

    Raises:
        FfnkitError: the model cannot be found, read or recognised, or its weights are not finite.
    """
    from ffnkit.io.loading import HUB, load_pretrained

    config = kwargs.get("config")
    if config is None:
        told = {key: kwargs[key] for key in (*HUB, "architectures") if key in kwargs}
        config = read_config(name_or_dir, **told)
    cls = architecture_class(config, name_or_dir, **{key: kwargs[key] for key in HUB if key in kwargs})
    return load_pretrained(cls, name_or_dir, **kwargs)


def empty_model(name_or_dir: str) -> PreTrainedModel:
    """The structure of a model without its weights (meta device). What a config alone does not tell is loaded in full:
    a compact checkpoint, and one with updates or adapters beside it.

    Raises:
        FfnkitError: as :func:`load_any`, and for a config that describes no model.
    """
    import torch

    from ffnkit.io.apart import has_adapters
    from ffnkit.io.loading import open_errors

    config = read_config(name_or_dir)
    if is_ffnkit_config(config) or has_adapters(name_or_dir):
        return load_any(name_or_dir)
    cls = architecture_class(config, name_or_dir)
    with open_errors(f"model {name_or_dir}"), torch.device("meta"):
        return cls(config)


def load_companion(name_or_dir: str) -> Any | None:
    """The tokenizer or processor beside a model, or None when there is none."""
    from transformers import AutoProcessor

    from ffnkit.io.loading import check_name, hub_or_cache, load_tokenizer, trust

    try:
        return load_tokenizer(name_or_dir)
    except FfnkitError:
        pass
    name = check_name(name_or_dir)
    try:
        with hub_or_cache():
            return AutoProcessor.from_pretrained(name, trust_remote_code=trust.given)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
