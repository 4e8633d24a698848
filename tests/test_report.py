"""Measurements, tables, the report page and model cards."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.report import environment, measure
from ffnkit.report.card import CardInfo, LayerWidth, Metric, layer_widths, model_card
from ffnkit.report.columns import COLUMNS, all_notes, cells
from ffnkit.report.formats import to_csv, to_markdown, to_rich
from ffnkit.report.page import PageInfo, page, write_page
from ffnkit.report.table import Stat, summarize


def row(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "metrics": {"accuracy": accuracy}, **more}


def rows(*accuracies: tuple[str, list[float]], **more: Any) -> list[dict[str, Any]]:
    return [row(arm, seed, value, **more) for arm, values in accuracies for seed, value in enumerate(values)]


# ------------------------------------------------------------------------------------------------- measure
def test_parameters_count_shared_ones_once_and_frozen_ones_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert measure.parameters(model) == 16 + 20 + 20
    model[2].weight = model[1].weight
    assert measure.parameters(model) == 16 + 20 + 4
    model[0].requires_grad_(False)
    assert measure.trainable(model) == 20 + 4


def test_figures_of_a_model_count_its_ffns() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    found = measure.figures(BertModel(config).requires_grad_(False))
    assert found["ffn_parameters"] == 2 * (8 * 12 + 12 + 12 * 8 + 8)
    assert found["parameters"] > found["ffn_parameters"] and found["trainable_parameters"] == 0
    assert found["flops_per_token"] > found["ffn_flops_per_token"] == 2 * 2 * (2 * 8 * 12)
    assert measure.ffn_parameters(BertModel(config)) == found["ffn_parameters"]


def test_bytes_on_disk_tell_weights_from_the_rest(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "training_args.bin").write_bytes(b"x" * 7)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "optimizer.pt").write_bytes(b"x" * 1000)
    assert measure.bytes_on_disk(tmp_path) == measure.DiskBytes(weights=150, total=1157)
    with pytest.raises(FfnkitError, match="no such folder"):
        measure.bytes_on_disk(tmp_path / "missing")


def test_latencies_take_turns_and_leave_modes_and_threads_alone() -> None:
    calls: list[str] = []
    modes: list[tuple[bool, bool]] = []

    class Slow(nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds, self.inner = name, seconds, nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            modes.append((self.inner.training, torch.is_inference_mode_enabled()))
            time.sleep(self.seconds)
            return x

    fast, slow = Slow("fast", 0.002).train(), Slow("slow", 0.02).train()
    slow.inner.eval()
    threads = torch.get_num_threads()
    found = measure.latencies({"fast": fast, "slow": slow}, {"x": torch.ones(1)}, repeats=4, warmup=1, threads=2)
    assert calls == ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert set(modes) == {(False, True)}
    assert fast.training and fast.inner.training and slow.training and not slow.inner.training
    assert torch.get_num_threads() == threads
    assert found.ratios["fast"] == measure.Spread(1.0, 1.0, 1.0, 4)
    assert found.ratios["slow"].median > 1.5 and found.seconds["slow"].median >= 0.02
    assert found.seconds["slow"].lower <= found.seconds["slow"].median <= found.seconds["slow"].upper


def test_latency_of_a_callable_and_of_nothing() -> None:
    assert measure.latency(lambda: time.sleep(0.003), repeats=3, warmup=0).median >= 0.003
    with pytest.raises(FfnkitError, match="at least one model"):
        measure.latencies({})
    with pytest.raises(FfnkitError, match="repeat"):
        measure.latency(lambda: None, repeats=0)


def test_modes_come_back_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self) -> None:
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        measure.latency(model, {})
    assert model.training


def test_peak_memory_sees_what_the_block_allocates_and_not_what_came_before() -> None:
    size = 64 << 20

    def touch() -> None:
        torch.ones(size, dtype=torch.uint8)

    touch()
    with measure.peak_memory() as nothing:
        pass
    with measure.peak_memory() as peak:
        touch()
    assert peak.peak_bytes >= peak.before_bytes > 0 and peak.device_peak_bytes is None
    if peak.exact:
        assert 0.9 * size < peak.increase_bytes < 2 * size
        assert nothing.increase_bytes < 0.5 * size


@pytest.mark.gpu
def test_peak_memory_of_a_cuda_device() -> None:
    with measure.peak_memory("cuda") as peak:
        torch.ones(1 << 20, device="cuda")
    assert peak.device_peak_bytes is not None and peak.device_before_bytes is not None
    assert peak.device_peak_bytes - peak.device_before_bytes >= 4 << 20


def test_environment_names_no_host_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    import socket

    host = platform.uname()._replace(node="a-host-of-mine")
    monkeypatch.setattr(platform, "uname", lambda: host)
    monkeypatch.setattr(socket, "gethostname", lambda: host.node)
    assert platform.node() == host.node
    versions, machine = environment.versions(), environment.machine()
    assert {"python", "ffnkit", "torch", "transformers", "scikit-learn"} <= set(versions)
    plain = torch.__version__.partition("+")[0]  # builds for CUDA add which one to their own name alone
    assert versions["torch"] in (torch.__version__, plain)
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 1 << 28
    text = repr(machine)
    assert str(Path.home()) not in text and host.node not in text


# --------------------------------------------------------------------------------------------------- table
def test_mean_and_standard_deviation_by_hand() -> None:
    assert Stat.of([1.0, 2.0, 4.0]) == Stat(7 / 3, pytest.approx(math.sqrt(7 / 3)), 3)
    assert Stat.of([3.0]) == Stat(3.0, None, 1)


def test_difference_is_paired_by_seed_with_a_t_interval() -> None:
    # the seeds of the second arm come in another order: pairing by place would give another spread
    table = [row("base", 0, 0.80), row("base", 1, 0.90), row("base", 2, 0.70)]
    table += [row("new", 2, 0.69), row("new", 0, 0.78), row("new", 1, 0.87), row("new", 3, 0.10)]
    delta = summarize(table, "accuracy").arms[1].difference
    assert delta is not None and delta.n == 3
    assert delta.mean == pytest.approx(-0.02)
    half = 4.302653 * 0.01 / math.sqrt(3)  # t(0.975, 2), std of (-0.02, -0.03, -0.01)
    assert (delta.low, delta.high) == (pytest.approx(-0.02 - half, abs=1e-7), pytest.approx(-0.02 + half, abs=1e-7))


def test_one_seed_has_no_interval_and_says_so() -> None:
    summary = summarize(rows(("base", [0.8]), ("new", [0.7])), "accuracy")
    delta = summary.arms[1].difference
    assert delta is not None and delta.low is None and delta.high is None
    text = to_markdown(summary)
    assert "-0.1000 (n = 1, no interval)" in text and "One seed" in text and "Fewer than 3 seeds" in text
    assert "±" not in text


def test_three_seeds_need_no_warning() -> None:
    text = to_markdown(summarize(rows(("base", [0.8, 0.81, 0.82]), ("new", [0.7, 0.71, 0.72])), "accuracy"))
    assert "Fewer than" not in text and "One seed" not in text and "±" in text


def test_what_was_not_run_says_so() -> None:
    table = [*rows(("base", [0.8, 0.9])), {"arm": "bad", "seed": 0, "error": "out of memory"}, row("half", 0, 0.5)]
    summary = summarize(table, "accuracy", arms=["base", "bad", "half", "later"], seeds=[0, 1])
    assert [arm.run for arm in summary.arms] == [True, False, True, False]
    header, lines = cells(summary)
    assert lines[3] == ["later", "0"] + ["not run"] * (len(header) - 2)
    text = "\n".join(summary.notes)
    assert "Not run: bad, later." in text and "bad, seed 0: failed (out of memory)." in text
    assert "Not run for seed 1: half." in text and "base" not in text.partition("Differences")[0]


def test_unmeasured_values_are_named_and_never_numbers() -> None:
    table = [row("base", 0, 0.8, parameters=2_000_000), row("new", 0, float("nan"), parameters=None)]
    summary = summarize(table, "accuracy")
    header, lines = cells(summary)
    assert lines[1][header.index("accuracy")] == "not measured"
    assert lines[1][header.index("parameters")] == "not measured"
    assert "latency (ratio)" not in header and "nan" not in to_markdown(summary)
    assert "Not measured: in FFNs, trained" in to_markdown(summary)
    (told,) = [note for note in all_notes(summary) if note.startswith("Not measured")]
    names = told.removeprefix("Not measured: ").removesuffix(".").split(", ")
    assert {"on disk compact", "on disk standard"} <= set(names)
    assert set(names) <= {head for head, _ in COLUMNS.values()}, "a name with a comma reads as two"


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.985, "brings no speed"), (0.80, None), (1.20, "is slower: 1.20"), (1.0, "brings no speed")]
)
def test_notes_say_when_there_is_no_speed(ratio: float, said: str | None) -> None:
    table = [row("base", 0, 0.8, latency_s=0.1), row("new", 0, 0.8, latency_s=0.1 * ratio, latency_ratio=ratio)]
    text = "\n".join(summarize(table, "accuracy").notes)
    assert (said in text) if said else ("speed" not in text and "slower" not in text)
    assert "separate runs" not in text


def test_a_ratio_within_its_own_noise_is_no_speed() -> None:
    table = [row("base", seed, 0.8) for seed in (0, 1)]
    table += [row("new", 0, 0.8, latency_ratio=0.75), row("new", 1, 0.8, latency_ratio=1.1)]
    assert any("brings no speed" in note for note in summarize(table, "accuracy").notes)


@pytest.mark.parametrize(("quartiles", "quiet"), [([0.75, 1.02], False), ([0.75, 0.85], True)])
def test_a_ratio_whose_quartiles_hold_one_is_no_speed(quartiles: list[float], quiet: bool) -> None:
    table = [row("base", 0, 0.8), row("new", 0, 0.8, latency_ratio=0.8, latency_ratio_quartiles=quartiles)]
    notes = [note for note in summarize(table, "accuracy").notes if "brings no speed" in note]
    assert notes == (
        [] if quiet else ["new brings no speed: its latency is 0.80 of that of base (noise: 0.75 to 1.02)."]
    )


def test_latencies_of_separate_runs_are_compared_with_a_warning() -> None:
    table = [row("base", 0, 0.8, latency_s=0.2), row("new", 0, 0.8, latency_s=0.1)]
    summary = summarize(table, "accuracy")
    assert summary.arms[1].latency_ratio == Stat(0.5, None, 1)
    assert any("separate runs" in note for note in summary.notes)


def test_bad_rows() -> None:
    with pytest.raises(FfnkitError, match="two rows of arm 'a' and seed 0"):
        summarize([row("a", 0, 0.1), row("a", 0, 0.2)], "accuracy")
    with pytest.raises(FfnkitError, match="without arm or seed"):
        summarize([{"arm": "a"}], "accuracy")
    with pytest.raises(FfnkitError, match="no arm"):
        summarize([], "accuracy")


FULL = {
    "parameters": 22_713_216,
    "ffn_parameters": 7_089_408,
    "trainable_parameters": 22_713_216,
    "flops_per_token": 45_000_000,
    "bytes_on_disk_compact": 90_900_000,
    "bytes_on_disk_standard": 1_300_000_000,
    "latency_s": 0.1234,
    "peak_memory_bytes": 800_000_000,
    "seconds": {"tune": 900.0, "evaluate": 10.0},
}


def test_units_for_people_and_numbers_for_programs() -> None:
    summary = summarize(rows(("base | a", [0.8, 0.9]), **FULL), "accuracy")
    text = to_markdown(summary)
    for expected in ("22.71 M", "7.09 M", "45.00 M", "90.90 MB", "1.30 GB", "123.4 ms", "15.2 min", r"base \| a"):
        assert expected in text
    (line,) = csv.DictReader(io.StringIO(to_csv(summary)))
    assert line["arm"] == "base | a" and float(line["parameters"]) == 22_713_216 and float(line["seconds_tune"]) == 900
    assert float(line["accuracy"]) == pytest.approx(0.85) and line["difference"] == ""


def test_rich_table_fits_a_terminal_and_takes_markup_as_text() -> None:
    from rich.console import Console

    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(to_rich(summarize(rows(("[bold]x", [0.8, 0.9]), ("y", [0.7, 0.8]), **FULL), "accuracy"), "SST-2"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]x" in text and "SST-2" in text and "22.71 M" in text and "Fewer than 3 seeds" in text


# ---------------------------------------------------------------------------------------------------- page
class Check(HTMLParser):
    """Every tag is closed, and nothing is fetched from outside."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "use", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def info(**more: Any) -> PageInfo:
    table = rows(("base", [0.80, 0.82, 0.84]), ("a <b> $x$ & co", [0.70, 0.72, 0.74]), **FULL)
    arms = {"base": {}, "a <b> $x$ & co": {"method": "fusion", "width": 0.5}, "later": {"method": "fusion"}}
    values: dict[str, Any] = {
        "title": "A <title>",
        "model": "some/model",
        "task": "sst2",
        "metric": "accuracy",
        "split_policy": "dev is a part of train",
        "rows": table,
        "arms": arms,
        "settings": {"steps": 150},
        "seeds": [0, 1, 2],
        "versions": {"torch": "2.13"},
        "machine": {"cpu": "a cpu", "memory_bytes": 8_000_000_000},
        "notes": ["a note"],
    }
    return PageInfo(**{**values, **more})


