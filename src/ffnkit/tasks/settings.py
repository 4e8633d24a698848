"""Settings of decoding, checked when they are made; light to import."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0)]


class GenerationSettings(BaseModel):
    """How text is generated when a generation task is evaluated: by beam search, greedily with one beam."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: Count | None = Field(None, description="tokens of an answer at most; null: as the task says")
    num_beams: Count = Field(1, description="beams; 1: greedy decoding")
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = Field(
        1.0, description="of beam search: above 0 favours long answers, below 0 short ones"
    )
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = Field(0, description="no n-gram twice in a text; 0: allowed")
    batch_size: Count = Field(32, description="prompts at a time")
