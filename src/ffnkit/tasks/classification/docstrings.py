"""The quickstart's task: which of four libraries is this docstring from?

The texts are the first paragraphs of the public docstrings of numpy, scipy, scikit-learn and torch as installed. They
are read from the source files with :mod:`ast`: nothing is imported and nothing runs. Public are top-level functions
and classes without an underscore, as ``__all__`` and the packages' imports say, and the docstrings that are attached
to compiled functions (``add_newdoc``, ``add_docstr``). The libraries' names, their usual abbreviations and dotted paths
below them are masked. Words of their subject (tensor, estimator) stay: they are the task.

A smoke test on real text, not a benchmark.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.rows.splitting import Source, Table, carve, size

LIBRARIES = {"numpy": "numpy", "scipy": "scipy", "scikit-learn": "sklearn", "torch": "torch"}
"""Name of the library (the label) -> name of its package."""

MASK = "library"
REPORT_SHARE = 0.2
_LEAST_WORDS = 4
_REPORT_SEED = 0

# Tests, build tools and bundled copies of other projects; of torch also what is internal to compilers and launchers.
_LEFT_OUT = {"tests", "testing", "test", "conftest.py", "setup.py", "externals", "_external", "extern", "_vendor"}
_LEFT_OUT |= {"benchmarks", "f2py", "distutils", "_pyinstaller", "typing", "array_api_extra", "array_api_compat"}
_LEFT_OUT_TORCH = {"fx", "distributed", "onnx"}
_TORCH_COMPILED = {"_torch_docs.py", "_tensor_docs.py", "_tensor.py", "_jit_internal.py"}
_ADD_DOC = {"add_newdoc", "add_docstr", "add_docstr_all"}

_NAMES = r"scikit[- ]?learn|scikits?|sklearn|numpy|scipy|(?:py|lib|execu)?torch[a-z]*|aten|np|sp"
_MASKED = re.compile(rf"(?<![A-Za-z0-9])(?:{_NAMES})(?:(?:\.|::)\w+)*(?![A-Za-z0-9])", re.IGNORECASE)
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_SIGNATURE = re.compile(r"[\w.]+ ?\(.*\)(?: *-> *\S.*)?(?: --)?")
_CROSS_REFERENCE = re.compile(r"(?:see|alias|in-place version|out-of-place version)\b", re.IGNORECASE)


@dataclass
class _Module:
    """What one source file documents: (name, docstring) of its top-level definitions, docs of compiled functions."""

    private: bool
    exported: set[str] | None
    imported: set[str] = field(default_factory=set)
    defined: list[tuple[str, str]] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)


def collect() -> tuple[Table, tuple[str, ...]]:
    """The texts with class ids, in a fixed order, and notes: versions, counts, SHA-256 of the texts.

    Raises:
        FfnkitError: one of the four libraries is not installed.
    """
    found: dict[str, int | None] = {}
    for index, (name, package) in enumerate(LIBRARIES.items()):
        for text in _texts(_root(name, package), package):
            # A text of two libraries has no answer.
            found[text] = index if found.get(text, index) == index else None
    rows = sorted((label, text) for text, label in found.items() if label is not None)
    table: Table = {"text": [text for _, text in rows], "label": [label for label, _ in rows]}
    digest = hashlib.sha256("\n".join(f"{label}\t{text}" for label, text in rows).encode()).hexdigest()
    counts = [table["label"].count(index) for index in range(len(LIBRARIES))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    notes = (
        "a smoke test, not a benchmark",
        f"docstrings of {versions}",
        f"{len(rows)} texts ({', '.join(map(str, counts))}), majority class {max(counts) / len(rows):.3f}",
        f"sha256 of the texts {digest}",
    )
    return table, notes


def mask(text: str) -> str:
    """``text`` with the libraries' names, abbreviations and dotted paths replaced by "library", and without markup."""
    plain = _ROLE.sub(lambda match: match.group(1).strip(), text).replace("`", "")
    return " ".join(_MASKED.sub(MASK, plain).split())


def _load(_: Path | None) -> Source:
    """Texts split into train and report with a seed of their own, the same for every seed of a run."""
    table, notes = collect()
    train, report = carve(table, "label", round(REPORT_SHARE * size(table)), _REPORT_SEED, stratified=True)
    notes = (*notes, f"report: {size(report)} texts, the same for every seed")
    return Source(train=train, report=report, where="docstrings of installed libraries", notes=notes)


def _root(name: str, package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FfnkitError("data of task docstrings", f"{name} is not installed", f"pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _texts(root: Path, package: str) -> Iterator[str]:
    """The masked first paragraphs of a library's public docstrings; some more than once."""
    with _no_collection():
        modules = [_read(path, path.relative_to(root)) for path in _files(root, package)]
    public = {name for module in modules for name in (module.exported or set()) | module.imported}
    for module in modules:
        names = module.exported if module.exported is not None else public if module.private else None
        docs = [doc for name, doc in module.defined if names is None or name in names]
        for doc in (*docs, *module.compiled):
            text = mask(_first_paragraph(doc))
            if len(text.split()) >= _LEAST_WORDS and not _CROSS_REFERENCE.match(text):
                yield text


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection off: syntax trees are many objects and no cycles, and collecting doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _files(root: Path, package: str) -> list[Path]:
    def wanted(path: Path) -> bool:
        parts = path.relative_to(root).parts
        if _LEFT_OUT & set(parts):
            return False
        if package != "torch":
            return True
        return parts[0] not in _LEFT_OUT_TORCH and not (_is_private(parts) and parts[-1] not in _TORCH_COMPILED)

    return sorted((path for path in root.rglob("*.py") if wanted(path)), key=lambda path: path.as_posix())


def _is_private(parts: tuple[str, ...]) -> bool:
    return any(part.startswith("_") and part != "__init__.py" for part in parts)


def _read(path: Path, relative: Path) -> _Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return _Module(private=True, exported=set())
    module = _Module(_is_private(relative.parts), _all(tree))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if doc := ast.get_docstring(node):
                module.defined.append((node.name, doc))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            module.compiled.extend(_attached(node.value))
        elif isinstance(node, ast.ImportFrom) and node.level and path.name == "__init__.py" and not module.private:
            module.imported |= {alias.name for alias in node.names}
    return module


def _all(tree: ast.Module) -> set[str] | None:
    """The names of a literal ``__all__``; None where there is none."""
    names: set[str] | None = None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            try:
                names = (names or set()) | set(ast.literal_eval(getattr(node, "value", None) or ast.Tuple([])))
            except ValueError:
                return None
    return names


def _attached(call: ast.Call) -> Iterator[str]:
    """The docstring that a call attaches to a compiled function, if it is such a call."""
    if getattr(call.func, "id", getattr(call.func, "attr", None)) in _ADD_DOC:
        strings = [
            node.value
            for argument in call.args[1:]
            for node in ast.walk(argument)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        if strings:
            yield max(strings, key=len)


def _first_paragraph(doc: str) -> str:
    """The first paragraph that is not the function's signature, on one line."""
    for part in inspect.cleandoc(doc).split("\n\n"):
        line = " ".join(part.split())
        if line and not _SIGNATURE.fullmatch(line):
            return line
    return ""


TASK = Task(
    name="docstrings",
    kind="classification",
    text=("text",),
    label="label",
    metrics=("accuracy", "macro_f1"),
    main_metric="accuracy",
    source="docstrings of the installed numpy, scipy, scikit-learn and torch",
    notes="which library is this docstring from? a smoke test, not a benchmark",
    label_names=tuple(LIBRARIES),
    load=_load,
)
