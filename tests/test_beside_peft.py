"""Adapters of peft on compressed models: they train, merge and open again, or one line says what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tolerance import assert_close

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.model.finding import ffns
from ffnkit.nn.lowrank import LowRank
from ffnkit.surgery import beside_peft

METHODS: dict[str, Any] = {
    "scaled": fk.Fusion(width=8, restarts=1),
    "lowrank": methods.get("svd")(width=0.5),
    "masked": methods.get("unstructured")(width=0.5),
    "tied": fk.Merging(groups=[["0", "1"]]),
    "ragged": methods.get("magnitude")(width=8, layers="last:1"),
}
DOWN = {"llama": "down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense"}
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}


def edited(family: str, kind: str) -> Any:
    model = FAMILIES[family].model()
    fk.apply(model, fk.plan(model, METHODS[kind]))
    return model.eval()


def adapted(model: Any, targets: Any = "all-linear") -> Any:
    columns = model.config.model_type == "gpt2"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=columns)
    return get_peft_model(model, config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits.clone()


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["scaled", "masked", "lowrank", "updates"])
def test_a_linear_of_ours_is_refused_by_name(family: str, kind: str) -> None:
    model = edited(family, "ragged" if kind == "updates" else kind)
    if kind == "updates":
        fk.apply(model, fk.plan(model, fk.DSEE(rank=1, targets="ffn")))
    before = logits(model)
    for targets in ["all-linear", [DOWN[family]], f".*{DOWN[family]}"]:
        if kind == "lowrank" and targets == "all-linear":
            continue  # the two thin ones are linears
        with pytest.raises(fk.FfnkitError, match=r"is no plain linear.*ffnkit.fold\(model\)") as caught:
            adapted(model, targets)
        assert ("tune --tuner lora" in str(caught.value)) == (kind == "masked")
        assert (".first" in str(caught.value)) == (kind == "lowrank")
    assert torch.equal(logits(model), before)
    if kind != "updates":
        assert adapted(model, ["q_proj" if family == "llama" else "c_attn"]).get_nb_trainable_parameters()[0] > 0


def test_other_adapters_that_choose_for_themselves_are_refused_too() -> None:
    with pytest.raises(fk.FfnkitError, match="is no plain linear"):
        get_peft_model(edited("llama", "scaled"), IA3Config())  # its own choice: k, v and down


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # shared FFNs: one adapter under the first name
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # thin pairs in Conv1D's place are linears
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "scaled"),
        *(
            pytest.param(family, kind, marks=pytest.mark.slow)
            for family in DOWN
            for kind in METHODS
            if (family, kind) not in {("llama", "scaled"), ("bert", "tied")}
        ),
    ],
)
def test_it_trains_merges_and_opens_again(family: str, kind: str, tmp_path: Path) -> None:
    fk.save(edited(family, kind), tmp_path / "small")
    plain = kind not in ("lowrank", "tied", "ragged")
    model = fk.load(tmp_path / "small", fold=plain)
    tuned = adapted(model).train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    tuned(**BATCH).logits.square().sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(fk.load(tmp_path / "small", fold=plain), tmp_path / "adapter")
    assert_close(logits(opened), expected, rel=1e-5, what="the adapter opened again")
    merged = tuned.merge_and_unload()
    assert any(isinstance(m, LowRank) for m in merged.modules()) == (kind == "lowrank")
    fk.save(merged, tmp_path / "merged")
    assert_close(logits(fk.load(tmp_path / "merged")), expected, rel=1e-4, what="the merged model")
    assert [ffn.width for ffn in ffns(merged)] == [ffn.width for ffn in ffns(model)]


def test_linears_that_layers_share_one_by_one_are_refused() -> None:
    with pytest.raises(fk.FfnkitError, match="are one linear.*tune --tuner lora"):
        adapted(edited("opt", "tied"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_they_are_adapted_by_our_tuner_and_in_the_standard_form(family: str, tmp_path: Path) -> None:
    model = edited(family, "tied")
    tuned = tune.get("lora").prepare(edited(family, "tied"), None)
    assert any(p.requires_grad for p in tuned.parameters())
    fk.export(model, tmp_path / "out")
    assert not torch.equal(logits(adapted(fk.load(tmp_path / "out"))), logits(model))


def test_models_that_are_not_ours_go_to_peft_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_peft, "check_linears", None)
    monkeypatch.setattr(beside_peft, "check_ties", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=DeprecationWarning)
        assert adapted(FAMILIES["llama"].model()).get_nb_trainable_parameters()[0] > 0
