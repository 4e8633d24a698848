"""What the report says first, how it shows it in a terminal and on a page, and that what it says is so."""

from __future__ import annotations

import io
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_report import FULL, info, row, rows

from ffnkit.report.columns import cells
from ffnkit.report.conclusions import conclusions
from ffnkit.report.curves import mean, thinned
from ffnkit.report.formats import to_markdown, to_rich
from ffnkit.report.page import page
from ffnkit.report.plot import trade_offs
from ffnkit.report.table import Summary, paired, summarize

LONG_NAMES = ("a-rather-long-name-of-an-arm-that-was-compressed", "half", "quarter-of-the-last-four-layers")


def summary(table: list[dict[str, Any]], metric: str = "accuracy") -> Summary:
    return summarize(table, metric)


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1.0), ("perplexity", -1.0)])
def test_the_best_arm_and_what_is_beyond_chance(metric: str, sign: float) -> None:
    """Which way is better is the metric's own; an interval that holds 0 is chance, one seed tells nothing."""
    values = {"base": [1.0, 1.1, 1.2], "best": [2.0, 2.1, 2.21], "near": [1.9, 2.15, 2.16], "once": [2.05]}
    table = [
        {"arm": name, "seed": seed, "metrics": {metric: 5 + sign * value}}
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]
    first, *rest = conclusions(summary(table, metric))
    assert first.startswith(f"Best by {metric}") and " best, " in first and "3 seeds" in first
    text = "\n".join(rest)
    assert re.search(r"^Beyond chance it is better than: base \(", text, re.M)
    assert re.search(r"^Not beyond chance is its lead over: near \(", text, re.M)
    assert re.search(r"^Too few seeds, or too alike, to tell it from: once \(", text, re.M)
    assert re.search(r"^Different from base beyond chance: near \([^)]*, better\)", text, re.M)


def test_fewer_seeds_do_not_make_the_best_arm() -> None:
    lines = conclusions(summary(rows(("base", [0.8, 0.81]), ("lucky", [0.9]))))
    assert lines[0].startswith("Best by accuracy: base, ")
    assert lines[1] == "Ahead of it with fewer seeds, which may be chance: lucky, 0.9000 (one seed)."


def test_arms_that_are_level_are_named() -> None:
    assert conclusions(summary(rows(("a", [0.5, 0.5]), ("b", [0.5, 0.5]))))[0].endswith(
        "(mean of 2 seeds), level with b."
    )


def test_seeds_that_cancel_are_level() -> None:
    """0.1 + 0.2 is not 0.3, and neither is better."""
    table = rows(("base", [0.1, 0.2, 0.5]), ("other", [0.5, 0.2, 0.1]), ("best", [0.6, 0.6, 0.61]))
    assert "other (+0.0000 [-0.9937, +0.9937], level)" in "\n".join(conclusions(summary(table)))
    table = rows(("a", [0.1, 0.2, 0.3]), ("b", [0.3, 0.2, 0.1]))
    assert ", level with " in conclusions(summary(table))[0]


def test_equal_seeds_are_no_proof() -> None:
    """Differences that are the same for all seeds have an interval of no width, which says nothing."""
    assert (delta := paired({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25})) is not None and delta.beyond_chance is None
    assert conclusions(summarize([], "accuracy", arms=["a"])) == ["No arm has a value of accuracy yet."]


def test_what_costs_least_among_equals() -> None:
    """Of arms that are not told apart from the best, never of one that is worse."""
    seconds = {"full": 0.5, "lora": 0.25, "bad": 0.01}
    values = {"full": [0.80, 0.82, 0.81], "lora": [0.81, 0.80, 0.81], "bad": [0.5, 0.5, 0.51]}
    table = [
        row(name, seed, value, parameters=10, steps_per_second=1 / seconds[name])
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]
    (told,) = [line for line in conclusions(summary(table)) if "fastest" in line]
    assert "lora has the fastest step (250.0 ms, 50% of the most)" in told


