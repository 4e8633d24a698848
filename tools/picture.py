"""Draw the architecture from the imports of src/ffnkit alone: ``python tools/picture.py [docs/architecture.svg]``.

Rooms stand in the order of the list under "Layers" in docs/design.md, each with its lines and the first sentence of its
docstring. An arrow goes from a room to one that it imports; the more of its modules do, the thicker. One that points up
is red. Arrows to errors.py are left out: all rooms import it.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ffnkit"
DESIGN = ROOT / "docs" / "design.md"
OUT = ROOT / "docs" / "architecture.svg"
EVERYWHERE = "errors"


@dataclass
class Room:
    """A package, or a module of the root.

    Attributes:
        rank: its step in the order, 0 at the top. says: the first sentence of its docstring.
        files: how many modules. lines: in all of them.
        imports: room -> the modules of this one that import it.
    """

    name: str
    rank: int
    says: str
    files: int
    lines: int
    imports: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


Arrow = tuple[str, str, int]  # from a room, to a room, modules that import


# --- what is there


def order(text: str) -> dict[str, int]:
    """Room -> step, 0 at the top, of the list under "Layers"."""
    block = text.split("## Layers")[1].split("```")[1].strip()
    rows = [re.findall(r"(\w+)(?:\.py|/)", re.split(r"\s{2,}", line)[0]) for line in block.splitlines()]
    return {name: rank for rank, row in enumerate(rows) for name in row}


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """The rooms that a module of ``package`` imports, lazily too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ffnkit."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            if path[:1] == ["ffnkit"]:
                yield from ([*path[1:], alias.name][0] for alias in node.names)


def sentence(docstring: str) -> str:
    """The first sentence, without marks."""
    first = re.split(r"(?<=[.])\s", " ".join(docstring.split("\n\n")[0].split()))[0]
    return first.replace("`", "")


def rooms(package: Path = PACKAGE, design: Path = DESIGN) -> dict[str, Room]:
    """The rooms from top to bottom, with what each imports."""
    found: dict[str, Room] = {}
    steps = order(design.read_text(encoding="utf-8"))
    for name, rank in steps.items():
        home = package / name
        files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
        texts = {file: file.read_text(encoding="utf-8") for file in files}
        head = texts[home / "__init__.py" if home.is_dir() else files[0]]
        says = sentence(ast.get_docstring(ast.parse(head)) or "")
        room = found[name] = Room(name, rank, says, len(files), sum(text.count("\n") for text in texts.values()))
        for file, text in texts.items():
            within = ["ffnkit", *file.relative_to(package).parent.parts]
            for other in imported(ast.parse(text), within):
                if other in steps and other != name:
                    room.imports[other].add(file.name if not home.is_dir() else str(file.relative_to(home)))
    return found


def arrows(found: dict[str, Room]) -> list[Arrow]:
    """What is drawn, from top to bottom."""
    return [
        (room.name, other, len(room.imports[other]))
        for room in found.values()
        for other in found
        if other in room.imports and other != EVERYWHERE
    ]


# --- drawing

LEFT, TOP, WIDE, HIGH, GAP, REACH = 28, 92, 560, 64, 18, 640
INK, GREY, PAPER, UP = "#1f2933", "#6b7785", "#ffffff", "#d62828"
# What a user calls, what it does to a model, what is known of one: a colour each, and a lighter one of their boxes.
GROUPS = (
    (
        "what is called",
        "#3d6fb5",
        "#eef3fb",
        ("testing", "cli", "search", "recipe", "report", "tune", "analysis", "stream", "tasks"),
    ),
    ("what is done", "#2a8c7a", "#ebf6f3", ("checkpoint", "budget", "methods", "calibration", "surgery")),
    ("what is known", "#b9770e", "#fdf5e6", ()),
)


def group(name: str) -> int:
    return next((i for i, (_, _, _, names) in enumerate(GROUPS) if name in names), len(GROUPS) - 1)


def boxes(found: dict[str, Room]) -> dict[str, tuple[float, float, float]]:
    """Left, top and width of each box; those of one step stand side by side."""
    steps: dict[int, list[str]] = defaultdict(list)
    for room in found.values():
        steps[room.rank].append(room.name)
    placed: dict[str, tuple[float, float, float]] = {}
    for rank, names in steps.items():
        wide = (WIDE - (len(names) - 1) * 12) / len(names)
        for i, name in enumerate(names):
            placed[name] = (LEFT + i * (wide + 12), TOP + rank * (HIGH + GAP), wide)
    return placed


def ports(found: dict[str, Room], drawn: list[Arrow]) -> dict[tuple[str, str, bool], float]:
    """Heights at which arrows leave (True) and reach (False) boxes, so that arcs lie inside each other."""
    at: dict[tuple[str, str, bool], float] = {}
    for name, (_, top, _) in boxes(found).items():
        coming = sorted((a for a in drawn if a[1] == name), key=lambda a: -found[a[0]].rank)
        going = sorted((a for a in drawn if a[0] == name), key=lambda a: -found[a[1]].rank)
        both = [(a, False) for a in coming] + [(a, True) for a in going]
        step = (HIGH - 14) / max(len(both) - 1, 1)
        for i, (arrow, leaves) in enumerate(both):
            height = top + 7 + i * step if len(both) > 1 else top + HIGH / 2
            at[arrow[0], arrow[1], leaves] = height
    return at


