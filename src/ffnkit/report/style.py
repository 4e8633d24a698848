"""How the report page looks: light and dark, on screens of any width and on paper, without scripts."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #565c63; --line: #d9dde1; --paper: #fff; --tint: #f5f6f8;
  --mark: #b25000; --link: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a6adb5; --line: #363c43; --paper: #15181b;
  --tint: #1e2226; --mark: #f0a860; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; overflow-wrap: anywhere; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.lead { color: var(--soft); margin-top: 0; }
.told { border-left: 3px solid var(--mark); background: var(--tint); padding: .8rem 1rem .8rem 2rem; margin: 1rem 0;
  max-width: 52rem; }
.told li:first-child { font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 1.4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tr > :first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody th { color: var(--ink); }
.words td { text-align: left; }
.notrun td { color: var(--soft); font-style: italic; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0; font-size: .9375rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; } details dl { margin: .6rem 0; }
details dd { white-space: pre-wrap; } summary { cursor: pointer; }
pre { background: var(--tint); padding: .7rem 1rem; font-size: .8125rem; line-height: 1.45; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.notes { padding-left: 1.2rem; margin: 1rem 0; font-size: .9375rem; color: var(--soft); }
fieldset { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem .6rem; margin: 0 0 1rem;
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; min-width: 0; }
legend { color: var(--soft); padding: 0 .4rem; font-size: .875rem; }
label { display: inline-flex; align-items: center; gap: .4rem; min-height: 1.75rem; }
input[type=radio] { width: 1.1rem; height: 1.1rem; margin: 0; accent-color: var(--mark); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.plots svg { flex: 1 1 20rem; min-width: 0; }
svg { max-width: 30rem; width: 100%; height: auto; display: block; }
figure { margin: 0 0 1rem; } figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; max-width: 46rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; }
@media (max-width: 40rem) { body { padding: 1.2rem 1rem 3rem; } h1 { font-size: 1.45rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } th, td { padding: .4rem .5rem; }
  thead th { white-space: normal; } }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } h2 { break-after: avoid; }
  fieldset { display: none; } }
"""


def choosing(names: list[str]) -> str:
    """Of figures in a section with radio buttons "axis-NAME" the chosen one shows; on paper, and where a browser does
    not know ``:has``, all of them."""
    rules = [f"section:has(#axis-{name}:checked) figure:not(.axis-{name})" for name in names]
    return f"@media screen {{ {', '.join(rules)} {{ display: none; }} }}\n" if len(names) > 1 else ""