def test_one_unit_in_a_column() -> None:
    sizes = {"bytes_on_disk_compact": (90_900_000, 1_300_000_000, 400_000_000), "parameters": (309_890, 22_713_986, 0)}
    table = [row(f"a{n}", 0, 0.5, **{key: each[n] for key, each in sizes.items()}) for n in range(3)]
    table = [{**each, "seconds": {"tune": 30.0 * 30**n}} for n, each in enumerate(table)]
    header, lines = cells(summary(table))
    shown = {head: [line[n] for line in lines] for n, head in enumerate(header)}
    assert shown["on disk compact"] == ["90.90 MB", "1,300 MB", "400.0 MB"]
    assert shown["parameters"] == ["0.31 M", "22.71 M", "0.00 M"]
    assert {cell.split()[1] for cell in shown["time"]} == {"min"}


def test_a_difference_names_its_metric_and_settings_are_told() -> None:
    table = [
        row("lora", 0, 0.8, settings={"method": "none", "tuner": {"name": "lora", "rank": 7}}, rows={"report": 872}),
        row("dsee", 0, 0.7, tuner={"name": "dsee", "rank": 8, "density": 0.01, "count": None}),
        row("half", 0, 0.7, settings={"method": "fusion", "width": 0.5}),
    ]
    header, lines = cells(summary(table))
    lora, dsee, half = (dict(zip(header, line, strict=True)) for line in lines)
    assert "accuracy difference [95%]" in header and lora["rows"] == "872"
    assert [(each["rank"], each["share"]) for each in (lora, dsee, half)] == [("7", "–"), ("8", "0.01"), ("–", "–")]
    assert (half["width"], dsee["width"]) == ("0.5", "–")


def test_models_of_one_form_have_no_speed_to_compare() -> None:
    """Two tuners of one model; where the model is another, the note stands."""
    for other, said in ((22_713_216, False), (19_000_000, True)):
        table = [row("full", 0, 0.8, parameters=22_713_216, latency_s=0.1, latency_ratio=1.0)]
        table += [row("lora", 0, 0.8, parameters=other, latency_s=0.11, latency_ratio=1.1)]
        assert ("slower" in "\n".join(summary(table).notes)) is said


