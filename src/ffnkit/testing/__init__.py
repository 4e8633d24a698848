"""The contract of methods, tuners, edits and families, as checks that any package can run on its own.

    from ffnkit.testing import Case, check_method

    def test_halve():
        check_method(lambda: Halve(layers="all"), Case(tiny_bert, tiny_inputs))

Each check that fails raises :class:`ContractError`, which names it. Nothing here needs a test framework.
"""

from __future__ import annotations

from ffnkit.testing.contract import Case, ContractError
from ffnkit.testing.edits import check_edit
from ffnkit.testing.families import check_family
from ffnkit.testing.methods import check_method
from ffnkit.testing.tuners import check_tuner

__all__ = ["Case", "ContractError", "check_edit", "check_family", "check_method", "check_tuner"]
