"""Instruction tuning: forms of dialogues, chat templates, what is learned, packing; up to the command line."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_generation import byte_level, ffnkit_command, model_of, tokenizer_of
from test_tune import assert_same, killed_at
from tolerance import assert_close, assert_differs
from torch.nn import functional as F

from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import recipe_from
from ffnkit.tasks import GenerationSettings, InstructionTask
from ffnkit.tasks.encoding.collate import Padded
from ffnkit.tasks.encoding.packing import bins, check_model, pack, packed
from ffnkit.tasks.instructions import sets as dialogues
from ffnkit.tasks.instructions import trees
from ffnkit.tasks.instructions.chat import Chat, check_template, template_of
from ffnkit.tasks.instructions.forms import dialogues as table_of_rows
from ffnkit.tasks.running import IGNORED, row_losses

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {{ m['content'] }}<|end|>\n"
    "{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)  # the cue ends in a space, which pieces of words swallow
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% if loop.last %} {{ m['content'] }}{% endif %}<|end|>"
    "{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)  # earlier answers go


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


FOODS = ["Chinese", "Italian", "French", "Indian", "Greek"]
PLACES = ["the riverside", "the centre", "home", "noon"]
ROWS = [said(f"Where is {food} food at {place}?", f"{place} serves {food} food.") for food in FOODS for place in PLACES]
CHAT = said(
    "Where is Aromi?", "Aromi is at the riverside.", "And its food?", "It serves Chinese food.", system="Short."
)


@functools.cache
def tokenizer(kind: str) -> Any:
    """ "gpt2": no template; "llama": <s> before texts, no template; "chatml": a template with an end of turns."""
    if kind == "chatml":
        made = byte_level()
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template, made.pad_token = CHATML, made.eos_token
        return made
    return tokenizer_of(kind)


@functools.cache
def model(kind: str) -> Any:
    return model_of("gpt2" if kind == "chatml" else kind, tokenizer(kind))


def chat(kind: str, template: str | None = None, length: int = 128, most: int = 32) -> Chat:
    return Chat(tokenizer(kind), model(kind), length, most, template)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.suffix == ".json"
    path.write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(rows: list[Any], folder: Path, **more: Any) -> InstructionTask:
    return tasks.instruction_task(write(folder / "rows.jsonl", [{"messages": row} for row in rows]), **more)


# Forms ----------------------------------------------------------------------------------------------------------------


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def test_every_form_gives_the_same_dialogues() -> None:
    whole = [*said("Add.\n\n1 and 2", "3"), *said("Thanks")]  # what nobody answers goes
    forms = {
        "messages": [{"messages": whole}],
        "alpaca": [{"instruction": "Add.", "input": " 1 and 2", "output": "3 "}],
        "without input": [{"instruction": "Add.\n\n1 and 2", "output": "3"}],
        "seed tasks": [{"instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}]}],
        "completion": [{"prompt": "Add.\n\n1 and 2", "completion": "3"}],
        "completion in messages": [{"prompt": whole[:1], "completion": whole[1:2]}],
    }
    for name, rows in forms.items():
        table, dropped = table_of_rows(columns(rows), "rows")
        assert table["messages"] == [said("Add.\n\n1 and 2", "3")] and dropped == 0, name
        assert table["prompt"] == ["Add.\n\n1 and 2"] and table["references"] == [["3"]]
    table, _ = table_of_rows(columns([{"instruction": "Add.", "output": "3", "system": "Count."}]), "rows")
    assert table["messages"] == [said("Add.", "3", system="Count.")]
    assert table["prompt"] == ["system: Count.\nuser: Add."]


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"question": "a", "answer": "b"}], "no column 'messages'"),
        ([{"messages": said("a", "b")}, {"messages": [{"role": "tool", "content": "a"}]}], "row 2 first"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "are no dialogues"),
        ([{"instruction": "a", "output": 3}], "are no dialogues"),
        ([{"instruction": None, "output": "b"}], "are no dialogues"),
    ],
)
def test_rows_that_are_no_dialogues_are_refused(rows: list[dict[str, Any]], part: str) -> None:
    with pytest.raises(FfnkitError) as error:
        table_of_rows(columns(rows), "rows")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}", "output": str(n) if n % 4 else " "} for n in range(40)]
    splits = tasks.instruction_task(write(tmp_path / "a.json", rows)).splits(dev=4)
    assert splits.notes[0] == "train: 10 rows without an answer left out"
    assert len(splits.train) + len(splits.dev) + len(splits.report) == 30


def test_splits_share_no_prompt(tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS[:3], said(ROWS[4][0]["content"], "another answer")]
    held = write(tmp_path / "held.jsonl", [{"messages": row} for row in ROWS[15:]])
    splits = task_of(rows, tmp_path, validation=held).splits(dev=3)
    parts = [set(part["prompt"]) for part in (splits.train, splits.dev, splits.report)]
    assert [len(part) for part in parts] == [12, 3, 5] and len(set.union(*parts)) == 20
    assert splits.notes[:2] == (
        "train: 4 repeated prompts dropped",
        "train: 5 dialogues dropped that are in report",
    )


# Message trees --------------------------------------------------------------------------------------------------------


def node(name: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "message_id": name, "parent_id": parent, "role": role, "text": f"text of {name}", "rank": rank, "lang": "en",
        "deleted": False, "message_tree_id": name[0], **more,
    }  # fmt: skip


def forest() -> list[dict[str, Any]]:
    """Message rows as of OpenAssistant: a tree with ranks, one in German, one without an answer."""
    return [
        node("a", None, "prompter"),
        node("a1", "a", "assistant", 1),
        node("a2", "a", "assistant", 0),
        node("a0", "a", "assistant", 0, deleted=True),
        node("a21", "a2", "prompter"),
        node("a22", "a2", "prompter", 0),
        node("a221", "a22", "assistant"),
        node("a11", "a1", "prompter", 0),
        node("b", None, "prompter", lang="de"),
        node("b1", "b", "assistant", lang="de"),
        node("c", None, "prompter"),
    ]


def nested(rows: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    """The same as whole trees."""
    mine = [row for row in rows if row["parent_id"] == parent]
    plain = [{name: value for name, value in row.items() if name != "parent_id"} for row in mine]
    return [{**row, "replies": nested(rows, row["message_id"])} for row in plain]


def texts(messages: list[dict[str, str]]) -> list[str]:
    return [each["content"].removeprefix("text of ") for each in messages]


def test_the_best_ranked_path_of_each_tree() -> None:
    rows = forest()
    whole = [{"message_tree_id": row["message_id"], "prompt": row} for row in nested(rows)]
    for table in (columns(rows), columns(whole)):
        paths = trees.best_paths(table, ("en",))
        assert [texts(each) for each in paths] == [["a", "a2", "a22", "a221"], ["c"]]
        assert [each["role"] for each in paths[0]] == ["user", "assistant"] * 2
        assert [texts(each) for each in trees.best_paths(table, ())][1] == ["b", "b1"]
    for row in rows:  # the control: other ranks, another path
        row["rank"] = {"a1": 0, "a2": 1}.get(row["message_id"], row["rank"])
    assert texts(trees.best_paths(columns(rows), ("en",))[0]) == ["a", "a1", "a11"]


def test_trees_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(FfnkitError, match="columns are 'text'"):
        trees.best_paths({"text": ["a"]}, ())
    with pytest.raises(FfnkitError, match="role 'tool'"):
        trees.best_paths(columns([node("a", None, "tool")]), ())
    with pytest.raises(FfnkitError, match="no language"):
        tasks.get("oasst1:")


def many_trees(count: int, first: int = 0, lang: str = "en") -> list[dict[str, Any]]:
    rows = []
    for n in range(first, first + count):
        rows += [node(f"{lang}{n}", None, "prompter", lang=lang), node(f"{lang}{n}x", f"{lang}{n}", "assistant", 0)]
    return rows


def test_named_tasks_in_a_data_folder(tmp_path: Path) -> None:
    write(tmp_path / "oasst1" / "train.jsonl", [*many_trees(30), *many_trees(12, lang="de")])
    write(tmp_path / "oasst1" / "validation.jsonl", [*many_trees(5, 90), *many_trees(3, 90, "de")])
    sizes = {"oasst1": (30, 5), "oasst1:de": (12, 3), "oasst1:de,en": (42, 8), "oasst1:all": (42, 8)}
    for name, (train, report) in sizes.items():
        splits = tasks.get(name).splits(tmp_path, dev=4)
        assert (len(splits.train) + 4, len(splits.report)) == (train, report)
    with pytest.raises(FfnkitError, match="no dialogue"):
        tasks.get("oasst1:fr").splits(tmp_path)
    demo = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(40)]
    write(tmp_path / "alpaca_demo" / "alpaca_en_demo.json", demo)
    splits = tasks.get("alpaca_demo").splits(tmp_path, dev=4)
    assert not splits.extra and len(splits.report) == 10 and splits.train[0]["messages"][0]["role"] == "user"
    seeds = [{"instruction": "Say 3", "instances": [{"input": "", "output": "three"}]}]
    write(tmp_path / "alpaca_demo" / "seed_tasks.jsonl", seeds)
    splits = tasks.get("alpaca_demo").splits(tmp_path, dev=4)
    assert len(splits.extra["seed_tasks"]) == 1 and "Say 3" not in [*splits.train["prompt"], *splits.dev["prompt"]]
    with pytest.raises(FfnkitError, match="no folder alpaca_demo"):
        tasks.get("alpaca_demo").splits(tmp_path / "oasst1")


# Templates ------------------------------------------------------------------------------------------------------------


def test_the_tokenizers_own_template_comes_first(tmp_path: Path) -> None:
    assert template_of(None, tokenizer("chatml")) == CHATML
    assert "### Response:" in template_of(None, tokenizer("gpt2"))
    assert "Assistant:" in template_of("roles", tokenizer("chatml"))
    assert template_of(SPACED, tokenizer("chatml")) == SPACED
    (tmp_path / "chat.jinja").write_text(SPACED)
    assert check_template(str(tmp_path / "chat.jinja")) == SPACED
    with pytest.raises(FfnkitError, match="alpaca or roles"):
        check_template("chatml")


def test_our_templates_as_text() -> None:
    told = chat("llama", "alpaca").rendered([CHAT], cue=False)[0]
    assert told == (
        "<s>Short.\n\n### Instruction:\nWhere is Aromi?\n\n### Response:\nAromi is at the riverside.</s>\n\n"
        "### Instruction:\nAnd its food?\n\n### Response:\nIt serves Chinese food.</s>"
    )
    asked = chat("gpt2", "roles").rendered([CHAT[:-1]], cue=True)[0]
    assert asked == (
        "Short.\nUser: Where is Aromi?\nAssistant: Aromi is at the riverside.<|end|>\nUser: And its food?\nAssistant:"
    )


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer("gpt2").save_pretrained(tmp_path / "plain")
    task = task_of(ROWS, tmp_path, template="roles")
    task.load_tokenizer(tmp_path / "plain").save_pretrained(tmp_path / "tuned")
    again = task_of(ROWS, tmp_path).load_tokenizer(tmp_path / "tuned")
    assert "Assistant:" in again.chat_template
    assert "### Response:" in task_of(ROWS, tmp_path).load_tokenizer(tmp_path / "plain").chat_template


def test_templates_that_do_not_work_are_said() -> None:
    for template, part in (
        ("{{ raise_exception('no\nsystem') }}", "refuses a dialogue (no system)"),
        ("{% for %}", "refuses a dialogue"),
        ("{% if add_generation_prompt %}one{% else %}two{% endif %}", "does not begin where"),
    ):
        with pytest.raises(FfnkitError) as error:
            chat("gpt2", template).turns([CHAT])
        assert part in str(error.value) and "\n" not in str(error.value)


# What is learned ------------------------------------------------------------------------------------------------------

CASES = [("gpt2", None), ("gpt2", "roles"), ("llama", None), ("llama", "roles"), ("chatml", None), ("gpt2", SPACED)]


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_turns_are_learned_behind_the_tokens_of_their_prompts(kind: str, template: str | None) -> None:
    """Each answer stands behind its prompt as it is tokenized alone; only it and its end are targets."""
    reader = chat(kind, template)
    tok = tokenizer(kind)
    for dialogue in (CHAT, *ROWS[:4]):
        data = reader.turns([dialogue])
        found = [
            (ids[:start], labels[start:stop])
            for ids, labels in ((row["input_ids"], row["labels"]) for row in data)
            for start, stop in spans(labels)
        ]
        answers = [place for place, each in enumerate(dialogue) if each["role"] == "assistant"]
        assert len(found) == len(answers)
        for place, (before, target) in zip(answers, found, strict=True):
            assert before == reader.openings([dialogue[:place]])[0].ids
            assert (
                before == tok(reader.rendered([dialogue[:place]], cue=True)[0], add_special_tokens=False)["input_ids"]
            )
            assert target[-1] == reader.end and target.count(reader.end) == 1
            assert tok.decode(target[:-1]).strip() == dialogue[place]["content"]
        for row in data:
            assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def spans(labels: list[int]) -> list[tuple[int, int]]:
    """Where targets begin and end."""
    edges = [place for place in range(len(labels) + 1) if known(labels, place) != known(labels, place - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def known(labels: list[int], place: int) -> bool:
    return 0 <= place < len(labels) and labels[place] != IGNORED


def test_pieces_of_words_across_a_prompts_end() -> None:
    """The control: tokenized as a whole, a cue that ends in a space is no beginning of the dialogue."""
    reader, tok = chat("gpt2", SPACED), tokenizer("gpt2")
    ask, answer = ROWS[0][:1], ROWS[0]
    prompt = reader.openings([ask])[0].ids
    whole = tok(reader.rendered([answer], cue=False)[0])["input_ids"]
    assert whole[: len(prompt)] != prompt
    row = reader.turns([answer])[0]
    assert row["input_ids"][: len(prompt)] == prompt
    assert tok.decode(row["input_ids"]) == reader.rendered([answer], cue=False)[0].removesuffix("\n")
    # A prompt masked by its own length would leave a target in it, or hide one.
    naive = [IGNORED] * len(prompt) + whole[len(prompt) :]
    assert [label for label in naive if label != IGNORED] != [label for label in row["labels"] if label != IGNORED]


def test_a_template_may_end_turns_by_its_own_token() -> None:
    reader, tok = chat("chatml"), tokenizer("chatml")
    assert reader.end == tok.convert_tokens_to_ids("<|im_end|>") != tok.eos_token_id
    assert chat("gpt2").end == tokenizer("gpt2").eos_token_id
    endless = SPACED.replace("<|end|>", "")
    row = chat("gpt2", endless).turns([ROWS[0]])[0]
    assert row["labels"][-1] == tokenizer("gpt2").eos_token_id  # none in the template: the tokenizer's
    # A prompt that has no end in it cannot follow on tokens that have: each turn has an example of its own.
    assert len(chat("gpt2", endless).turns([CHAT])) == 2 and len(reader.turns([CHAT])) == 1


def test_a_tuned_model_stops_at_the_end_of_turns(tmp_path: Path) -> None:
    task = task_of(ROWS, tmp_path)
    for kind, stops in (("chatml", [0, chat("chatml").end]), ("gpt2", 0)):
        model(kind).save_pretrained(tmp_path / kind)
        tokenizer(kind).save_pretrained(tmp_path / kind)
        made = task.load_model(tmp_path / kind, tokenizer=task.load_tokenizer(tmp_path / kind))
        assert made.generation_config.eos_token_id == stops


def test_a_template_that_rewrites_earlier_turns_gets_examples_for_each() -> None:
    reader, tok = chat("gpt2", FORGETFUL), tokenizer("gpt2")
    assert len(reader.turns([ROWS[0]])) == 1
    rows = reader.turns([CHAT])
    assert [tok.decode([label for label in row["labels"] if label != IGNORED]) for row in rows] == [
        " Aromi is at the riverside.<|end|>",
        " It serves Chinese food.<|end|>",
    ]
    assert tok.decode(rows[1]["input_ids"]).count("Aromi is at") == 0


def test_long_dialogues_are_cut() -> None:
    reader, tok = chat("gpt2", "roles", length=32, most=8), tokenizer("gpt2")
    long = said("begin " + "and on " * 40 + "end", "Yes.")
    row = reader.turns([long])[0]
    prompt = reader.openings([long[:1]])[0].ids
    assert len(prompt) == 24 and row["input_ids"][:24] == prompt and len(row["input_ids"]) <= 32
    assert tok.decode(prompt).startswith("User: b") and tok.decode(prompt).endswith("d\nAssistant:")
    assert [label for label in row["labels"] if label != IGNORED] == row["input_ids"][24:]
    talk = reader.turns([said("Hi", "Yes. " * 40)])[0]
    assert len(talk["input_ids"]) == 32 and talk["labels"][-1] != reader.end  # its end is cut, so none is learned


def test_every_example_keeps_a_target() -> None:
    many = said(*[f"Aromi serves {food} food" for food in FOODS * 2])
    for template in ("roles", SPACED.replace("<|end|>", "")):  # one example, one of each turn
        data = chat("gpt2", template, length=16, most=4).turns([many])
        assert len(data) == (1 if template == "roles" else 5)
        assert all(len(row["labels"]) <= 16 and set(row["labels"]) != {IGNORED} for row in data)


def test_the_loss_is_that_of_the_assistants_tokens() -> None:
    reader, net = chat("llama"), model("llama")
    rows = list(reader.turns([CHAT, *ROWS[:3]]))
    batch = Padded(tokenizer("llama").pad_token_id)(rows)
    with torch.no_grad():
        losses, counts = row_losses(net, batch)
        for row, loss, count in zip(rows, losses, counts, strict=True):
            logits = net(torch.tensor([row["input_ids"]])).logits[0].double()
            likely = F.log_softmax(logits, -1)
            at = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
            wanted = -sum(likely[place - 1, row["input_ids"][place]] for place in at)
            assert count == len(at)
            assert_close(loss, torch.as_tensor(wanted), rel=1e-5)
            every = -likely[torch.arange(len(logits) - 1), row["input_ids"][1:]].sum()
            assert_differs(loss, every)


def test_answers_that_were_learned_are_written(tmp_path: Path) -> None:
    """Template, targets, their end and decoding fit together; trained on packed rows."""
    task = task_of(ROWS, tmp_path, metrics=("exact_match",))
    splits = task.splits(dev=4)
    picked = splits.train.select(range(4))
    splits = replace(splits, train=picked)
    tok = tokenizer("llama")
    net = model_of("llama", tok)
    before = tune.evaluate(net, tok, task, picked, max_length=96)
    settings = tune.TrainSettings(
        learning_rate=1e-2, steps=80, batch_size=2, max_length=96, keep_best=False, schedule="constant", packing=True
    )
    result = tune.train(net, tok, task, splits, settings, out_dir=tmp_path / "run", progress=False)
    after = tune.evaluate(result.model, tok, task, picked, max_length=96)
    assert before["exact_match"] == 0 and after["exact_match"] == 100 and after["perplexity"] < 1.3


def test_perplexity_alone_writes_nothing(tmp_path: Path) -> None:
    task = task_of(ROWS, tmp_path, metrics=("perplexity",))
    report = task.splits(dev=3).report
    found = tune.assess(model("gpt2"), tokenizer("gpt2"), task, report, max_length=64)
    assert set(found.to_dict()) == {"perplexity", "loss"} and not found.predictions
    more = task.with_metrics(("chrf",))
    short = GenerationSettings(max_new_tokens=4)
    found = tune.assess(model("gpt2"), tokenizer("gpt2"), more, report, max_length=64, generation=short)
    assert more.main_metric == "chrf" and set(found.to_dict()) == {"chrf", "perplexity", "loss"}
    assert [row["prompt"] for row in found.predictions] == report["prompt"]
    assert task.dev_metric == "loss"


# Packing --------------------------------------------------------------------------------------------------------------


def test_rows_are_filled() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (200,), generator=draw).tolist()
    rows = bins(sizes, 32)
    assert sorted(i for row in rows for i in row) == list(range(200))
    loads = [sum(sizes[i] for i in row) for row in rows]
    assert max(loads) <= 32 and len(rows) * 32 < 1.1 * sum(sizes) and rows == sorted(rows)
    assert bins([40, 3], 32) == [[0], [1]] and bins([16, 32, 16], 32) == [[0, 2], [1]] and bins([], 8) == []


PACKED = ["gpt2", "llama", "mistral", "qwen3", "gemma", "gemma3", "gpt-neox", "phi", "mixtral", "gptj"]


def examples(count: int = 6) -> Any:
    from datasets import Dataset

    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 40, (int(size),), generator=draw).tolist() for size in (5, 11, 3, 8, 6, 13)[:count]]
    return Dataset.from_dict({"input_ids": rows, "labels": [[IGNORED, IGNORED, *row[2:]] for row in rows]})


def mean_loss(net: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the target tokens of one batch in float64, and its gradient as one vector."""
    net.zero_grad()
    batch = Padded(1)(rows)
    labels = batch.pop("labels")
    logits = net(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [name for name in PACKED if name in FAMILIES])
