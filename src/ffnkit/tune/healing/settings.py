"""How a compressed model is healed; light to import."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ffnkit.errors import FfnkitError
from ffnkit.settings.amounts import amount
from ffnkit.settings.checked import Checked
from ffnkit.tune.settings import Count, NotNegative, Positive

STEPS, LEAST, MOST = 800, 256, 32  # where nothing is said: steps in all, tokens a step at least, texts a step at most

Tokens = Annotated[int, Field(gt=0), BeforeValidator(amount)]


class HealSettings(Checked):
    """How long a compressed model learns from the uncompressed one, what of it trains, and how fast."""

    tokens: Annotated[
        Tokens, Field(description="tokens in all, such as 200k or 1m; texts are read again as needed")
    ] = 200_000
    trains: Annotated[
        Literal["ffn", "lora", "all"],
        Field(
            description="ffn: the FFNs and all norms; lora: adapters on the FFNs, merged at the end; all: everything"
        ),
    ] = "ffn"
    blocks: Annotated[
        float,
        Field(
            ge=0, le=1, description="share of the tokens on which each layer learns its own outputs, before the rest"
        ),
    ] = 0.0
    states: Annotated[
        NotNegative, Field(description="weight of the hidden states of all layers beside the answers")
    ] = 0.0
    learning_rate: Annotated[
        Positive | None,
        Field(description="peak rate of AdamW; null: by the share of the FFNs that is gone, and the width"),
    ] = None
    rank: Annotated[Count, Field(description="of the adapters of lora")] = 16
    batch_size: Annotated[
        Count | None,
        Field(description="texts a step; null: so few that there are about 800 steps, of 256 tokens or more"),
    ] = None
    max_length: Annotated[Count, Field(description="tokens of a text; longer ones come in pieces")] = 256
    checks: Annotated[Count, Field(description="how often the loss on held-out text is measured; the best is kept")] = 8
    patience: Annotated[Count, Field(description="lost states in a row after which it stops")] = 3

    def texts_a_step(self, size: float) -> int:
        """Texts of so many tokens a step: ``batch_size``, else few: many small steps learn more of as many tokens."""
        if self.batch_size is not None:
            return self.batch_size
        return min(max(round(max(self.tokens / STEPS, LEAST) / size), 1), MOST)

    def check_beside(self, method: Any) -> None:
        """Raises FfnkitError where a method will leave FFNs that cannot learn so: told before anything is planned."""
        if self.trains == "lora" and getattr(method, "extras", False):
            raise no_adapters(f"{method.name} has layers that share an FFN keep something of their own", "extras=false")


def no_adapters(found: str, instead: str = "") -> FfnkitError:
    """The error where adapters, merged at the end, would give each layer of a shared FFN weights of its own."""
    found += ", and adapters would give each layer weights of its own again"
    return FfnkitError("healing with trains=lora", found, f"Set trains to ffn{' or ' * bool(instead)}{instead}")
