"""The picture of the first page, docs/first.svg, from a stored result: ``python tools/first_picture.py``.

Perplexity of SmolLM2-135M with a quarter of the neurons of every FFN gone, by method, before any tuning, on text that
no fit saw. SVG text is text, and the file is the same each time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "closed_forms_smollm2-135m.json"
TARGET = ROOT / "docs" / "first.svg"
COLUMN = "WikiText-2"
SHOWN = {  # row of the result -> how it is called, and whether it is what we recommend
    "uncompressed": ("the model as it was", False),
    "calibrated-fusion": ("data-aware fusion", True),
    "modegpt": ("MoDeGPT: leverage and refit", False),
    "importance": ("neurons by importance", False),
    "svd, whiten": ("SVD, whitened on data", False),
    "random": ("neurons at random", False),
    "fusion": ("clustering of weights (MLP Fusion)", False),
    "magnitude": ("neurons by magnitude", False),
}
WIDTH, LEFT, RIGHT, BAR, STEP, TOP = 720, 262, 100, 20, 30, 64


def draw() -> str:
    """The SVG: one bar a method, on a logarithmic axis from the uncompressed model's perplexity."""
    rows = {row["name"]: row[COLUMN] for row in json.loads(SOURCE.read_text(encoding="utf-8"))["rows"]}
    shown = [(*SHOWN[name], rows[name]) for name in SHOWN]
    low, high = math.log10(10), math.log10(max(rows[name] for name in SHOWN))
    height = TOP + STEP * len(shown) + 30
    title = "SmolLM2-135M, a quarter of all FFN neurons gone, before any tuning"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}"'
        ' font-family="system-ui, sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="17" font-weight="bold" fill="#1a1a1a">{title}</text>',
        '<text x="16" y="47" fill="#444444">Perplexity on WikiText-2 (logarithmic; shorter is better)</text>',
    ]
    for place, (name, ours, value) in enumerate(shown):
        y = TOP + STEP * place
        length = (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)
        fill = "#3f51b5" if ours else "#455a64" if not place else "#9aa5ab"
        weight = ' font-weight="bold"' if ours else ""
        lines += [
            f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end" fill="#1a1a1a"{weight}>{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{fill}"/>',
            f'<text x="{LEFT + length + 8:.1f}" y="{y + 15}" fill="#1a1a1a"{weight}>{_told(value)}</text>',
        ]
    source = f"8,192 tokens of calibration, one draw; from {SOURCE.relative_to(ROOT).as_posix()}"
    lines += [f'<text x="16" y="{height - 10}" font-size="12" fill="#555555">{source}</text>', "</svg>", ""]
    return "\n".join(lines)


def _told(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value / 1e6:.1f} million"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
