"""Settings of decoding, checked when they are made; light to import."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ffnkit.settings.checked import Checked

Count = Annotated[int, Field(gt=0)]


class GenerationSettings(Checked):
    """How text is generated when a generation task is evaluated: by beam search, greedily with one beam."""

    max_new_tokens: Annotated[
        Count | None, Field(description="tokens of an answer at most; null: as the task says")
    ] = None
    num_beams: Annotated[Count, Field(description="beams; 1: greedy decoding")] = 1
    length_penalty: Annotated[
        Annotated[float, Field(allow_inf_nan=False)],
        Field(description="of beam search: above 0 favours long answers, below 0 short ones"),
    ] = 1.0
    no_repeat_ngram_size: Annotated[
        Annotated[int, Field(ge=0)], Field(description="no n-gram twice in a text; 0: allowed")
    ] = 0
    batch_size: Annotated[Count, Field(description="prompts at a time")] = 32
