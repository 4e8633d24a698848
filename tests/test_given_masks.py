"""Unstructured pruning by the masks of a file: as the weight lies in the state dict, for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "phi3"])
def test_weights_that_stay_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    own = {f"{f.name}.{f.path(s)}" for f in ffns(model) for s in f.sites}
    names = [key for key in plain if key.removesuffix(".weight") in own]
    draw = torch.Generator().manual_seed(0)
    masks = {key: (torch.rand(plain[key].shape, generator=draw) < 0.5).to(torch.uint8) for key in names}
    save_file(masks, tmp_path / "masks.safetensors")
    method = methods.build("unstructured", masks=tmp_path / "masks.safetensors")
    plan = fk.plan(model, method)
    plan.save(tmp_path / "plan")
    fk.fold(fk.apply(model, fk.Plan.load(tmp_path / "plan")), masked=True)
    after = model.state_dict()
    for key in names:
        assert torch.equal(after[key], plain[key] * masks[key]), key
    wrong = {key: mask if key != names[-1] else mask[..., :-1].contiguous() for key, mask in masks.items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(FfnkitError, match=f"{names[-1]} is"):
        fk.plan(FAMILIES[name].model(), methods.build("unstructured", masks=tmp_path / "wrong.safetensors"))
    save_file({key: mask for key, mask in masks.items() if key != names[0]}, tmp_path / "few.safetensors")
    with pytest.raises(FfnkitError, match="it has no mask for"):
        fk.plan(FAMILIES[name].model(), methods.build("unstructured", masks=tmp_path / "few.safetensors"))


def test_one_of_the_two() -> None:
    model = FAMILIES["bert"].model()
    for given in ({}, {"width": 0.5, "masks": "masks.safetensors"}):
        with pytest.raises(FfnkitError, match=r"Give width=0.5, or masks=FILE"):
            fk.plan(model, methods.build("unstructured", **given))
    with pytest.raises(FfnkitError, match="masks nowhere"):
        fk.plan(model, methods.build("unstructured", masks="nowhere"))
