"""Settings of decoding and of judging, checked when they are made; light to import."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

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


ASKED = (
    "Two answers to one request are shown. Say which of them is better: more helpful, correct and to the point. "
    "Neither their order nor their length counts. End with [[A]], with [[B]], or with [[C]] where both are as good."
)


class JudgeSettings(Checked):
    """Who judges pairs of free answers, and how it is asked: a local model, or one at an OpenAI-compatible address."""

    model: Annotated[str, Field(min_length=1, description="a folder or hub name; with url the model's name there")]
    url: Annotated[
        str | None, Field(description="address before /chat/completions; its key is read from FFNKIT_JUDGE_KEY")
    ] = None
    prompts: Annotated[Count | None, Field(description="prompts judged, the first of the report split; null: all")] = (
        100
    )
    instruction: Annotated[str, Field(description="what is asked; the verdicts are [[A]], [[B]] and [[C]]")] = ASKED
    timeout: Annotated[Annotated[float, Field(gt=0)], Field(description="seconds that an address has to answer")] = 60.0
    retries: Annotated[
        Annotated[int, Field(ge=0, le=10)], Field(description="further tries where an address is busy or silent")
    ] = 2
    request: dict[str, Any] = Field(
        default_factory=dict, description="further fields of a request to an address; null takes one out"
    )
    max_length: Annotated[Count, Field(description="tokens that a local model reads; longer texts are cut")] = 2048

    @field_validator("url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("no address; write http://host:port/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("holds more than host and path; a key is read from FFNKIT_JUDGE_KEY alone")
        return url.rstrip("/")


class HarnessSettings(Checked):
    """What lm-evaluation-harness is asked; what is left out is as the harness has it."""

    tasks: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="its tasks, by name or pattern"),
    ]
    include_path: tuple[str, ...] = Field(default=(), description="folders with YAML files of further tasks")
    num_fewshot: Annotated[
        Annotated[int, Field(ge=0)] | None, Field(description="examples before each question; null: as the task says")
    ] = None
    limit: Annotated[
        Count | Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="questions of a task, or a share of them; null: all"),
    ] = None
    batch_size: Annotated[Count | Literal["auto"], Field(description="questions at a time, or auto")] = 1
    max_length: Annotated[Count | None, Field(description="tokens that a model reads; null: by its config")] = None
    add_bos_token: bool | None = Field(default=None, description="begin each text with the tokenizer's first token")
    apply_chat_template: bool = Field(default=False, description="ask by the tokenizer's chat template")
    fewshot_as_multiturn: bool = Field(default=True, description="with it, examples are turns of a dialogue")
    system_instruction: str | None = Field(default=None, description="text before all questions")
    gen_kwargs: str | None = Field(default=None, description="settings of decoding, as 'temperature=0,top_k=1'")
    bootstrap_iters: Annotated[Annotated[int, Field(ge=0)], Field(description="of standard errors; 0: none")] = 100_000
    unsafe_code: bool = Field(default=False, description="run tasks that run code which the model wrote")

    @field_validator("tasks", "include_path", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
