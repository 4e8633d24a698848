"""The work behind ``ffnkit analyze``: methods and data as the options name them, the models, the files written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ffnkit.analysis.ntk import NtkSettings
from ffnkit.analysis.scalar import rows_in
from ffnkit.analysis.study import FOLDED, Candidate, analyze, labels
from ffnkit.calibration.parts import apart_from
from ffnkit.cli import console, describe
from ffnkit.cli.data_options import check_there
from ffnkit.errors import FfnkitError
from ffnkit.io.files import write_text
from ffnkit.io.folders import staging
from ffnkit.settings.calibration import TEXT_COLUMN
from ffnkit.settings.presets import filled

EVERYTHING = 1 << 62  # tokens: no limit but the rows


def chosen_methods(
    names: str | None, width: str | None, layers: str | None, seed: int, pairs: list[str]
) -> dict[str, Candidate]:
    """The methods of ``--methods``, each with its settings; "all" are those that take a width and the model.

    Raises:
        FfnkitError: an unknown method, a setting that none of them has, values that a method refuses.
    """
    from ffnkit import methods

    if names is None:
        return {}
    words = [word.strip() for word in names.split(",") if word.strip()]
    narrowing = [name for name in methods.compressing() if "width" in describe.fields(methods.get(name))]
    every = [(each, word == "all") for word in words for each in (narrowing if word == "all" else [word])]
    given = describe.parse_settings(pairs)
    for key, value in (("width", width), ("layers", layers)):
        if value is not None and key in given:
            raise FfnkitError(f"--{key} {value}", f"--set {key}=... is given too", "Give one of the two")
        if value is not None:
            given |= describe.parse_settings([f"{key}={value}"])
    given.setdefault("seed", seed)
    made, used = [], {"seed"}
    for word, optional in every:
        name, _, mark = word.partition(":")
        if mark not in ("", FOLDED) or name not in methods.names():
            do = f"Choose among {', '.join(methods.compressing())}, or all; NAME:{FOLDED} multiplies factors in"
            raise FfnkitError(f"--methods {word}", "no such method", do)
        methods.check_compresses(name)
        kind = methods.get(name)
        known, old = describe.fields(kind), getattr(kind, "old_names", {})
        own = {key: value for key, value in given.items() if old.get(key, key) in known}
        used |= own.keys()
        if "width" in known and "width" not in filled(kind, own):
            raise FfnkitError(f"--methods {name}", "no width is given", "Add --width 0.25")
        made.append(Candidate(describe.build(kind, own, f"method {name}"), bool(mark), optional))
    describe.check_known(given, used, "no method that is named")
    return dict(zip(labels(made), made, strict=True))


@dataclass(frozen=True)
class Texts:
    """What methods calibrate on and what is measured on: two parts of one source, with no text in common.

    Attributes:
        rows: most that are measured on: of the task, or pieces of the text.
        mix: beside a text, the share of the calibration that is ffnkit's text of many kinds; None for the usual one.
        text_column: of the text, where the file is a table.
    """

    task: str | None
    data_dir: Path | None
    text: Path | None
    rows: int
    tokens: int
    max_length: int | None
    tokenizer: str | None
    seed: int
    mix: float | None = None
    text_column: str = TEXT_COLUMN

    def __post_init__(self) -> None:
        if self.text is not None:
            check_there(f"--text {self.text}", self.text, "Name a text file")
        if self.task is not None:
            from ffnkit import tasks

            tasks.get(self.task)

    def open(self, names: list[str]) -> tuple[list[Any], Any]:
        """The models, each with a head drawn from the same seed where it has none, and the tokenizer of the first."""
        from ffnkit import tasks, tune
        from ffnkit.io.architectures import load_any
        from ffnkit.tasks.models import load_tokenizer

        task = tasks.get(self.task) if self.task else None
        tokenizer = (task.load_tokenizer if task else load_tokenizer)(self.tokenizer or names[0])
        models = []
        for name in names:
            console.say(f"loading {name}")
            tune.seed_everything(self.seed)
            models.append(task.load_model(name, tokenizer=tokenizer) if task else load_any(name, dtype="float32"))
        return models, tokenizer

    def read(self, tokenizer: Any) -> list[str]:
        """The texts of the file, as ``compress`` reads it."""
        from ffnkit.tune.calibration_text import read_calibration

        return read_calibration(str(self.text), self.text_column, tokenizer)

    def batches(self, model: Any, tokenizer: Any) -> tuple[list[Any], list[Any]]:
        """Batches to calibrate on, and batches to measure on."""
        from ffnkit import tasks
        from ffnkit.tune import CalibrationSettings, calibration_batches, drawn_batches, text_examples
        from ffnkit.tune.calibration import mixed_batches

        few = CalibrationSettings(tokens=self.tokens, max_length=self.max_length)
        every = CalibrationSettings(tokens=EVERYTHING, max_length=self.max_length)
        long = every.text_length
        if self.task is not None:
            task = tasks.get(self.task)
            splits = task.splits(self.data_dir, seed=self.seed, report_limit=self.rows)
            first, second = (
                calibration_batches(model, tokenizer, settings, task=task, rows=rows, seed=self.seed)
                for settings, rows in ((few, splits.train), (every, splits.report))
            )
            return first, second
        fitted, measured = halves(self.read(tokenizer))
        if self.mix is not None:
            few = few.model_copy(update={"mix": self.mix})
        calibration = mixed_batches(model, tokenizer, [(fitted, 1.0)], few, seed=self.seed)
        examples, collate = text_examples(measured, tokenizer, model, long)
        examples = [examples[i] for i in range(min(len(examples), self.rows))]
        every = every.model_copy(update={"batch_size": every.texts_a_pass(long)})
        return calibration, drawn_batches(examples, collate, every, seed=self.seed)


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """The first and the second half of some texts, without what comes again; a lone text is cut at a space near its
    middle.

    Raises:
        FfnkitError: there is too little text for two parts.
    """
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(texts) == 1:
        cut = texts[0].find(" ", len(texts[0]) // 2)
        texts = [texts[0][:cut], texts[0][cut:]] if cut > 0 else texts
    if len(texts) < 2:
        raise FfnkitError("the text", "too little to calibrate on one half and measure on the other", "Give more text")
    middle = len(texts) // 2
    if measured := apart_from(texts[middle:], texts[:middle]):
        return texts[:middle], measured
    raise FfnkitError("the text", "its second half stands in the first word for word", "Give more text")


@dataclass(frozen=True)
class AnalyzeJob:
    """One run of ``ffnkit analyze``."""

    model: str
    candidates: dict[str, Candidate]
    against: tuple[str, ...]
    texts: Texts
    errors: bool
    ntk: bool | None
    ntk_settings: dict[str, Any]
    device: Any

    def run(self) -> tuple[Any, dict[str, Any]]:
        """The analysis, and what --json prints."""
        settings = NtkSettings(**self.ntk_settings)
        models, tokenizer = self.texts.open([self.model, *self.against])
        notes = shared_heads(dict(zip([self.model, *self.against], models, strict=True)))
        models = [each.to(self.device) for each in models]
        calibration, data = self.texts.batches(models[0], tokenizer)
        ntk = self.ntk
        if ntk is None:
            ntk = gives_logits(models[0])
            notes += () if ntk else (f"no kernel: {type(models[0]).__name__} gives no logits (--task adds a head)",)
        with console.progress("analysing") as step:
            found = analyze(
                models[0],
                self.candidates,
                data=data,
                calibration=calibration,
                against=dict(zip(names_of(self.against), models[1:], strict=True)),
                errors=self.errors,
                ntk=settings if ntk else False,
                progress=step,
            )
        found = type(found)(found.model, found.rows, found.conditions, (*notes, *found.notes))
        texts = {key: value for key, value in asdict(self.texts).items() if key != "data_dir"}
        texts["rows"] = sum(map(rows_in, data))
        return found, {"name": self.model, "data": console.plain(texts), **console.plain(found.to_dict())}


def hand_over(
    stem: str,
    found: Any,
    report: dict[str, Any],
    out: Path | None,
    as_json: bool,
    texts: dict[str, str] | None = None,
    pictures: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write what was found into a folder, in one step, and print it.

    Args:
        stem: of the files' names: STEM.json, STEM.png.
        texts: further files, by the end of their name. pictures: what draws further ones.
    """
    drawn = {"png": found.plot, **(pictures or {})}
    written = {"json": json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"} | (texts or {})
    if out is not None:
        with staging(out, stem) as temporary:
            for ending, text in written.items():
                write_text(temporary / f"{stem}.{ending}", text)
            for ending, draw in drawn.items():
                draw(temporary / f"{stem}.{ending}")
    if as_json:
        console.print_json(report)
    else:
        console.out(str(found))
        if out is not None:
            console.say(f"saved in {out}: {', '.join(f'{stem}.{ending}' for ending in (*written, *drawn))}")


def names_of(folders: tuple[str, ...]) -> list[str]:
    """Short names for folders, where these are distinct."""
    short = [Path(folder).name or folder for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


def gives_logits(model: Any) -> bool:
    """Whether a model has a head: output embeddings, or a classifier beside its body."""
    from ffnkit.model.trainable import body

    return body(model) is not model


def shared_heads(models: dict[str, Any]) -> tuple[str, ...]:
    """Give a head that was drawn the weights of a head that was not, so that one f is compared; says what it did.

    The first model is the uncompressed one. Where all heads were drawn, the others get the first one's.
    """
    import torch

    from ffnkit.io.loading import newly_initialized

    drawn = {name: newly_initialized(model) for name, model in models.items()}
    first = next(iter(models))
    source = next((name for name, keys in drawn.items() if not keys), first)
    notes = []
    for name, keys in drawn.items():
        if name == source or not keys:
            continue
        theirs = dict(models[source].named_parameters())
        if any(key not in theirs or theirs[key].shape != models[name].get_parameter(key).shape for key in keys):
            raise FfnkitError(f"comparing {first} with {name}", "their heads differ in shape", "Use one task for both")
        with torch.no_grad():
            for key in keys:
                models[name].get_parameter(key).copy_(theirs[key])
        if source != first or name != first:
            notes.append(f"{name} has no head of its own and is compared with that of {source}")
    return tuple(notes)
