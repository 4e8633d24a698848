"""Figures on the pages, each traced to a stored result: ``python tools/figures.py`` lists those that have no source.

A figure is a number with a decimal point, a percent sign or a unit, outside of code; in tables that are read by row or
column whole numbers of thousands too. A section says where its own come
from, in comments behind its heading:

    <!-- measured: sparsegrad_sst2.json, sparsegrad_mrpc.json -->
    <!-- measured: sparsegrad_sst2.json by row -->
    <!-- given: 0.97 1%: settings -->
    <!-- given: *: all of it are settings -->
    <!-- untraced: no stored result -->

"measured" names files of benchmarks/results: a figure has to be there at the digits that it is shown with, or follow
from what is there: mean, deviation, paired difference with its interval, ratio to the first arm. With "by row" (or "by
column") all figures of a table's row have to come from one record, an arm or a case ("by row 2": from two), of each
file that says so. "given" lists figures that nobody
measured here: settings, sizes, a paper's. "untraced" admits that there is no source; the test knows these sections.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ffnkit.report.table import summarize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
_HIDDEN = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|https?://\S+|\b\d{4}\.\d{5}\b|\b95%", re.DOTALL)
_MARK = re.compile(r"<!--\s*(measured|given|untraced):(.*?)-->", re.DOTALL)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
_FIGURE = re.compile(rf"(?<![\w.,-])({_NUMBER})(%|\s?(?:ms|s|min|kB|MB|GB|MiB|GiB|k|M)\b)?(?![\w.]*\d)")
_UNITS = {
    **{"%": (100.0,), "ms": (1e3, 1.0), "s": (1.0,), "min": (1 / 60,), "k": (1e-3,), "M": (1e-6,)},
    **{"kB": (1e-3,), "MB": (1e-6, 1.0), "GB": (1e-9,), "MiB": (2.0**-20, 1.0), "GiB": (2.0**-30,)},
}


_SMALL = 120  # numbers of a record: one of many holds whatever is looked for
_RATIOS = ("parameters", "ffn_parameters", "flops", "ffn_flops", "latency", "bytes", "peak_memory", "all seconds")


@dataclass(frozen=True)
class Figure:
    """A number as a page shows it: its value, the digits behind the point, the unit; ``text`` is all of it."""

    text: str
    value: float
    digits: int
    unit: str

    @property
    def number(self) -> str:
        """Without its unit; a percent sign stays."""
        return self.text.split()[0]

    def is_shown(self, values: Iterable[float]) -> bool:
        """Whether one of the values looks like this, rounded."""
        room = 0.5 * 10.0**-self.digits * 1.0001
        signed = self.text[0] in "+-"
        return any(
            abs((v if signed else abs(v)) * scale - self.value) <= room + 1e-12
            for v in values
            for scale in _UNITS.get(self.unit, (1.0,))
        )


def figures(text: str, counts: bool = False) -> list[Figure]:
    """The figures of a piece of a page, code and links left out; with ``counts`` whole numbers of thousands too."""
    found = []
    for match in _FIGURE.finditer(_HIDDEN.sub(" ", text)):
        number, unit = match[1], (match[2] or "").strip()
        mantissa, _, exponent = number.replace(",", "").partition("e")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        if "." in number or exponent or unit or (counts and "," in number):
            found.append(Figure(match[0].strip(), float(number.replace(",", "")), digits, unit))
    return found


@dataclass
class Section:
    """What stands below one heading, and what it says of its figures."""

    page: str
    title: str
    text: str = ""
    sources: list[tuple[str, str]] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    untraced: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}: {self.title}"


def sections(page: str, text: str) -> list[Section]:
    """The sections of a page, fences left out."""
    found = [Section(page, "")]
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines(keepends=True):
        if line.startswith("#"):
            found.append(Section(page, line.strip("# \n")))
        found[-1].text += line
    for section in found:
        for kind, words in _MARK.findall(section.text):
            if kind == "measured":
                for one in words.split(","):
                    name, _, how = one.strip().partition(" ")
                    section.sources.append((name, how.strip()))
            elif kind == "given":
                section.given |= set(words.partition(":")[0].split())
            else:
                section.untraced = True
        section.text = re.sub(r"<!--.*?-->", "", section.text, flags=re.DOTALL)
    return found


# --- what a stored result holds


@cache
def records(name: str, folder: Path = RESULTS) -> tuple[frozenset[float], ...]:
    """The numbers of each record of a file, and all of them together as the last."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    rows = content.get("rows") if isinstance(content, dict) else None
    order = ((content.get("recipe") or {}).get("arms") or {}) if rows else {}
    own = [frozenset(v) for v in _arms(rows, order)] if rows and all("arm" in row for row in rows) else []
    if not own and rows and isinstance(rows, list) and all("variant" in row for row in rows):
        own = [frozenset(values) for values in _cases(rows)]
    if not own:
        dicts = list(_dicts(content))
        own = [frozenset(_leaves(each)) for each in [each for each in dicts if "name" in each] or dicts]
        own = [one for one in own if len(one) <= _SMALL]
    return (*own, frozenset().union(*own) | frozenset(_leaves(content)))


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each) if key not in ("machine", "versions", "recipe", "settings") else ()
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
        if value and all(isinstance(each, float) for each in value):
            yield math.fsum(value) / len(value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield float(value)


def _dicts(value: Any, top: bool = True) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if not top:
            yield value
        for key, each in value.items():
            yield from _dicts(each, False) if key not in ("machine", "versions", "recipe", "settings") else ()
    elif isinstance(value, list):
        for each in value:
            yield from _dicts(each, False)


def _arms(rows: list[dict[str, Any]], order: Iterable[str]) -> Iterator[set[float]]:
    """What follows from the rows of a study, arm by arm; the first of the recipe that ran is what ratios are to."""
    there = {row["arm"] for row in rows}
    arms = [arm for arm in dict.fromkeys([*order, *(row["arm"] for row in rows)]) if arm in there]
    flat = [{"arm": row["arm"], "seed": row["seed"], "metrics": dict(_named(row))} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row["metrics"]))
    scores = [n for n in names if n.startswith("metrics ")]
    whole = {arm.name: arm for arm in summarize(flat, names[0], arms=arms).arms}
    found: dict[str, set[float]] = {arm: set() for arm in arms}
    for arm, name in itertools.product(arms, names):
        if (stat := whole[arm].metrics.get(name)) is not None:
            found[arm] |= {stat.mean, *([] if stat.std is None else [stat.std])}
            base = whole[arms[0]].metrics.get(name)
            if base is not None and base.mean and arm != arms[0] and name.startswith(_RATIOS):
                found[arm].add(stat.mean / base.mean)
    for first, name in itertools.product(arms, scores):
        pair = [first, *(arm for arm in arms if arm != first)]
        for each in summarize(flat, name, arms=pair).arms[1:]:
            if (delta := each.difference) is not None:
                found[each.name] |= {v for v in (delta.mean, delta.low, delta.high) if v is not None}
    yield from found.values()


