"""What pydantic finds, in a user's words. Light to import."""

from __future__ import annotations

import re


def in_words(message: str) -> str:
    """A message of pydantic in words that name no type of Python's: "should be a whole number"."""
    message = message.removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    message = message.replace("a valid tuple", "a list").replace("a valid integer", "a whole number")
    message = re.sub(r"a valid (dictionary|mapping)( or (an )?instance of \w+)?", "fields with values", message)
    message = message.replace("a valid boolean", "true or false").replace("a valid string", "text")
    return message.replace("a valid number", "a number").replace("Field required", "is missing")
