"""Small models and rows under the names that the pages use, so that their blocks run as pasted, offline.

A model of the hub is a folder of that name: random weights, as many layers as the pages speak of, a real tokenizer.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
import transformers as T

WORDS = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 12}
BERTS = ("roberta-base", "bert-base-uncased", "small", "tuned", "big-tuned", "tuned-mnli", "tuned-cola", "MODEL")
STORIES = ("llama", "model", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M-Instruct")


def stand_in(root: Path, minilm: Path, stories: Path, data: Path) -> None:
    """Put models, rows and files below ``root``."""
    tokens = T.AutoTokenizer.from_pretrained(minilm)
    sizes = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id}
    torch.manual_seed(0)
    bert = T.BertForSequenceClassification(T.BertConfig(**sizes, **WORDS))
    for name in BERTS:
        _store(root / name, bert, tokens)
    _store(root / "tuned-mnli", T.BertForSequenceClassification(T.BertConfig(**sizes, **WORDS, num_labels=3)), tokens)
    for name in STORIES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(stories, root / name)
    own = T.AutoTokenizer.from_pretrained(stories)
    ids = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id}
    gpt2 = T.GPT2Config(vocab_size=len(own), n_embd=16, n_head=4, n_layer=12, n_positions=512, **ids)
    _store(root / "gpt2", T.GPT2LMHeadModel(gpt2), own)
    ends = T.AutoTokenizer.from_pretrained(minilm)
    ends.eos_token, ends.bos_token = ends.sep_token, ends.cls_token
    two = sizes | {"eos_token_id": ends.eos_token_id, "decoder_start_token_id": ends.pad_token_id}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "num_layers": 2}
    _store(root / "t5-small", T.T5ForConditionalGeneration(T.T5Config(**two, **t5)), ends)
    sparse = {
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "num_experts": 4,
        "router_jitter_noise": 0.0,
    }
    switch = t5 | {"num_layers": 12, "num_decoder_layers": 12, **sparse}
    switched = T.SwitchTransformersForConditionalGeneration(T.SwitchTransformersConfig(**two, **switch))
    _store(root / "switch-base-16", switched, ends)
    bart = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
    for name in ("Helsinki-NLP/opus-mt-en-de", "opus-mt-de-en"):
        _store(root / name, T.MarianMTModel(T.MarianConfig(**two, **bart, **heads)), ends)
    seen = {**WORDS, "image_size": 32, "patch_size": 16}
    for name in ("google/vit-base-patch16-224", "facebook/deit-small-patch16-224"):
        _store(root / name, T.ViTForImageClassification(T.ViTConfig(**seen)), T.ViTImageProcessor(size=32))
    _rows(root, data)
    _files(root, data)


def _store(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(root: Path, data: Path) -> None:
    """The first rows of each data set."""
    for name, count in {"sst2": 48, "e2e": 12, "webnlg": 12, "multi30k": 12, "mnli": 12, "cola": 12}.items():
        (root / "data" / name).mkdir(parents=True)
        for file in sorted((data / name).glob("*.jsonl")):
            with file.open(encoding="utf-8") as lines:
                text = "".join(itertools.islice(lines, count))
            (root / "data" / name / file.name).write_text(text, encoding="utf-8")
    for name in ("wikitext2", "alpaca_demo"):
        (root / "data" / name).mkdir()
        for file in (data / name).iterdir():
            text = file.read_text(encoding="utf-8")
            short = json.dumps(json.loads(text)[:16]) if file.suffix == ".json" else "\n".join(text.split("\n")[:600])
            (root / "data" / name / file.name).write_text(short, encoding="utf-8")
    (root / "data" / "cifar10").mkdir()
    for part in ("train", "test"):
        with (
            tarfile.open(data / "cifar10" / f"{part}.tar") as old,
            tarfile.open(root / "data/cifar10" / f"{part}.tar", "w") as new,
        ):
            for member in itertools.islice((m for m in old if m.isfile()), 24):
                file = old.extractfile(member)
                assert file is not None
                content = file.read()
                new.addfile(member, io.BytesIO(content))
                kind = root / "photos" / part / ("cats", "dogs")[len(list((root / "photos").rglob("*.*"))) % 2]
                kind.mkdir(parents=True, exist_ok=True)
                (kind / Path(member.name).name).write_bytes(content)


def _said(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


def _files(root: Path, data: Path) -> None:
    with (data / "tinystories" / "train.jsonl").open(encoding="utf-8") as lines:
        stories = [json.loads(line)["text"] for line in itertools.islice(lines, 60)]
    for name in ("notes.txt", "book.txt"):
        (root / name).write_text("\n\n".join(stories), encoding="utf-8")
    answers = {"answer": "a cat", "answers": ["a cat"]}
    table = {
        "chats.jsonl": [{"messages": [{"role": "user", "content": s[:40]}, _said(s[40:90])]} for s in stories],
        "news.jsonl": [{"article": s[:120], "summary": s[:30]} for s in stories[:12]],
        "qa.jsonl": [{"question": "who?", "context": s[:80], **answers} for s in stories[:12]],
        "pairs.jsonl": [{"translation": {"en": s[:40], "de": s[:30]}} for s in stories[:12]],
    }  # fmt: skip
    for name, rows in table.items():
        (root / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    csv = {
        "reviews.csv": ("text,stars,body", lambda s, i: f'"{s}",{i % 3},"{s}"'),
        "held-out.csv": ("text,stars,body", lambda s, i: f'"{s}",{i % 3},"{s}"'),
        "train.csv": ("question,answer,helpful", lambda s, i: f'"{s}","{s}",{i % 2}'),
        "test.csv": ("question,answer,helpful", lambda s, i: f'"{s}","{s}",{i % 2}'),
    }
    for name, (head, row) in csv.items():
        part = stories[48:] if name in ("held-out.csv", "test.csv") else stories[:48]
        short = [" ".join(s[:60].replace('"', "").split()) for s in part]
        (root / name).write_text("\n".join([head, *(row(s, i) for i, s in enumerate(short))]) + "\n", encoding="utf-8")
