"""What an analysis found: rows, and how they print, save and plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ffnkit.analysis.errors import Errors
from ffnkit.analysis.ntk import KINDS, Distance, Kind
from ffnkit.io.markdown import inline, one_line


@dataclass(frozen=True)
class Row:
    """One method, plan or second model.

    Attributes:
        method, settings, fold: of a plan; None, {} and False of a second model.
        ffn_parameters: in the FFNs, numbers that are stored (a mask's zeros too). ffn_share: of the uncompressed.
        errors: of FFN outputs and hidden states. ntk: distances of the kernels, "" for the sum over FFNs.
    """

    name: str
    method: str | None
    settings: Mapping[str, Any]
    fold: bool
    ffn_parameters: int
    ffn_share: float
    errors: Errors | None
    ntk: Mapping[str, Mapping[Kind, Distance]] | None

    def figures(self) -> dict[str, float]:
        """The figures of the table by their column."""
        found: dict[str, float] = {"FFN parameters": self.ffn_share}
        if self.errors is not None:
            found["FFN output"] = self.errors.mean_output
            found["as read"] = self.errors.mean_read
            last = self.errors.last_hidden
            found |= {f"hidden {stack}".strip(): value for stack, value in last.items()}
        if self.ntk is not None:
            total = self.ntk[""]
            found |= {f"NTK {kind}": total[kind].relative for kind in KINDS}
            found |= {f"cos {kind}": total[kind].cosine for kind in KINDS}
            found |= {f"ccos {kind}": total[kind].centred for kind in KINDS}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; what is not finite is None."""
        found: dict[str, Any] = {
            "name": self.name,
            "method": self.method,
            "settings": dict(self.settings),
            "fold": self.fold,
            "ffn_parameters": self.ffn_parameters,
            "ffn_share": self.ffn_share,
        }
        if self.errors is not None:
            found["output_error"] = {"mean": self.errors.mean_output, "by_ffn": self.errors.output}
            found["read_error"] = {"mean": self.errors.mean_read, "by_ffn": self.errors.read}
            found["hidden_error"] = {"last": self.errors.last_hidden, "by_block": self.errors.hidden}
        if self.ntk is not None:
            each = {name: {k: asdict(v) for k, v in kinds.items()} for name, kinds in self.ntk.items()}
            found["ntk"] = {"total": each.pop(""), "by_ffn": each}
        return _finite(found)


@dataclass(frozen=True)
class Analysis:
    """The result of ``fk.analyze``.

    Attributes:
        model: the uncompressed model's class. rows: one a method, plan or second model.
        conditions: tokens, examples, FFNs and memory of the kernel. notes: what a reader must know.
    """

    model: str
    rows: tuple[Row, ...]
    conditions: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "conditions": _finite(self.conditions),
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines of the table."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row.figures()))
        lines = []
        for row in self.rows:
            found = row.figures()
            lines.append([row.name, *(_number(key, found.get(key, math.nan)) for key in columns)])
        return ["", *columns], lines

    def __str__(self) -> str:
        header, lines = self.cells()
        widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]

        def text(line: list[str]) -> str:
            return "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )

        told = [f"{self.model}: {each}" if n == 0 else f"  {each}" for n, each in enumerate(self.about())]
        return "\n".join([text(header), *map(text, lines), "", *told])

    def to_markdown(self) -> str:
        """The table in Markdown, and under it on what it was measured."""
        header, lines = self.cells()
        align = [":--", *["--:"] * (len(header) - 1)]
        head, *body = ([inline(cell) for cell in line] for line in (header, *lines))
        table = ["| " + " | ".join(line) + " |" for line in (head, align, *body)]
        return "\n".join([*table, "", *(f"- {one_line(each)}" for each in self.about())]) + "\n"

    def about(self) -> list[str]:
        """What the columns are and on what they were measured, in words."""
        found = ["FFN parameters: share of the uncompressed FFNs'"]
        tokens = self.conditions.get("tokens")
        if tokens:
            count = ", ".join(f"{value:,} {stack} tokens".replace("  ", " ") for stack, value in tokens.items())
            found.append(f"FFN output, hidden: relative errors, mean over FFNs and at the last block; {count}")
            found.append("as read: the FFN output's error as the next norm weighs it, relative to the outputs' spread")
        ntk = self.conditions.get("ntk")
        if ntk:
            found.append(
                "NTK, cos, ccos: relative distance, alignment and centred alignment of the kernels on"
                f" {ntk['examples']} examples, {len(ntk['ffns'])} FFNs (layers {ntk['layers']}),"
                f" {ntk['parameters']:,} parameters, f = {ntk['output']}"
            )
        return [*found, *self.notes]

    def plot(self, path: str | Path) -> None:
        """Draw the analysis into a file; its ending chooses the format (png, svg, pdf)."""
        from ffnkit.analysis.plot import draw

        draw(self, path)


def _number(column: str, value: float) -> str:
    if column == "FFN parameters":
        return f"{100 * value:.1f}%"
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    """``value`` with None where a number is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