def test_packed_examples_have_the_loss_of_examples_alone(name: str) -> None:
    net = FAMILIES[name].model().double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that attention matters
    data = examples()
    check_model(net, data)
    rows = packed(data, 20)
    assert len(rows) == 3 and rows["position_ids"][0][:6] in ([0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5])
    loss, gradient = mean_loss(net, list(rows))
    alone, expected = mean_loss(net, list(data))
    assert_close(loss, alone, rel=1e-9)
    assert_close(gradient, expected, rel=1e-7)
    # The control: with a mask in place of positions the examples of a row see each other.
    joined, _ = mean_loss(net, list(rows.remove_columns("position_ids")))
    assert_differs(joined, alone, rel=1e-5)


def test_the_first_token_of_an_example_is_no_target() -> None:
    data = examples()
    whole = data.map(lambda row: {"labels": row["input_ids"]})
    net = FAMILIES["llama"].model().double()
    assert_close(mean_loss(net, list(packed(whole, 30)))[0], mean_loss(net, list(whole))[0], rel=1e-9)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    task = task_of(ROWS, tmp_path)
    refused = {"bloom": "takes no positions", "opt": "does not keep the examples", "t5": "encoder-decoder"}
    for name, part in refused.items():
        with pytest.raises(FfnkitError, match=part):
            pack(FAMILIES[name].model(), task, examples(), 20)
    leaky = FAMILIES["llama"].model()
    forward = leaky.forward

    def deaf(*args: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(*args, **more)

    leaky.forward = deaf  # takes positions, and does not heed them
    with pytest.raises(FfnkitError, match="apart"):
        check_model(leaky, examples())
    with pytest.raises(FfnkitError, match="targets of tokens"):
        pack(FAMILIES["bert"].model(), tasks.get("sst2"), examples().remove_columns("labels").add_column(
            "labels", [0] * 6), 20)  # fmt: skip
    assert "packing" not in tune.TrainSettings().model_dump()
    assert tune.TrainSettings(packing=True).model_dump()["packing"] is True


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_packed_training_goes_on_where_it_was_killed(
    tuner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(ROWS, tmp_path, metrics=("perplexity",))
    splits, tok = task.splits(dev=4), tokenizer("gpt2")

    def run(folder: str, **more: Any) -> Any:
        given = {"learning_rate": 1e-2, "steps": 6, "batch_size": 2, "max_length": 100, "eval_every": 2, **more}
        settings = tune.TrainSettings(**{"packing": True, **given})
        net = model_of("gpt2", tok)
        return tune.train(net, tok, task, splits, settings, tuner=tuner, out_dir=tmp_path / folder, progress=False)

    whole = run("whole")
    killed_at(4, monkeypatch, lambda: run("killed"))
    assert_same(run("killed").model, whole.model)
    plain = run("plain", packing=False)
    first, other = (torch.cat([p.flatten() for p in each.model.parameters()]) for each in (whole, plain))
    assert_differs(first, other, rel=1e-6)
    assert whole.best_metric is not None and whole.best_metric < 8


def test_a_packed_step_is_a_step_of_all_its_examples(tmp_path: Path) -> None:
    """One step on all rows at once, packed or not, gives the same weights."""
    task = task_of(ROWS[:8], tmp_path, metrics=("perplexity",))
    splits, tok = task.splits(dev=2), tokenizer("gpt2")

    def weights(batch: int, packing: bool) -> torch.Tensor:
        net = model_of("gpt2", tok, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
        settings = tune.TrainSettings(
            learning_rate=1e-2, steps=1, batch_size=batch, max_length=100, keep_best=False, packing=packing,
            schedule="constant", warmup=0.0, optimizer="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        out = tmp_path / f"{batch}-{packing}"
        found = tune.train(net, tok, task, splits, settings, out_dir=out, progress=False).model
        return torch.cat([p.flatten() for p in found.parameters()])

    start = torch.cat([p.flatten() for p in model_of("gpt2", tok).double().parameters()])
    both = weights(16, True), weights(16, False)
    assert_close(both[0] - start, both[1] - start, rel=1e-6)
    assert_differs(weights(1, True) - start, both[1] - start)  # a row of several examples only


# Choosing, the recipe, the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model("gpt2").save_pretrained(folder)
    tokenizer("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write(folder / "chats.jsonl", [{"messages": row, "id": n} for n, row in enumerate(ROWS)])
    alpaca = [{"instruction": row[0]["content"], "output": row[1]["content"]} for row in ROWS]
    write(folder / "alpaca.json", alpaca)
    write(folder / "pairs.jsonl", [{"prompt": row["instruction"], "completion": row["output"]} for row in alpaca])
    write(folder / "trees.jsonl", many_trees(20))
    write(folder / "other.jsonl", [{"question": "a", "answer": "b"}])
    (folder / "alpaca.csv").write_text("instruction,input,output\n" + "".join(f"Say {n},,{n}\n" for n in range(20)))
    return folder


def test_columns_tell_dialogues(files: Path) -> None:
    for name in ("chats.jsonl", "alpaca.json", "pairs.jsonl", "trees.jsonl", "alpaca.csv"):
        for kind in (None, "instruction"):
            task = tasks.choose(train=files / name, kind=kind)
            assert isinstance(task, InstructionTask) and task.kind == "instruction", name
    assert tasks.choose(train=files / "pairs.jsonl", inputs=("prompt",), target="completion").kind == "generation"
    assert tasks.choose(train=files / "chats.jsonl").metrics == ("perplexity", "rougeL", "chrf")
    task: Any = tasks.choose(train=files / "chats.jsonl", template="roles", metric="chrf,bleu")
    assert task.template == "roles" and task.main_metric == "chrf"
    named: Any = tasks.choose(name="alpaca_demo", template="roles", metric="perplexity")
    assert named.template == "roles" and named.metrics == ("perplexity",)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"train": "other.jsonl"}, "messages; instruction"),
        ({"train": "other.jsonl", "kind": "instruction"}, "no column 'messages'"),
        ({"train": "chats.jsonl", "kind": "instruction", "label": "id"}, "label"),
        ({"train": "chats.jsonl", "template": "chatml"}, "chatml"),
        ({"train": "chats.jsonl", "metric": "accurate"}, "accurate"),
        ({"name": "e2e", "template": "roles"}, "not both"),
        ({"name": "alpaca_demo", "template": "no"}, "no chat template"),
        ({"name": "alpaca_demo", "kind": "instruction"}, "not both"),
        ({"name": "oasst2"}, "oasst1"),
    ],
)
def test_choices_that_do_not_fit_are_said(fields: dict[str, Any], part: str, files: Path) -> None:
    given = {name: files / value if name == "train" else value for name, value in fields.items()}
    with pytest.raises(FfnkitError) as error:
        tasks.choose(**given)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_encoder_decoders_are_refused(files: Path, tmp_path: Path) -> None:
    FAMILIES["t5"].model().save_pretrained(tmp_path)
    with pytest.raises(FfnkitError, match="encoder-decoder"):
        tasks.choose(train=files / "chats.jsonl").load_model(tmp_path)


def test_tune_and_eval(files: Path, saved: Path, tmp_path: Path) -> None:
    data = ("--train-file", files / "chats.jsonl")
    short = ("--max-length", 100, "--generation-set", "max_new_tokens=8")
    options = ("--template", "roles", "--packing", "--steps", 2, "--out", tmp_path / "out")
    report = ffnkit_command("tune", saved, *data, *short, *options)
    assert set(report["metrics"]) == {"rougeL", "chrf", "perplexity", "loss"} and report["settings"]["packing"] is True
    assert "Assistant:" in (tmp_path / "out" / "chat_template.jinja").read_text()
    wrote = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    again = ffnkit_command(
        "eval", tmp_path / "out", *data, "--split", "report", *short, "--predictions", tmp_path / "again.jsonl"
    )
    assert again["metrics"] == pytest.approx(report["metrics"], rel=1e-4) and len(wrote) == report["rows"]
    assert (tmp_path / "again.jsonl").read_text().splitlines() == wrote
    other = ffnkit_command("eval", tmp_path / "out", *data, *short, "--template", "alpaca")
    assert other["metrics"]["loss"] != pytest.approx(report["metrics"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_recipes_tune_by_instructions(files: Path, saved: Path, tmp_path: Path) -> None:
    from ffnkit.recipe import run

    data = {
        "name": "chats",
        "model": str(saved),
        "task": {"train": str(files / "alpaca.json"), "template": "roles"},
        "stages": ["tune", "evaluate"],
        "arms": {"full": {}, "ffn": {"tuner": "ffn"}, "lora": {"tuner": "lora"}},
        "generation": {"max_new_tokens": 4},
        "tune": {"learning_rate": 3e-3, "steps": 2, "batch_size": 2, "max_length": 100, "packing": True},
        "export": "none",
        "measure": {"latency": False},
    }
    results = run(recipe_from(data), tmp_path / "out", progress=False, isolate=False)
    assert results.ok, results.failed
    assert results.metric == "perplexity" and set(results.rows[0]["metrics"]) == {"perplexity", "rougeL", "chrf"}
    for task in ("oasst1:de", "alpaca_demo", {"name": "alpaca_demo", "template": "roles"}):
        recipe_from({**data, "task": task})
    with pytest.raises(FfnkitError, match=r"task\.kind"):
        recipe_from({**data, "task": {"train": "a.jsonl", "kind": "instructions"}})


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("FFNKIT_DATA" not in os.environ, reason="needs FFNKIT_DATA")
def test_the_real_instructions() -> None:
    if not (Path(os.environ["FFNKIT_DATA"]) / "alpaca_demo").is_dir():
        pytest.skip("no alpaca_demo")
    splits = dialogues.get("alpaca_demo").splits()
    assert len(splits.train["prompt"]) + len(splits.dev["prompt"]) + len(splits.report["prompt"]) == 985
    assert len(splits.extra["seed_tasks"]["prompt"]) == 175
