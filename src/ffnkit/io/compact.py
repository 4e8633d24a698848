"""What the ``quantization_config`` of a compact checkpoint may hold: checked before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ffnkit.errors import FfnkitError

ASKED = "opening a compact checkpoint"
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Number = Annotated[int, Field(ge=0, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Site = Annotated[str, Field(pattern="^(up|gate|down)$")]
Pair = Field(min_length=2, max_length=2)


class Strict(BaseModel):
    """No value is taken for one of another type, and no key is left unread."""

    model_config = ConfigDict(strict=True, extra="forbid")


class LayerRow(BaseModel):
    """What stands in the place of a linear; kinds of other packages may say more of themselves."""

    model_config = ConfigDict(strict=True, extra="allow")
    kind: Name
    rank: Size | None = None

    @model_validator(mode="after")
    def _whole(self) -> LayerRow:
        if self.kind == "lowrank" and self.rank is None:
            raise ValueError("no rank is given")
        return self


class FfnRow(Strict):
    """The true shape of an FFN; fields as ``surgery.description.describe`` writes them."""

    width: Size
    key: Annotated[list[str], Pair] | None
    special: dict[Site, LayerRow]
    twins: list[Name]
    original: Size | None = None


class HeadsRow(Strict):
    """The heads that an attention kept, by number, and how many there were of queries and keys."""

    heads: Annotated[list[Number], Field(min_length=1)]
    kv: Annotated[list[Number], Field(min_length=1)]
    of: Annotated[list[Size], Pair]

    @model_validator(mode="after")
    def _ordered(self) -> HeadsRow:
        for kept, count in zip((self.heads, self.kv), self.of, strict=True):
            if kept != sorted(set(kept)) or kept[-1] >= count:
                raise ValueError(f"{str(kept)[:60]} are no heads among {count}, in order")
        return self


class Described(Strict):
    """All of it."""

    ffns: dict[Name, FfnRow] = {}
    linears: dict[Name, LayerRow] = {}
    attention: dict[Name, HeadsRow] = {}
    base: dict[str, Any] | None = None
    base_done: bool = False

    @model_validator(mode="after")
    def _named_once(self) -> Described:
        names = [name for first, row in self.ffns.items() for name in (first, *row.twins)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is described twice")
        return self


def check_described(data: dict[str, Any]) -> None:
    """Raises FfnkitError, naming the field, where a description holds what it may not."""
    try:
        Described.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("quantization_config", *first["loc"])))[:200]
        told = str(first.get("ctx", {}).get("error", first["msg"]))
        raise FfnkitError(ASKED, f"{where}: {told}", "Use the config.json that was saved with it") from error