def arc(x0: float, y0: float, x1: float, y1: float, step: float) -> str:
    """A path from one height to another around the right side."""
    out = LEFT + WIDE + 26 + REACH * (1 - 0.86 ** abs(step)) * 0.94
    return f"M{x0:.1f} {y0:.1f} C{out:.1f} {y0:.1f} {out:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"


def draw(found: dict[str, Room]) -> str:
    """The picture as SVG."""
    drawn, placed = arrows(found), boxes(found)
    at = ports(found, drawn)
    height = TOP + (max(room.rank for room in found.values()) + 1) * (HIGH + GAP) + 44
    width = LEFT + WIDE + 26 + int(0.76 * REACH)
    most = max(room.lines for room in found.values())
    total, files = sum(room.lines for room in found.values()), sum(room.files for room in found.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="DejaVu Sans, Verdana, sans-serif">',
        "<title>Rooms of ffnkit and what they import</title>",
        "<style>.a{fill:none;stroke-linecap:round}.a:hover{stroke-opacity:1}</style>",
        "<defs>",
    ]
    for i, colour in enumerate((*(g[1] for g in GROUPS), UP)):
        parts.append(
            f'<marker id="m{i}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
            f' markerUnits="userSpaceOnUse" orient="auto"><path d="M0 .8 8 4 0 7.2z" fill="{colour}"/></marker>'
        )
    parts += ["</defs>", f'<rect width="{width}" height="{height}" fill="{PAPER}"/>']
    parts.append(text(LEFT, 38, "ffnkit", 24, INK, "bold"))
    said = (
        f"{len(found)} rooms, {files} modules, {total:,} lines. Imports point down only; a thicker arrow: more modules."
    )
    parts.append(text(LEFT, 62, said, 13, GREY))
    x = LEFT
    for name, colour, light, _ in GROUPS:
        parts.append(f'<rect x="{x}" y="72" width="11" height="11" rx="2" fill="{light}" stroke="{colour}"/>')
        parts.append(text(x + 17, 82, name, 12, GREY))
        x += 140
    for source, target, count in sorted(drawn, key=lambda a: (a[2], a)):
        step = found[target].rank - found[source].rank
        up = step <= 0
        kind = len(GROUPS) if up else group(source)
        colour = UP if up else GROUPS[kind][1]
        x0, x1 = (placed[n][0] + placed[n][2] for n in (source, target))
        line = arc(x0, at[source, target, True], x1 + 2, at[source, target, False], step)
        thick, clear = min(0.9 + 0.42 * count, 6.5), min(0.34 + 0.045 * count, 0.85)
        parts.append(
            f'<path class="a" data-from="{source}" data-to="{target}" data-modules="{count}" d="{line}"'
            f' stroke="{colour}" stroke-width="{thick:.2f}" stroke-opacity="{1 if up else clear:.2f}"'
            f' marker-end="url(#m{kind})"><title>{source} → {target}: {count} modules</title></path>'
        )
    for name, (x0, y, wide) in placed.items():
        parts += box(found[name], x0, y, wide, most)
    parts.append(text(LEFT, height - 18, "Arrows to errors are left out: every room imports it.", 12, GREY))
    return "\n".join([*parts, "</svg>", ""])


def box(room: Room, x: float, y: float, wide: float, most: int) -> list[str]:
    """A room: name, size, a bar as long as it is large, and what it says of itself."""
    _, colour, light, _ = GROUPS[group(room.name)]
    small = wide < WIDE / 2
    size = f"{room.lines:,} lines" if small else f"{room.lines:,} lines in {room.files} modules"
    size = size.replace("in 1 modules", "in 1 module")
    says = textwrap.wrap(room.says, 30 if small else 88, max_lines=2, placeholder=" ...")
    parts = [
        f'<g data-room="{room.name}" data-lines="{room.lines}">',
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{HIGH}" rx="6" fill="{light}" stroke="{colour}"/>',
        f'<rect x="{x:.1f}" y="{y + HIGH - 4:.1f}" width="{max(wide * room.lines / most, 6):.1f}" height="4" rx="2"'
        f' fill="{colour}" fill-opacity=".65"/>',
        text(x + 12, y + 21, room.name, 14 if small else 15, INK, "bold"),
        text(x + wide - 14, y + 20, size, 10.5 if small else 11.5, GREY, anchor="end"),
    ]
    parts += [text(x + 12, y + 37 + 13.5 * i, line, 9.5 if small else 11, INK) for i, line in enumerate(says)]
    return [*parts, "</g>"]


def text(x: float, y: float, words: str, size: float, colour: str, weight: str = "", anchor: str = "") -> str:
    more = (f' font-weight="{weight}"' if weight else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{more}>{escape(words)}</text>'


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    target.write_text(draw(rooms()), encoding="utf-8")
    print(f"{target}: {len(arrows(rooms()))} arrows")
