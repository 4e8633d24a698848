"""Who judges: a local model, by the likelihood of its verdicts, or a model at an OpenAI-compatible address."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any, cast
from urllib.parse import urlsplit

from ffnkit.errors import FfnkitError
from ffnkit.report.judging import Judge, Verdict
from ffnkit.tasks.settings import JudgeSettings

KEY = "FFNKIT_JUDGE_KEY"
"""The environment variable with the key of the address; it goes into no file and no message."""

_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_LARGEST = 1 << 20  # bytes of an answer that are read
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


def judge_of(settings: JudgeSettings, device: Any = "cpu", digest: str = "") -> Judge:
    """The judge that the settings name; a local model is loaded when it is first asked.

    Args:
        digest: of a local model's files, so that verdicts of other weights do not count as its own.
    """
    return Local(settings, device, digest) if settings.url is None else Address(settings)


def shown(prompt: str, first: str, second: str) -> str:
    """What a judge reads of a pair."""
    return f"[Request]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"


class Address:
    """A model behind ``URL/chat/completions``, asked over HTTP with nothing but the standard library.

    Redirects are not followed, so that the key goes nowhere else.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        here = urlsplit(str(settings.url)).hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if here else []  # a proxy of the environment has another "here"
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    @property
    def facts(self) -> dict[str, Any]:
        return self.settings.model_dump(include={"model", "url", "instruction", "request"})

    def ask(self, prompt: str, first: str, second: str) -> tuple[Verdict, str]:
        said = self._said(shown(prompt, first, second))
        found = _VERDICT.findall(said)
        return cast(Verdict, found[-1] if found else ""), said

    def _said(self, text: str) -> str:
        messages = [{"role": "system", "content": self.settings.instruction}, {"role": "user", "content": text}]
        fields = {"model": self.settings.model, "messages": messages, "temperature": 0, "max_tokens": 512}
        body = {name: value for name, value in (fields | self.settings.request).items() if value is not None}
        content = self._posted(json.dumps(body).encode())
        try:
            message = json.loads(content)["choices"][0]["message"]
            said = message["content"]
            if said is None:  # it declined, or thought until its tokens ran out: a verdict that is none
                said = message.get("refusal") or ""
            assert isinstance(said, str)
            return said
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
            start = " ".join(content[:80].decode("utf-8", "replace").split())
            raise self._error(f"it answered {start!r}, no chat completion", "Check the address") from None

    def _posted(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.settings.url}/chat/completions", body, headers)
        for attempt in range(self.settings.retries + 1):
            last, wait = attempt == self.settings.retries, 2.0**attempt
            try:
                return self._read(request)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _BUSY or last:
                    do = f"Check {KEY}" if error.code in (401, 403) else "Check url and model"
                    raise self._error(f"it answers {error.code} {error.reason}", do) from None
                wait = _seconds(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a key that is no header
                if last or isinstance(error, ValueError):
                    raise self._error(_why(error, self.settings.timeout), "Check that it runs, and url") from None
            time.sleep(wait)
        raise AssertionError

    def _read(self, request: urllib.request.Request) -> bytes:
        """The answer's body; the timeout is for all of it."""
        end = time.monotonic() + self.settings.timeout
        with self._opener.open(request, timeout=self.settings.timeout) as response:
            content = b""
            while part := response.read1(1 << 16):
                content += part
                if len(content) > _LARGEST:
                    raise OSError(f"more than {_LARGEST >> 10} KiB")
                if time.monotonic() > end:
                    raise TimeoutError
        return content

    def _error(self, found: str, do: str) -> FfnkitError:
        return FfnkitError(f"judge {self.settings.url}", found, f"{do}; what was judged is kept")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _seconds(header: str | None, usual: float) -> float:
    """How long to wait, a minute at most."""
    return min(float(header), 60.0) if header is not None and header.strip().isdecimal() else usual


def _why(error: BaseException, timeout: float) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, ValueError):
        return f"{KEY} cannot be sent (a line break or another odd character)"
    return f"it cannot be reached ({' '.join(str(inner).split()) or type(inner).__name__})"


class Local:
    """A decoder that is asked how likely each verdict is, so that it always gives one, and always the same."""

    def __init__(self, settings: JudgeSettings, device: Any = "cpu", digest: str = "") -> None:
        self.settings, self.device, self.digest = settings, device, digest
        self._loaded: tuple[Any, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        name = {"files": self.digest} if self.digest else {"model": self.settings.model}
        return name | self.settings.model_dump(include={"instruction", "max_length"})

    def ask(self, prompt: str, first: str, second: str) -> tuple[Verdict, str]:
        import torch

        model, tokenizer = self._model()
        room = self._room(model, tokenizer)
        parts = [self._cut(text, room // 3, tokenizer) for text in (prompt, first, second)]
        asked = self._asked(tokenizer, shown(*parts))
        rows = [self._ids(tokenizer, f"{asked}[[{name}") for name in "ABC"]
        start = next((i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), 0)
        if not start:
            found = "its tokenizer does not tell [[A]], [[B]] and [[C]] apart"
            raise FfnkitError(f"judge {self.settings.model}", found, "Choose another model")
        likely = []
        with torch.inference_mode():
            for ids in rows:
                inputs = torch.tensor([ids], device=self.device)
                logits = model(input_ids=inputs).logits[0, start - 1 : -1].float()
                likely.append(float(logits.log_softmax(-1).gather(-1, inputs[0, start:, None]).sum()))
        best = max(range(3), key=likely.__getitem__)
        told = ", ".join(f"{name} {value:.3f}" for name, value in zip("ABC", likely, strict=True))
        return cast(Verdict, "ABC"[best]), f"log-likelihoods {told}"

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM

            from ffnkit.io.loading import load_pretrained, load_tokenizer

            tokenizer = load_tokenizer(self.settings.model)
            dtype = torch.float32 if str(self.device) == "cpu" else "auto"
            model = load_pretrained(AutoModelForCausalLM, self.settings.model, dtype=dtype).to(self.device).eval()
            self._loaded = model, tokenizer
        return self._loaded

    def _asked(self, tokenizer: Any, text: str) -> str:
        """All that stands before the verdict."""
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": f"{self.settings.instruction}\n\n{text}"}]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return f"{self.settings.instruction}\n\n{text}\n\nVerdict: "

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        special = not getattr(tokenizer, "chat_template", None)  # a template writes its own
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        return ids[:-1] if special and ids and ids[-1] == end else ids

    def _room(self, model: Any, tokenizer: Any) -> int:
        """Tokens for the three texts together."""
        from ffnkit.tasks.encoding.sequences import positions

        limit = min(self.settings.max_length, positions(model))
        room = limit - len(self._ids(tokenizer, f"{self._asked(tokenizer, shown('', '', ''))}[[A]]")) - 8
        if room < 3:
            do = "Raise max_length, shorten the instruction, or choose a model that reads more"
            raise FfnkitError(f"judge {self.settings.model}", f"it reads {limit} tokens, too few for a pair", do)
        return room

    @staticmethod
    def _cut(text: str, room: int, tokenizer: Any) -> str:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return text if len(ids) <= room else str(tokenizer.decode(ids[:room], skip_special_tokens=True))
