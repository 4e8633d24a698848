"""Model cards cite what was used, and CITATION.cff names the same papers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ffnkit.methods import METHODS
from ffnkit.report import citations
from ffnkit.report.card import CardInfo, model_card
from ffnkit.tune import TUNERS

CFF = Path(__file__).resolve().parents[1] / "CITATION.cff"
TITLE = re.compile(r"title\s*=\s*\{(.*?)\},?\n")


def title(entry: str) -> str:
    found = TITLE.search(entry)
    assert found, entry
    return found[1].replace("{", "").replace("}", "")


def section(method: str | None) -> str:
    return model_card(CardInfo("bert-base-uncased", method=method)).split("## Citation")[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_a_card_cites_what_the_method_builds_on(method: type) -> None:
    name, paper = method.name, method.paper  # type: ignore[attr-defined]
    text = section(name)
    for entry in citations.OF_METHOD[name]:
        assert entry in text
    assert paper.removeprefix("arXiv ") in text
    assert ("has no paper of its own" in text) is not bool(paper)
    assert citations.FFNKIT in text
    assert "@inproceedings" not in section(None)  # the control: an untouched model cites ffnkit alone


def test_every_tuner_says_what_it_builds_on() -> None:
    assert set(citations.OF_TUNER) == {tuner.name for tuner in TUNERS}
    for tuner in TUNERS:
        entries = " ".join(citations.OF_TUNER[tuner.name])
        sources = re.findall(r"arXiv (\d{4}\.\d{5})", (tuner.__doc__ or "").partition("Source:")[2])
        assert bool(sources) is bool(entries), tuner.name
        assert [paper for paper in sources if paper not in entries] == [], tuner.name


def test_the_citation_file_names_every_paper() -> None:
    cff = yaml.safe_load(CFF.read_text(encoding="utf-8"))
    named = {each["title"].lower() for each in cff["references"]}
    every = (*citations.OF_METHOD.values(), *citations.OF_TUNER.values())
    papers = {entry for entries in every for entry in entries}
    assert len(papers) > 8
    for entry in papers:
        assert title(entry).lower() in named
    assert cff["title"].startswith(title(citations.FFNKIT).split(":")[0])
    for each in cff["references"]:
        assert each["authors"] and each["year"]
