"""Models drawn from the config of a compact checkpoint, as ``AutoModel.from_config`` has them: its shape, new numbers.

The widths that such a config names are placeholders. A class that is called with it would build another model without a
word, so that importing this module has ``from_config`` build what is described, and classes refuse to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

from ffnkit.checkpoint.hook import FfnkitConfig
from ffnkit.errors import FfnkitError
from ffnkit.io.formats import is_compact


def imported(modeling: ModuleType) -> None:
    """Have the models of ``transformers.modeling_utils`` know the configs of compact checkpoints."""
    base: Any = modeling.PreTrainedModel
    base._from_config = classmethod(_described(base._from_config.__func__))
    base.__init__ = _careful(base.__init__)


def _described(build: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' building of a model from a config, which the description in the config goes on with."""

    @wraps(build)
    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        described = getattr(config, "quantization_config", None)
        if not is_compact(described):
            return build(cls, config, **kwargs)
        read = FfnkitConfig.from_dict(described)
        read.base, read.base_done = None, False  # drawn weights are floats
        with taken_up(config):
            return _shaped(build(cls, config, **kwargs), read.to_dict())

    return _from_config


def _careful(init: Callable[..., None]) -> Callable[..., None]:
    """transformers' beginning of every model, which nobody may reach with a description that nobody goes on with."""

    @wraps(init)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        described = getattr(config, "quantization_config", None)
        if isinstance(described, FfnkitConfig):  # from_pretrained read it; parts may be built by from_config
            take_up(config)
        if is_compact(described):
            do = "Call from_config of an Auto class for new weights, from_pretrained for the checkpoint's"
            what = "the config is a compact checkpoint's, and the widths that it names are placeholders"
            raise FfnkitError(f"{type(self).__name__}(config)", what, do)
        init(self, config, *args, **kwargs)

    return __init__


@contextlib.contextmanager
def taken_up(config: Any) -> Iterator[None]:
    """While a model is built from a config whose description somebody goes on with; afterwards it says it as before."""
    told = take_up(config)
    try:
        yield
    finally:
        for each, described in told:
            if not isinstance(each.quantization_config, dict):  # the model that came of it may say it anew
                each.quantization_config = described


def take_up(config: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Mark a config and its parts as known, so that classes build them as they stand; what each said comes back."""
    from ffnkit.model.config_values import config_tree

    rows: list[Any] = [(each, getattr(each, "quantization_config", None)) for _, each in config_tree(config)]
    told = [(each, described) for each, described in rows if is_compact(described)]
    for each, described in told:
        each.quantization_config = FfnkitConfig.from_dict(described)
    return told


def _shaped(model: Any, described: dict[str, Any]) -> Any:
    """The plain model as described: widths and heads first, drawn as the family draws, then what stands in linears."""
    from ffnkit.checkpoint import contents
    from ffnkit.surgery.apply import share
    from ffnkit.surgery.description import renamed, tell
    from ffnkit.surgery.meta import rebuild
    from ffnkit.surgery.ties import declare_shared

    contents.check_sizes(model, described, {})
    bare = {name: {**row, "special": {}} for name, row in described["ffns"].items()}
    heads = described.get("attention", {})
    for step in (
        {"ffns": bare, "attention": heads},
        {key: value for key, value in described.items() if key != "attention"},
    ):
        there = {id(parameter): parameter for parameter in model.parameters()}
        rebuild(model, step)
        _draw(model, there)
    share(model, described)
    declare_shared(model)
    tell(model.config, renamed(model, described))
    return model


def _draw(model: Any, there: dict[int, Any]) -> None:
    """Numbers by the family's own rule for modules with parameters that are not among these."""
    for module in model.modules():
        if any(id(parameter) not in there for parameter in module.parameters(recurse=False)):
            module._is_hf_initialized = False
    model.init_weights()
