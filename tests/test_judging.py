"""Free answers compared pair by pair: both orders, ties, a judge at an address or on this machine, resumed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generation import byte_level
from transformers import GPT2Config, GPT2LMHeadModel

from ffnkit.errors import FfnkitError
from ffnkit.recipe import judging as stage
from ffnkit.recipe import run as run_recipe
from ffnkit.recipe.schema import recipe_from
from ffnkit.report import judges, judging
from ffnkit.report.judging import Kept, Outcome, Pair, Tally, judged, pairs_of
from ffnkit.tasks.settings import JudgeSettings

# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass
class Says:
    """A judge that answers by a rule, and notes what it was asked."""

    rule: Callable[[str, str], str]
    asked: list[tuple[str, str]] = field(default_factory=list)
    facts: Any = field(default_factory=lambda: {"model": "rule"})
    fails_at: int = 1000

    def ask(self, prompt: str, first: str, second: str) -> tuple[Any, str]:
        if len(self.asked) >= self.fails_at:
            raise FfnkitError("judge", "it is silent", "Wait")
        self.asked.append((first, second))
        return self.rule(first, second), f"I looked at {prompt}"


def pair(answer: str, other: str, row: int = 0) -> Pair:
    return Pair("arm", 0, row, f"prompt {row}", answer, other)


def longer(first: str, second: str) -> str:
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "C"


def test_a_win_is_what_both_orders_say(tmp_path: Path) -> None:
    pairs = [pair("long one", "short"), pair("x", "longest"), pair("abc", "abd"), pair(" same ", "same")]
    fair = Says(longer)
    found = judged(pairs, fair, Kept(tmp_path / "fair"))
    assert found == [Outcome(1), Outcome(-1), Outcome(0), Outcome(0)]
    assert fair.asked == [  # each pair in both orders; equal answers are asked about by nobody
        ("long one", "short"), ("short", "long one"), ("x", "longest"), ("longest", "x"), ("abc", "abd"),
        ("abd", "abc"),
    ]  # fmt: skip
    first = judged(pairs[:2], Says(lambda a, b: "A"), Kept(tmp_path / "first"))
    assert first == [Outcome(0, disagree=True)] * 2  # a judge that likes the first answer says nothing of the arms
    silent = judged(pairs[:1], Says(lambda a, b: ""), Kept(tmp_path / "silent"))
    assert silent == [Outcome(0, unclear=True)]
    half = judged(pairs[:1], Says(lambda a, b: "A" if len(a) > len(b) else "C"), Kept(tmp_path / "half"))
    assert half == [Outcome(0, disagree=True)]  # one order says win, the other tie
    tally = Tally.of([*found, *first, *silent]).to_dict()
    assert tally == {"pairs": 7, "wins": 1, "ties": 5, "losses": 1, "disagree": 2, "unclear": 1, "won": 0.5}
    assert judging.lines({"arm": tally}) == [["arm", "7", "1", "5", "1", "50.0%", "28.6%", "1"]]


def test_what_was_judged_is_kept_and_a_torn_line_is_asked_anew(tmp_path: Path) -> None:
    pairs = [pair(f"answer number {n}", "other", n) for n in range(4)]
    path, whole = tmp_path / "kept.jsonl", tmp_path / "whole.jsonl"
    judged(pairs, Says(longer), Kept(whole))
    with pytest.raises(FfnkitError, match="silent"):
        judged(pairs, Says(longer, fails_at=5), Kept(path))
    assert len(path.read_text().splitlines()) == 5
    with path.open("a") as file:
        file.write('{"key": "torn')
    on = Says(longer)
    assert judged(pairs, on, Kept(path)) == [Outcome(1)] * 4 and len(on.asked) == 3
    assert path.read_bytes() == whole.read_bytes()  # as if nothing had happened
    again = Says(longer)
    judged(pairs, again, Kept(path))
    assert again.asked == []
    other = Says(longer, facts={"model": "another"})
    judged(pairs[:1], other, Kept(path))
    assert len(other.asked) == 2  # verdicts of another judge are not its own


def test_pairs_are_those_of_one_seed_and_prompt() -> None:
    def rows(*texts: str) -> list[dict[str, Any]]:
        return [{"prompt": f"p{n}", "prediction": text} for n, text in enumerate(texts)]

    answers = {0: {"base": rows("a", "b"), "arm": rows("c", "d")}, 1: {"arm": rows("e")}}
    found = pairs_of(answers, "base", None)
    assert [(p.arm, p.seed, p.row, p.answer, p.other) for p in found] == [
        ("arm", 0, 0, "c", "a"),
        ("arm", 0, 1, "d", "b"),
    ]
    assert len(pairs_of(answers, "base", 1)) == 1
    with pytest.raises(FfnkitError, match="other prompts"):
        pairs_of({0: {"base": rows("a"), "arm": rows("a", "b")}}, "base", None)


# --- an address -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible address on this machine; ``answers`` are taken in turn, the last one for good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self.wait = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is no matter."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "silence":
            self.server.wait.wait(5)
            return
        if callable(answer):
            answer = answer(body["messages"][-1]["content"])
        code, text = answer if isinstance(answer, tuple) else (200, answer)
        content = (
            text if code != 200 else json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        )
        self.send_response(code)
        if code in (301, 302, 307, 308):
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(judges.time, "sleep", lambda _: None)
    monkeypatch.delenv("FFNKIT_JUDGE_KEY", raising=False)
    yield made
    made.wait.set()
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    server.answers = ["[[C]]"]
    assert of(server).ask("p", "a", "b")[0] == "C"


def of(server: Server, **settings: Any) -> Any:
    return judges.judge_of(JudgeSettings(model="judge-1", url=f"{server.url}/", **settings))


def test_what_an_address_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = ["A is fine, [[A]] at first, but [[B]]", "no idea"]
    monkeypatch.setenv("FFNKIT_JUDGE_KEY", "secret-key")
    judge = of(server, request={"max_tokens": None, "top_p": 1})
    assert judge.ask("Why?", "Since.", "So.") == ("B", "A is fine, [[A]] at first, but [[B]]")
    assert judge.ask("Why?", "Since.", "So.") == ("", "no idea")
    seen = server.seen[0]
    assert seen["path"] == "/v1/chat/completions" and seen["key"] == "Bearer secret-key"
    assert (seen["model"], seen["temperature"], seen["top_p"]) == ("judge-1", 0, 1) and "max_tokens" not in seen
    assert seen["messages"][1]["content"] == "[Request]\nWhy?\n\n[Answer A]\nSince.\n\n[Answer B]\nSo."
    assert "secret" not in json.dumps(judge.facts)
    monkeypatch.delenv("FFNKIT_JUDGE_KEY")
    judge.ask("Why?", "Since.", "So.")
    assert server.seen[-1]["key"] is None


@pytest.mark.parametrize(
    ("answers", "said", "asked"),
    [
        ([(429, "busy"), (503, ""), "[[A]]"], "", 3),
        ([(500, "")], "it answers 500", 3),
        ([(401, "")], "it answers 401 Unauthorized. Check FFNKIT_JUDGE_KEY", 1),
        ([(404, "")], "it answers 404", 1),
        ([(302, "http://127.0.0.1:1/v1")], "it answers 302", 1),  # the key would go elsewhere
        ([(200, 5)], "no chat completion", 1),
        (["silence"], "no answer within 0.2 s", 3),
    ],
    ids=["busy", "broken", "key", "path", "redirect", "content", "silent"],
)
def test_an_address_that_fails_is_one_line(server: Server, answers: list[Any], said: str, asked: int) -> None:
    server.answers = answers
    judge = of(server, timeout=0.2 if answers == ["silence"] else 20.0)
    if not said:
        assert judge.ask("p", "a", "b")[0] == "A"
    else:
        with pytest.raises(FfnkitError) as error:
            judge.ask("p", "a", "b")
        text = str(error.value)
        assert said in text and "\n" not in text and "what was judged is kept" in text
    assert len(server.seen) == asked


def test_an_answer_without_text_is_a_verdict_that_is_none(server: Server, tmp_path: Path) -> None:
    """A judge that declines one pair does not end the judging; half a pair of surrogates goes into the file as well."""
    server.answers = [(200, None), "[[A]] \ud83d"]
    pairs = [Pair("lora", 0, row, f"p{row}", "good", "bad") for row in range(2)]
    kept = Kept(tmp_path / "kept.jsonl")
    found = judged(pairs, of(server), kept)
    assert [each.unclear for each in found] == [True, False] and len(server.seen) == 4
    assert judged(pairs, of(server), Kept(tmp_path / "kept.jsonl")) == found and len(server.seen) == 4


def test_an_address_where_nobody_is() -> None:
    with pytest.raises(FfnkitError, match=r"judge http://127.0.0.1:1/v1: it cannot be reached \(.*refused"):
        judges.judge_of(JudgeSettings(model="m", url="http://127.0.0.1:1/v1", retries=0)).ask("p", "a", "b")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://user:key@host/v1", "http://h/v1?key=1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        JudgeSettings(model="m", url=url)


# --- a local model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("judge") / "gpt2"
    tokenizer = byte_level()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.6}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    return path


def test_a_local_model_says_what_it_finds_likeliest(decoder: Path) -> None:
    settings = JudgeSettings(model=str(decoder), instruction="Better?", max_length=400)
    judge = judges.judge_of(settings)
    verdict, said = judge.ask("Why?", "Since.", "So.")
    tokenizer, model = byte_level().from_pretrained(decoder), GPT2LMHeadModel.from_pretrained(decoder).eval()
    text = "Better?\n\n[Request]\nWhy?\n\n[Answer A]\nSince.\n\n[Answer B]\nSo.\n\nVerdict: [["
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
    wanted = {name: float(logits[tokenizer.convert_tokens_to_ids(name)]) for name in "ABC"}
    assert verdict == max(wanted, key=wanted.__getitem__)
    assert said == "log-likelihoods " + ", ".join(f"{name} {value:.3f}" for name, value in wanted.items())
    assert judge.ask("Why? " * 500, "Since. " * 500, "So.")[0] in "ABC"  # cut to what it reads
    with pytest.raises(FfnkitError, match="too few for a pair"):
        judges.judge_of(settings.model_copy(update={"max_length": 20})).ask("p", "a", "b")


def test_a_tokenizer_that_knows_no_verdict_is_refused(decoder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    GPT2LMHeadModel.from_pretrained(decoder).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(FfnkitError, match="does not tell"):
        judges.judge_of(JudgeSettings(model=str(tmp_path), max_length=400)).ask("p", "a", "b")


# --- a recipe ---------------------------------------------------------------------------------------------------------


def recipe_at(folder: Path, model: Path, **changes: Any) -> Any:
    rows = [{"q": f"What is {n}?", "a": f"It is {n % 3}."} for n in range(30)]
    for name, part in {"train": rows[:24], "validation": rows[24:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data: dict[str, Any] = {
        "name": "judged",
        "model": str(model),
        "task": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "input": ["q"],
            "target": "a",
        },
        "stages": ["tune", "evaluate"],
        "export": "none",
        "measure": {"latency": False},
        "arms": {"full": {}, "ffn": {"tuner": "ffn", "tune": {"learning_rate": 0.05}}},
        "tune": {"steps": 3, "batch_size": 8, "max_length": 64, "learning_rate": 1e-3},
        "generation": {"max_new_tokens": 6},
    }
    return recipe_from(data | changes)


@pytest.mark.slow
def test_a_recipe_has_its_answers_judged_goes_on_and_stores_no_key(
    server: Server, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFNKIT_JUDGE_KEY", "secret-key")
    out = tmp_path / "out"
    how: dict[str, Any] = {"progress": False, "isolate": False}
    plain = run_recipe(recipe_at(tmp_path, decoder), out, **how)
    assert plain.exit_code == 0 and "judging" not in plain.to_dict() and not server.seen
    page = (out / "report.html").read_text()
    assert "Answers side by side" in page and "What is" in page and "Answers compared" not in page

    judge = {"model": "judge-1", "url": server.url, "retries": 0}
    asked = recipe_at(tmp_path, decoder, judge=judge)  # the units are done: only the judging is added
    server.answers = ["[[A]]", "[[B]]", (500, "")]
    failed = run_recipe(asked, out, **how)
    assert failed.exit_code == 1 and "it answers 500" in failed.to_dict()["judging"]["error"]
    assert "not judged to the end" in (out / "table.md").read_text()
    kept = (out / stage.KEPT).read_text()
    assert len(kept.splitlines()) == 2

    server.answers, server.seen = [lambda text: "[[A]]" if len(text) % 2 else "[[C]]"], []
    done = run_recipe(asked, out, **how)
    found = done.to_dict()["judging"]
    assert done.exit_code == 0 and found["arms"]["ffn"]["pairs"] == 6 and found["against"] == "full"
    assert found["arms"]["ffn"]["wins"] >= 1 and (out / stage.KEPT).read_text().startswith(kept)
    count = len(server.seen)
    assert 0 < count <= 10
    run_recipe(asked, out, **how)
    assert len(server.seen) == count  # nothing is asked twice
    table, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    assert "| ffn | 6 |" in table and "judge-1" in table and "Answers compared" in page and "(better)" in page
    assert not [path for path in out.rglob("*") if path.is_file() and b"secret-key" in path.read_bytes()]
    run_recipe(recipe_at(tmp_path, decoder), out, **how)
    assert "judge-1" not in (out / "table.md").read_text()  # off unless a judge is named


def test_answers_with_odd_line_ends_are_read(decoder: Path, tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x1cfour\nfive"
    for arm in ("full", "ffn"):
        folder = tmp_path / "out" / "units" / arm / "seed-0"
        folder.mkdir(parents=True)
        (folder / "done.json").write_text("{}")
        row = {"prompt": "p", "prediction": text + arm, "references": []}
        (folder / stage.ANSWERS).write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    recipe = recipe_at(tmp_path, decoder)
    assert stage.answers(recipe, tmp_path / "out")[0]["ffn"][0]["prediction"] == text + "ffn"
    assert stage.side_by_side(recipe, tmp_path / "out")[0]["answers"] == {"full": text + "full", "ffn": text + "ffn"}


def test_a_judge_has_to_have_answers_to_judge(decoder: Path, tmp_path: Path) -> None:
    judge = {"model": str(decoder)}
    for changes, said in (
        ({"judge": judge, "arms": {"full": {}}}, "answers of two arms or more"),
        ({"judge": judge, "stages": ["tune"]}, "answers of two arms or more"),
        ({"judge": {"model": "m", "url": "here"}}, "judge.url"),
        ({"judge": {"url": "http://h/v1"}}, "judge.model"),
        ({"judge": {"model": str(tmp_path / "none")}}, "there is no such folder"),
        ({"judge": judge, "task": {"train": str(tmp_path / "book.txt")}}, "writes no answers"),
    ):
        (tmp_path / "book.txt").write_text("\n\n".join(f"A story of {n} cats." for n in range(60)))
        with pytest.raises(FfnkitError) as error:
            run_recipe(recipe_at(tmp_path, decoder, **changes), tmp_path / "out", progress=False, isolate=False)
        assert said in str(error.value) and "\n" not in str(error.value), error.value