@pytest.mark.parametrize("width", [38, 80, 120])
def test_the_terminal_table_breaks_no_word(width: int) -> None:
    from rich.console import Console

    table = [row(name, seed, 0.8 + seed / 9, **FULL) for name in LONG_NAMES for seed in range(2)]
    table = [{**each, "metrics": {**each["metrics"], "mean_absolute_error (test_unseen)": 1.5}} for each in table]
    found = summary(table)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    header, lines = cells(found)
    words = {word for line in (header, *lines) for cell in line for word in cell.split() if len(word) <= width // 2}
    assert words <= set(text.split()), sorted(words - set(text.split()))


def test_conclusions_come_first() -> None:
    text = to_markdown(summary(rows(("base", [0.8, 0.9]), ("new", [0.7, 0.8]))))
    assert text.startswith("- Best by accuracy: base")


def test_curves() -> None:
    assert thinned([(n, n) for n in range(1000)], 5) == [[0, 0], [250, 250], [500, 500], [749, 749], [999, 999]]
    table = [row("a", seed, 0.8, curve={"loss": [[1, 2.0 + seed], [2, 1.0]] + [[3, 0.5]] * seed}) for seed in (0, 1)]
    assert mean(summary(table).arms[0], "loss") == [(1, 2.5), (2, 1.0)]


# ------------------------------------------------------------------------------------------------ the page
@cache
def whole() -> str:
    """A page with everything on it."""
    table = rows(("base", [0.80, 0.82]), ("new", [0.70, 0.72]), **FULL)
    for n, each in enumerate(table):
        each |= {"parameters": 10**6 * (1 + n // 2), "rows": {"report": 872}}
        each |= {"curve": {"loss": [[1, 1.0], [2, 0.5]], "metric": [[1, 0.5], [2, 0.7]]}}
        folder = f"units/{each['arm']}/seed {each['seed']}"
        each |= {"checkpoints": {"compact": f"{folder}/compact"}, "predictions": {"report": f"{folder}/p#1.jsonl"}}
    more = {
        "command": "ffnkit run x/recipe.yaml --out x",
        "recipe": "name: <x>\n",
        "links": {"results.json": "results.json"},
    }
    return page(
        info(rows=table, arms={"base": {}, "new": {"tuner": {"name": "lora", "rank": 8}}}, seeds=[0, 1], **more)
    )


class Seen(HTMLParser):
    """Tags with their attributes, and the text in SVG."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.drawn: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("text", "tspan") and data.strip():
            self.drawn.append(data.strip())


def test_the_page_says_first_what_to_conclude() -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", whole())
    assert heads[:4] == ["What to conclude", "Results", "accuracy against what it costs", "Loss curves"]


def test_the_page_can_be_used_by_anybody() -> None:
    """What axe-core asks for, as far as it can be told without a browser (which tools/page_check.js has)."""
    seen = Seen(whole())
    names = Counter(tag for tag, _ in seen.tags)
    assert names["main"] == names["h1"] == 1 and not names["script"]
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', whole())) <= set(ids)
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for tag, attrs in seen.tags if tag == "svg")
    regions = [attrs for tag, attrs in seen.tags if tag == "div" and attrs.get("class") == "scroll"]
    assert regions and all(each["tabindex"] == "0" and each["role"] == "region" for each in regions)
    assert len({each["aria-label"] for each in regions}) == len(regions)
    labels = {attrs["for"] for tag, attrs in seen.tags if tag == "label"}
    assert labels == {attrs["id"] for tag, attrs in seen.tags if tag == "input"}


def test_each_cost_has_a_plot_that_a_control_chooses() -> None:
    seen = Seen(whole())
    inputs = [attrs for tag, attrs in seen.tags if tag == "input"]
    keys = [str(each["id"]).removeprefix("axis-") for each in inputs]
    assert {"parameters", "flops_per_token", "latency_s", "bytes_on_disk_compact"} <= set(keys)
    assert ["checked" in each for each in inputs] == [True] + [False] * (len(inputs) - 1)
    figures = [attrs.get("class") for tag, attrs in seen.tags if tag == "figure"]
    assert figures == [f"axis-{key}" for key in keys] + [None]
    assert all(f"#axis-{key}:checked) figure:not(.axis-{key})" in whole() for key in keys)


def test_text_in_plots_is_text() -> None:
    assert {"accuracy", "parameters (millions)", "latency of a batch (ms)", "training loss"} <= set(Seen(whole()).drawn)


def test_files_command_and_recipe_are_there() -> None:
    links = [attrs["href"] for tag, attrs in Seen(whole()).tags if tag == "a"]
    assert "units/new/seed%201/compact" in links and "units/base/seed%200/p%231.jsonl" in links
    assert len(links) == 4 * 2 + 1 and "ffnkit run x/recipe.yaml --out x" in whole() and "name: &lt;x&gt;" in whole()
    assert "tuner name lora, rank 8" in whole()


def test_equal_sizes_stay_on_one_spot() -> None:
    """Seeds and means are drawn where their figure is, as is told."""
    from ffnkit.report.plot import drawn

    found = summary([*rows(("a", [0.8, 0.9]), ("b", [0.7, 0.8]), parameters=5e6), row("c", 0, 0.5, parameters=9e6)])
    axes = drawn(found).axes[0]
    seeds = [each for each in axes.collections if len(each.get_offsets()) == 2]
    assert {float(x) for each in seeds for x, _ in each.get_offsets()} == {5.0}
    assert len(seeds) == 2 and all(each.get_offset_transform() == axes.transData for each in seeds)
    assert list(trade_offs(found)) == ["parameters"] and "side by side" not in whole()


def test_pages_over_runs_link_to_them(tmp_path: Path) -> None:
    import json

    from ffnkit.report.across import across
    from ffnkit.report.pages import write

    for task in ("sst2", "rte"):
        (tmp_path / task).mkdir()
        one = {"arm": "a", "seed": 0, "status": "done", "metrics": {"accuracy": 0.8}, "checkpoints": {"compact": "u/c"}}
        one |= {"settings": {"method": "fusion", "width": 0.5}, "tuner": {"name": "lora", "rank": 3}}
        content = {"rows": [one], "metric": "accuracy", "recipe": {"task": task, "model": "m", "arms": {"a": {}}}}
        (tmp_path / task / "results.json").write_text(json.dumps(content))
    write(tmp_path / "all", across([tmp_path / "sst2", tmp_path / "rte" / "results.json"]))
    text = (tmp_path / "all" / "report.html").read_text()
    for told in (
        "../sst2/u/c",
        "../rte/u/c",
        "../rte/report.html",
        "method fusion, width 0.5",
        "rank 3",
        "ffnkit report",
    ):
        assert told in text, told