def test_page_is_whole_and_stands_alone() -> None:
    text = page(info())
    check = Check()
    check.feed(text)
    assert check.open == [] and check.outside == []
    assert not re.search(r"(?<!-)url\((?!#)|@import|<script", text)
    assert "A &lt;title&gt;" in text and "a &lt;b&gt; $x$ &amp; co" in text and "<b>" not in text
    for expected in ("dev is a part of train", "method fusion, width 0.5", "8.0 GB", "not run", "a note", "2.13"):
        assert expected in text
    assert text.count("<svg") > 1 and "currentColor" in text and "prefers-color-scheme: dark" in text
    assert page(info()) == text, "the same figures give the same page"


def test_the_plot_is_against_flops_where_ffns_do_not_tell_arms_apart() -> None:
    whole = rows(("base", [0.8, 0.9]), **FULL)
    fewer = rows(("heads", [0.7, 0.8]), **{**FULL, "flops_per_token": FULL["flops_per_token"] / 2})
    arms = {"base": {}, "heads": {}}
    assert "accuracy against FLOPs a token" in page(info(rows=whole + fewer, arms=arms))
    alike = rows(("heads", [0.7, 0.8]), **FULL)
    assert "<h2>accuracy</h2>" in page(info(rows=whole + alike, arms=arms))  # each arm has a place of its own


