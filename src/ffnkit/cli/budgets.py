"""``--budget``: widths by layer in place of one width."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ffnkit.cli import console
from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of

WHOLE = "width=1.0"  # stands in the method until the widths are known


@dataclass(frozen=True)
class Budget:
    """What ``--budget`` and ``--multiple`` ask for.

    Attributes:
        amount: a share of the FFN parameters (float), or how many may be left (int).
        uniform: one width for all, as a standard checkpoint has it.
    """

    amount: float | int
    multiple: int | None
    uniform: bool

    @classmethod
    def read(cls, amount: float | None, multiple: int | None, form: str, pairs: list[str]) -> Budget | None:
        """From the options; None where no budget is given. Raises FfnkitError where the options do not go together."""
        if amount is None:
            if multiple is not None:
                raise FfnkitError(f"--multiple {multiple}", "no --budget is given", "Add --budget 0.5, or leave it out")
            return None
        if any(pair.partition("=")[0].strip() == "width" for pair in pairs):
            raise FfnkitError(f"--budget {amount:g}", "--set width=... is given too", "Give one of the two")
        if not (0 < amount < 1 or (amount > 1 and amount.is_integer())):
            found = "it is neither a share between 0 and 1 nor a whole number above 1"
            raise FfnkitError(
                f"--budget {amount:g}", found, "Give the share or number of FFN parameters that stay, such as 0.5"
            )
        counted = int(amount) if amount >= 1 and amount == int(amount) else amount
        return cls(counted, multiple, uniform=form in ("standard", "both"))

    @property
    def measures(self) -> bool:
        """Whether data would be used, where there are any."""
        return not self.uniform

    def settings(self, name: str | None) -> list[str]:
        """What stands in a method's settings for now. Raises FfnkitError where the method has no width."""
        from ffnkit import methods

        fields = {each.name for each in settings_of(methods.get(name))} if name in methods.names() else set()
        if fields and not {"width", "layers"} <= fields:
            do = "Choose a method that narrows FFNs, such as calibrated-fusion"
            raise FfnkitError(f"--budget {self.amount:g}", f"{name} has no setting width", do)
        return [WHOLE]

    def check(self, model: Any, method: Any) -> None:
        """Raises FfnkitError where the budget does not fit the model's shape."""
        from ffnkit.budget.sizes import room

        room(model, self.amount, method.layers, self.multiple)

    def settle(self, method: Any, model: Any, data: Any) -> tuple[Any, Any]:
        """The method with its widths, and the allocation that they are from."""
        import ffnkit

        with console.progress("choosing widths") as step:
            widths = ffnkit.allocate(
                model,
                self.amount,
                layers=method.layers,
                data=data,
                multiple=self.multiple,
                uniform=self.uniform,
                progress=step,
            )
        return dataclasses.replace(method, width=widths), widths
