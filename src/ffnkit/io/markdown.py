"""Text that Markdown shows as it is: what a recipe, a file or an error says is no HTML, no link and no heading."""

from __future__ import annotations

import re
from html import escape


def inline(text: str) -> str:
    """``text`` as a cell of a table or a part of a line, all of it on one line."""
    marked = re.sub(r"([\\`*~\[\]|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
    return escape(marked, quote=False)


def one_line(text: str) -> str:
    """``text`` as a line or an entry of a list of its own."""
    return re.sub(r"^(?:(?=[#+=~-])|(\d+)(?=[.)]))", r"\g<1>\\", inline(text))


def paragraphs(text: str) -> str:
    """``text`` as it is parted by blank lines."""
    return "".join(f"{one_line(part)}\n\n" for part in re.split(r"\n\s*\n", text) if part.strip())