def test_page_without_figures_has_no_plot() -> None:
    text = page(info(rows=[]))
    assert "<svg" not in text and "not run" in text and "Time by stage" not in text


def test_write_page(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", info())
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# ---------------------------------------------------------------------------------------------------- card
CARD = CardInfo(
    base_model="sentence-transformers/all-MiniLM-L6-v2",
    form="compact",
    method="fusion",
    settings={"width": 0.25, "layers": "last:4"},
    layers=[LayerWidth(f"encoder.layer.{i}", 1536, 1536 if i < 2 else 384) for i in range(6)],
    metrics=[Metric("accuracy", 0.8423, "nyu-mll/glue", config="sst2", std=0.004, seeds=2, baseline=0.861)],
    training={"tuner": "full", "learning_rate": 1e-4},
    versions={"torch": "2.13"},
    notes=["Tuned for 150 steps only."],
    auto_class="AutoModelForSequenceClassification",
    license="apache-2.0",
)


def test_card_parses_and_holds_the_measured_figures() -> None:
    card = ModelCard(model_card(CARD))
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert {"ffnkit", "fusion"} <= set(card.data.tags)
    assert card.data.datasets == ["nyu-mll/glue"] and card.data.metrics == ["accuracy"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_config) == ("accuracy", 0.8423, "sst2")
    for expected in ("0.8423 ± 0.0040", "0.8610", "`encoder.layer.2` to `encoder.layer.5` (4) | 1536 | 384"):
        assert expected in card.text
    for expected in ("2307.08941", "wei2023mlpfusion", "ai2025mlpfusion", "Tuned for 150 steps only.", "width: 0.25"):
        assert expected in card.text


def test_card_says_how_each_form_opens() -> None:
    compact, standard = model_card(CARD), model_card(dataclasses.replace(CARD, form="standard"))
    assert "import ffnkit" in compact and "import ffnkit" not in standard
    assert "AutoModelForSequenceClassification.from_pretrained" in compact and "ffnkit is not needed" in standard
    with pytest.raises(FfnkitError, match="no such form"):
        model_card(dataclasses.replace(CARD, form="zip"))  # type: ignore[arg-type]


def test_card_never_invents_figures() -> None:
    bare = model_card(CardInfo(base_model="some/model"))
    card = ModelCard(bare)
    assert card.data.eval_results is None and card.data.metrics is None and card.data.datasets is None
    assert "Scores on a task: not measured." in bare and "Size, speed and memory: not measured." in bare
    assert "Not tuned, or not recorded." in bare and "licence is not stated" in bare and "wei2023" not in bare
    lost = model_card(dataclasses.replace(CARD, metrics=[Metric("accuracy", float("nan"), "glue")]))
    assert ModelCard(lost).data.eval_results is None and "Not finite, and so left out: accuracy." in lost


def test_card_keeps_folders_of_the_maker_out(tmp_path: Path) -> None:
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    text = model_card(dataclasses.replace(CARD, base_model=str(folder), metrics=[Metric("f1", 0.5, "my data.csv")]))
    card = ModelCard(text)
    assert "private" not in text and "my-model" in text and card.data.base_model is None
    assert card.data.datasets is None and "my data.csv" in text


def test_layer_widths_from_rows() -> None:
    before = [{"name": "a", "width": 8}, {"name": "b", "width": 8}]
    assert layer_widths(before, [{"name": "a", "width": 2}]) == (LayerWidth("a", 8, 2), LayerWidth("b", 8, None))
