"""Tokens a second of exported widths: ragged against uniform of equal size against the original, in each form.

    python benchmarks/export_speed.py MODEL [--tokens 128 1] [--out benchmarks/results]

FFNs get a quarter, half, three quarters and all of their neurons in turn; which neurons does not matter for speed.
Every form is measured by ``export --measure``: in turn, ratios within a round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, footer, started, table, write

FORMS = {"standard": ("standard", 1), "nemotron-nas": ("nemotron-nas", 1), "nemotron-nas, 256": ("nemotron-nas", 256)}
SHOWN = ("original", "uniform", "exported", "compact")


def rows(source: str, counts: list[int]) -> list[dict[str, Any]]:
    """A row for each form and number of tokens."""
    import ffnkit as fk
    from ffnkit.methods import get
    from ffnkit.model.finding import ffns

    model = fk.load(source)
    found = ffns(model)
    before = {ffn.name: ffn.width for ffn in found}
    widths = {ffn.name: ffn.width // 4 * (1 + number % 4) for number, ffn in enumerate(found)}
    fk.apply(model, fk.plan(model, get("magnitude")(width=widths)))
    made = []
    for tokens in counts:
        for form, (target, multiple) in FORMS.items():
            with tempfile.TemporaryDirectory() as folder:
                report = fk.export(
                    model, f"{folder}/out", target=target, multiple=multiple, measure=tokens, before=before
                )
            made.append({"form": form, "tokens": tokens} | derived(report.to_dict()))
    return made


def derived(row: dict[str, Any]) -> dict[str, Any]:
    """With the share of zeros, and how many times as fast as the original the export is where their shapes differ."""
    ratio = row["speed"]["ratios"].get("original")
    turned = ratio and {"median": 1 / ratio["median"], "lower": 1 / ratio["upper"], "upper": 1 / ratio["lower"]}
    return row | {"path": "out", "padding_share": row["padding"] / row["parameters"], "over_original": turned}


def page(results: dict[str, Any]) -> str:
    """The table, and how it was taken."""
    head = ["form", "tokens at a time", "MB", "zeros of padding", *SHOWN, "exported / original", "uniform / exported"]
    lines = [head, ["---"] * len(head)]
    for row in results["rows"]:
        speeds, ratios = row["speed"]["tokens_per_second"], row["speed"]["ratios"]
        told = [f"{speeds[name]:,.0f}" if name in speeds else "as exported" for name in SHOWN]
        spread = "{median:.2f} ({lower:.2f} to {upper:.2f})"
        told.append(spread.format(**row["over_original"]) if row["over_original"] else "the same")
        told.append(spread.format(**ratios["uniform"]))
        share = f"{row['padding_share']:.1%}"
        lines.append([row["form"], str(row["tokens"]), f"{row['bytes'] / 1e6:.1f}", share, *told])
    speed = results["rows"][0]["speed"]
    notes = [
        f"- {results['model']}, {speed['dtype']}; tokens a second, medians of rounds; ratios with quartiles.",
        "- original: the widths it had. uniform: equal widths, no more parameters than unpadded. compact: in ffnkit.",
        f"- load of the machine at start and end: {', '.join(f'{load:.1f}' for load in results['load'])}.",
        *footer(results, speed["threads"]),
    ]
    return f"# Speed of exported widths\n\n{table(lines)}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    name = Path(given.model).name
    results = started() | {"model": name, "rows": rows(given.model, given.tokens)}
    write(given.out, f"export_speed_{name}", results, page)


if __name__ == "__main__":
    main()
