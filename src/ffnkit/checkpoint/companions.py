"""What travels with a model besides weights and config: tokenizer, processors, templates, modules behind it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.io.loading import load_tokenizer
from ffnkit.io.manifest import FILE
from ffnkit.io.sentences import MODULES, OWN, SETTINGS, SentenceFolder, sentence_folder
from ffnkit.io.snapshots import WEIGHTS, source_of

# Of a tokenizer: where one is given, it has written what holds, and older files beside it would not.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Its vocabulary in other forms, which transformers writes no longer and others read (llama.cpp: Gemma's, T5's).
_VOCABULARY = (
    *("vocab.txt", "vocab.json", "merges.txt", "*.model", "*.spm", "tekken.json", "*.tiktoken"),
    *("bpe.codes", "vocab.bpe", "encoder.json", "vocab-*.json", "entity_vocab.json", "normalizer.json"),
)
# What is written anew, belongs to another form of the weights, or tells of the model as it was. Folders of other forms
# by their names too: from the hub their weights are not fetched, and what is left of them is of no use.
_LEFT = (
    *("config.json", "README.md", "ffnkit.json", FILE, "metrics.json", "predictions*.jsonl", "adapter_config.json"),
    *("params.json", "*quant*config*.json", "trainer_state.json", ".*", "__pycache__", "logs", "runs", "wandb"),
    *("onnx", "openvino", "coreml", "original", "gguf", "saved_model", "tflite"),
)
_FIGURES = ("*_results.json", "*_results.csv", "*_results.txt", "*tfevents*")


def write_companions(model: Any, directory: Path, tokenizer: Any) -> None:
    """Every other file of where the model came from, and the tokenizer or processor given.

    What the model or the tokenizer wrote stays. Left out: weights of any form, folders that hold some, model cards,
    figures of earlier runs. Of sentence-transformers the modules behind the transformer come whole, to a model without
    another head.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    source = source_of(model)
    if source is None:
        return
    held = sentence_folder(source)
    own = _not_of(tokenizer, source) if hasattr(tokenizer, "vocab_files_names") else set()
    roots = [source] if held is None else list(dict.fromkeys((source, held.root)))
    behind = [] if held is None else [row["path"] for row in held.behind]
    for root in roots:
        for path in _travelling(root, directory, {*own, *OWN, *behind}):
            _copy(root / path, directory / path)
    if held is None and _embeds(model, source):  # one of several transformers in a folder: its place is there
        _copy(source / SETTINGS, directory / SETTINGS)
    if held is not None and _embeds(model, source):
        _write_modules(held, source, directory)


def _not_of(tokenizer: Any, source: Path) -> set[str]:
    """Files of a source's tokenizer that do not travel beside a tokenizer that was given.

    Other forms of the vocabulary do where the given one holds it, whatever tokens came to it.
    """
    forms = {path.name for path in source.iterdir() if _is_any(path.name, _VOCABULARY)}
    if not forms:
        return set(_TOKENIZER)
    try:
        same = load_tokenizer(source).get_vocab().items() <= tokenizer.get_vocab().items()
    except (FfnkitError, NotImplementedError):  # no tokenizer that opens, or one without a list of its tokens
        same = False
    return set(_TOKENIZER) if same else {*_TOKENIZER, *forms}


def _travelling(root: Path, directory: Path, left: set[str]) -> Iterator[Path]:
    """Files of a folder that travel, relative to it."""
    for path in sorted(root.iterdir()):
        if path.name in left or _is_any(path.name, (*_LEFT, *_FIGURES, *WEIGHTS)):
            continue
        if path.is_file():
            yield path.relative_to(root)
        elif path.is_dir() and not directory.resolve().is_relative_to(path.resolve()):
            inner = [each for each in sorted(path.rglob("*")) if each.is_file()]
            if not any(_is_any(each.name, WEIGHTS) for each in inner):
                yield from (each.relative_to(root) for each in inner if not _is_any(each.name, _FIGURES))


def _write_modules(held: SentenceFolder, source: Path, directory: Path) -> None:
    """What makes it a sentence-transformers model: the list of modules, and those behind the transformer, whole."""
    for name in OWN:
        for root in dict.fromkeys((source, held.root)):
            _copy(root / name, directory / name)
    rows = json.dumps(held.flat(), indent=2)
    (directory / MODULES).write_text(rows + "\n", encoding="utf-8")
    for path in (row["path"] for row in held.behind):
        for each in sorted((held.root / path).rglob("*")) if path else ():
            _copy(each, directory / each.relative_to(held.root))


def _embeds(model: Any, source: Path) -> bool:
    """Whether a model is the transformer of its source: without a head, or with the one that it has there."""
    told = (read_json(source / "config.json") or {}).get("architectures") or []
    return model.base_model is model or type(model).__name__ in told


def _copy(path: Path, target: Path) -> None:
    if path.is_file() and not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
