"""The state of a distillation on disk: one safetensors file, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.io.files import replacing
from ffnkit.io.folders import check_target

FILE = "distil.safetensors"
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Losses so far and their parts by name, seconds, and where they are saved (None: nowhere)."""

    folder: Path | None
    run: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, loss: float, parts: Mapping[str, float]) -> None:
        """Note the loss of one step."""
        self.losses.append(loss)
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part)

    @classmethod
    def load(cls, out_dir: str | Path | None, parameters: Mapping[str, nn.Parameter], run: dict[str, Any]) -> State:
        """The state saved in ``out_dir``, or a fresh one.

        Raises:
            FfnkitError: the file cannot be read, or is of a run with other settings.
        """
        if out_dir is None:
            return cls(None, run)
        folder = check_target(out_dir, "training")
        path = folder / FILE
        if not path.exists():
            return cls(folder, run)
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, seconds = json.loads(meta["run"]), float(meta["seconds"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise FfnkitError(f"resuming distillation from '{path}'", str(error), "Remove the file") from error
        differing = [key for key in run if run[key] != found.get(key)]
        if differing:
            told = f"it is of a run that differs in {', '.join(differing)}"
            raise FfnkitError(f"resuming distillation from '{path}'", told, "Name another folder or remove the file")
        losses = tensors.pop("losses").tolist()
        named = [name for name in tensors if name.startswith("part/")]
        parts = {name.removeprefix("part/"): tensors.pop(name).tolist() for name in named}
        return cls(folder, run, losses, seconds, tensors, parts)

    def restore(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the saved weights and moments in place; nothing for a fresh state."""
        if not self.tensors:
            return
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(self.tensors[f"weight/{name}"])
            if f"step/{name}" in self.tensors:
                saved = {key: self.tensors[f"{key}/{name}"] for key in _ADAM}
                # Adam counts its steps in float32 on the CPU, whatever the parameter is.
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter) for k, v in saved.items()}
        self.tensors = {}

    def save(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write the state in one step: a kill leaves the old file or the new one."""
        if self.folder is None:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state.get(parameter, {}).items():  # empty without a gradient so far
                tensors[f"{key}/{name}"] = value.cpu().contiguous()
        tensors |= {f"part/{name}": torch.tensor(each, dtype=torch.float64) for name, each in self.parts.items()}
        with replacing(self.folder / FILE) as new:
            save_file(tensors, new, metadata={"run": json.dumps(self.run), "seconds": repr(self.seconds)})
