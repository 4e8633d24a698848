"""docs/llms.txt: the whole API and its pitfalls as one text file, for assistants: ``python tools/llms.py`` writes it.

Signatures and texts are those of the docstrings; methods, tuners, tasks and recipes come from their own lists; pitfalls
are the page on troubleshooting.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import ffnkit
from ffnkit.cli import lists
from ffnkit.recipe import shipped

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "llms.txt"
START = """# ffnkit

> Compresses and cheaply fine-tunes the feed-forward blocks (FFNs) of unmodified Hugging Face transformers.

The way: `import ffnkit as fk`; `plan = fk.plan(model, method, data=batches)` changes nothing; `fk.apply(model, plan)`
changes the model in place; tune with any Trainer; `fk.export(model, out)` writes what plain `from_pretrained` opens.
In the shell: `ffnkit compress MODEL --text FILE --set width=0.5 --out small`,
`ffnkit tune small --task sst2 --out tuned`, `ffnkit export tuned --out final`, `ffnkit run RECIPE`.
"""


def text() -> str:
    """The whole file."""
    parts = [START, "## API\n", *(_member(name) for name in ffnkit.__all__)]
    for title, rows in (("Methods", lists.method_rows()), ("Tuners", lists.tuner_rows())):
        parts += [f"## {title} and their settings\n", *(_row(row) for row in rows)]
    parts += [
        "## Tasks\n",
        *(f"- {row['name']}: {row['kind']}, {', '.join(row['metrics'])}" for row in lists.task_rows()),
    ]
    parts += ["\n## Recipes\n", *(f"- {name}: {shipped.about(name)}" for name in shipped.names())]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pitfalls = re.sub(r"<!--.*?-->\n?|\]\([^)]*\)|\[(?=[^\]]*\]\()", lambda m: "", page)
    parts.append("\n" + re.sub(r"^#", "##", pitfalls, flags=re.MULTILINE))
    return "\n".join(parts).rstrip() + "\n"


def _member(name: str) -> str:
    thing = getattr(ffnkit, name)
    if not callable(thing):
        return f"### fk.{name}\n\n{type(thing).__name__} of {len(thing)} rows.\n"
    said = [f"### fk.{name}{_signature(thing)}\n", inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and not issubclass(thing, BaseException):
        own = [each for each in vars(thing) if each[0] != "_" and inspect.getdoc(getattr(thing, each))]
        calls = [each for each in own if callable(getattr(thing, each))]
        said += [f"\n- .{each}{_signature(getattr(thing, each))}: {_first(getattr(thing, each))}" for each in calls]
    return "\n".join(said) + "\n"


def _signature(thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "()"
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return re.sub(r"<[^<>]*>", "...", shown)  # defaults that have no text of their own


def _first(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def _row(row: dict[str, Any]) -> str:
    from ffnkit.cli import describe

    told = [f"### {row['name']}\n", row["description"]]
    told += [
        f"- {name} = {describe.default(info)}: {' '.join(str(info.get('help', '')).split())}"
        for name, info in (row["settings"] or {}).items()
    ]
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
