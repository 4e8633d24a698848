"""What is said of an export is so: on its card its widths and what opens it, and before it that it saves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import FAMILIES
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, PreTrainedModel

import ffnkit as fk
from ffnkit.checkpoint.export import written_widths
from ffnkit.cli import console, forms
from ffnkit.cli.history import History
from ffnkit.io.architectures import empty_model
from ffnkit.model.finding import ffns


def narrowed(name: str, layers: str) -> tuple[PreTrainedModel, History]:
    """A model and how it came to be, as the command line keeps it."""
    model = FAMILIES[name].model()
    before = fk.inspect(model)
    plan = fk.plan(model, fk.Fusion(width=0.5, restarts=1, layers=layers))
    fk.apply(model, plan)
    return model, History("base").compressed(plan, before, fk.inspect(model))


def table(card: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| `")]
    return [row[1:] for row in rows]


def test_a_padded_file_says_its_own_widths(tmp_path: Path) -> None:
    model, history = narrowed("bert", "last:1")
    fk.export(model, tmp_path / "standard", card=history.card(model, "standard"))
    text = (tmp_path / "standard" / "README.md").read_text()
    width = json.loads((tmp_path / "standard" / "config.json").read_text())["intermediate_size"]
    assert table(text) == [["40", "40", "40"], ["40", "20", "40"]] and width == 40
    assert "in this file" in text and "neurons of zeros" in text
    compact = history.card(model, "compact")
    assert table(compact) == [["40", "40"], ["40", "20"]] and "in this file" not in compact
    even, same = narrowed("bert", "all")
    assert table(same.card(even, "standard")) == [["40", "20"]], "the control: nothing is padded"


def test_shared_ffns_are_written_out_and_silent_ones_left_out(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    before = fk.inspect(model)
    plan = fk.plan(model, fk.Merging(layers="0-1"))
    fk.apply(model, plan)
    history = History("base").compressed(plan, before, fk.inspect(model))
    assert table(history.card(model, "standard"))[1:] == [["24", "shared or dropped", "24"], ["24", "24", "24"]]
    ffn = ffns(model)[-1]
    ffn.write(ffn.read().map(lambda value: value * 0))
    assert list(written_widths(model, "nemotron-nas").values()) == [24, 24, 0]
    assert list(written_widths(model, "nemotron-nas", 256).values()) == [256, 256, 256]


@pytest.mark.parametrize("own", [True, False], ids=["history", "short"])
@pytest.mark.filterwarnings("ignore")
def test_the_card_of_widths_by_layer_opens_it(tmp_path: Path, own: bool) -> None:
    model, history = narrowed("llama", "last:1")
    card = history.card(model, "nemotron-nas", 8) if own else None
    fk.export(model, tmp_path / "nas", target="nemotron-nas", multiple=8, card=card)
    text = (tmp_path / "nas" / "README.md").read_text()
    assert "trust_remote_code=True" in text and "plain" not in text.replace("explain", "")
    if own:
        assert table(text) == [["24", "24", "24"], ["24", "12", "16"]]
        assert "ffnkit-nemotron-nas" in ModelCard(text).data.tags
        code = text.split("```python\n")[1].split("```")[0].replace("path-or-hub-id-of-this-checkpoint", "{}")
        space: dict[str, Any] = {}
        exec(code.format(tmp_path / "nas"), space)
        assert type(space["model"]).__name__ == "DeciLMForCausalLM"
    with pytest.raises(Exception, match="size mismatch|mismatched"):  # the control: what cards said before
        type(model).from_pretrained(tmp_path / "nas")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "nas", trust_remote_code=True)


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        ("---\nlicense: llama3.2\ntags: [a]\n---\n# x\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: own\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n: {bad\n---\n", None),
        ("---\n", None),
        ("# license: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_of_the_source_stays_on_the_card(readme: str | None, wanted: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    history = History.of(str(folder))
    assert history.license == wanted
    model, _ = narrowed("bert", "all")
    card = history.card(model, "standard")
    assert ModelCard(card).data.license == wanted and ("The licence is not stated here" in card) == (wanted is None)
    history.write(folder)
    assert History.of(str(folder)).license == wanted, "from step to step"


# --- what saves nothing, before the work ------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


@pytest.mark.parametrize(("name", "engines"), [("bert", False), ("qwen3", False), ("llama", True)])
def test_engines_are_named_of_what_they_read(name: str, engines: bool, said: list[str]) -> None:
    model, history = narrowed(name, "last:1")
    forms.warn_export(model, history, "standard")
    (line,) = said
    assert line.startswith("saves nothing as a standard checkpoint")
    assert ("--target nemotron-nas" in line) == engines and ("the compact form" in line) != engines


def mpt() -> PreTrainedModel:
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 60, "max_seq_len": 32}
    return transformers.MptForCausalLM(transformers.MptConfig(**sizes)).eval()


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("name", ["bloom", "mpt", "bert"])
def test_widths_that_no_config_names_save_in_no_standard_form(name: str, layers: str, said: list[str]) -> None:
    model = mpt() if name == "mpt" else FAMILIES[name].model()
    method = fk.Fusion(width=0.5, restarts=1, layers=layers)
    told = forms.warn_early(model, method.chosen(model))
    forms.warn_planned(model, fk.plan(model, method))
    if name == "bert":
        assert len(said) == 2 * (layers != "all") and told == (layers != "all")
        assert all("in every form" in line for line in said)
        return
    early, planned = said
    assert told and f"no config of {type(model).__name__} names the width" in early and early.endswith("form saves")
    assert "no width saves there" in planned


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_what_a_compact_source_saves_is_said_of_its_own_widths(layers: str, said: list[str], tmp_path: Path) -> None:
    model, _ = narrowed("llama", "first:1")
    fk.save(model, tmp_path)
    source = empty_model(str(tmp_path))
    method = fk.Fusion(width=0.5, restarts=1, layers=layers)
    assert forms.warn_early(source, method.chosen(source)) == (layers != "all")
    assert [line for line in said if "names the width" in line] == []