def _cases(rows: list[dict[str, Any]]) -> Iterator[set[float]]:
    """What follows from variants that took turns in one case: times to the first, memory to it and to LoRA."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row.get("tokens")), []).append(row)
    for group in groups.values():
        first = [group[0], *(row for row in group if str(row["variant"]).startswith("lora"))]
        yield (
            {group[0].get("tokens") or 0}
            | {row["ratio"] for row in group}
            | {row["peak_bytes"] / other["peak_bytes"] for row in group for other in first if other.get("peak_bytes")}
        )


def _named(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping) and key not in ("machine", "versions", "settings"):
            yield from _named(value, f"{before}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "seed" and math.isfinite(value):
            yield f"{before}{key}", float(value)
    if isinstance(row.get("seconds"), Mapping):
        yield f"{before}all seconds", math.fsum(row["seconds"].values())


# --- the check


def missing(section: Section, folder: Path = RESULTS) -> list[str]:
    """The figures of a section that have no source, as they are shown."""
    if section.untraced:
        return []
    found: list[str] = []
    kept = [(records(name, folder), how) for name, how in section.sources]
    strict = [(known[:-1], int(how.split()[2:3][0] if how.split()[2:] else 1)) for known, how in kept if how]
    columns = any(how.startswith("by column") for _, how in kept)
    everything = frozenset().union(*(known[-1] for known, _ in kept)) if kept else frozenset()
    tables, prose = _blocks(section.text)
    if "*" in section.given:
        return []
    for line in prose:
        found += [f.text for f in figures(line) if f.number not in section.given and not f.is_shown(everything)]
    for table in tables:
        lines = [list(column) for column in zip(*table, strict=False)] if columns else table
        for line in lines:
            shown = [f for cell in line for f in figures(cell, bool(strict)) if f.number not in section.given]
            lost = [f.text for f in shown if not f.is_shown(everything)]
            if not lost and strict and (left := _left(shown, strict)):
                lost = [f"{', '.join(f.text for f in left)} (of another record, in {' | '.join(line)})"]
            found += lost
    return found


def _left(shown: list[Figure], strict: list[tuple[tuple[frozenset[float], ...], int]]) -> list[Figure]:
    """What is left of a line's figures when so many records of each file have been taken, the best ones first."""
    left, room = shown, {number: most for number, (_, most) in enumerate(strict)}
    while left and room:
        rests = (
            (len(rest := [f for f in left if not f.is_shown(one)]), number, rest)
            for number in room
            for one in strict[number][0]
        )
        count, number, rest = min(rests, key=lambda each: each[:2])
        if count == len(left):
            break
        left, room[number] = rest, room[number] - 1
        room = {key: most for key, most in room.items() if most}
    return left


def _blocks(text: str) -> tuple[list[list[list[str]]], list[str]]:
    """The tables, as cells, and the other lines."""
    tables: list[list[list[str]]] = []
    prose, within = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not within:
                tables.append([])
            if not re.fullmatch(r"[|:\- ]+", line):
                tables[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        else:
            prose.append(line)
        within = line.startswith("|")
    return tables, prose


def main() -> int:
    """Print what has no source; 1 where there is something."""
    count = 0
    for page in PAGES:
        for section in sections(page.name, page.read_text(encoding="utf-8")):
            if section.untraced:
                print(f"{section.name}: untraced, {len(figures(section.text))} figures")
            elif lost := missing(section):
                count += len(lost)
                print(f"{section.name}: {len(lost)} without a source: {'; '.join(lost[:40])}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
