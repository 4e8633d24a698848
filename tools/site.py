"""What the documentation site needs beside the pages: hooks of mkdocs.yml, run by `make docs`.

The first page of the site is README.md, and the stored results that pages link to are pages of it too, so that there is
one text of each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What the theme leaves to be desired by who does not see colours, or reads with ears or keys: checked with axe-core.
STYLE = """
.md-typeset :is(p, li, td, dd) a:not(.headerlink):not(.md-button) { text-decoration: underline; }
[data-md-color-scheme="default"] { --reach: #5f5f5f; }
[data-md-color-scheme="slate"] { --reach: #b0b0b8; }
[data-md-color-scheme] {
  --md-code-hl-comment-color: var(--reach);
  --md-code-hl-generic-color: var(--reach);
  --md-code-hl-operator-color: var(--reach);
  --md-code-hl-punctuation-color: var(--reach);
  --md-code-hl-variable-color: var(--reach);
  --md-footer-fg-color--lighter: #ffffffb0;
}
"""
SCRIPT = """
function reach() {
  document.querySelectorAll(".md-code__nav").forEach((nav, n) => nav.setAttribute("aria-label", `Code block ${n + 1}`));
  const scrolls = ".md-typeset__scrollwrap:not([tabindex]), pre > code:not([tabindex])";
  document.querySelectorAll(scrolls).forEach((each) => each.setAttribute("tabindex", "0"));
}
const changes = { childList: true, subtree: true, attributes: true, attributeFilter: ["tabindex"] };
new MutationObserver(reach).observe(document.documentElement, changes);
"""


def on_files(files: Files, config: Any) -> Files:
    """README as the first page, results as pages below ``results/``, their pictures beside them."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_text(encoding="utf-8")))
    for path in sorted({*RESULTS.glob("*.png"), *RESULTS.glob("*.json")}):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changes))
    files.append(File.generated(config, "reach.css", content=STYLE.lstrip()))
    files.append(File.generated(config, "reach.js", content=SCRIPT.lstrip()))
    return files


def on_post_page(output: str, **_: Any) -> str:
    """Code that scrolls is reached by keys, what is reached has a name of its own, and an empty cell is no header."""
    output = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output)
    output = re.sub(r"(<pre[^>]*>(?:<span></span>)?)<code>", r'\1<code tabindex="0">', output)
    # A heading of a page may be called as a section of the site is.
    output = output.replace('<nav class="md-nav" aria-label="', '<nav class="md-nav" aria-label="Below ')
    search = 'data-md-component="search" role="dialog"'
    return output.replace(search, f'{search} aria-label="Search"')


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the page that says there is no such page."""
    return on_post_page(output_content)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work in the repository become links as they work in the site."""
    if page.file.src_uri == "index.md":
        markdown = markdown.replace("](CHANGELOG.md", "](changelog.md").replace("](benchmarks/results/", "](results/")
    if page.file.src_uri in ("index.md", "changelog.md"):
        markdown = markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
    up = "../" if "/" in page.file.src_uri else ""
    return re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({up}results/", markdown)
