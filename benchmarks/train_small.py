"""Train small models from scratch: a ViT on images, a decoder on text, an encoder-decoder that translates. The studies
of merging and fusing start here.

    python benchmarks/train_small.py                                   # a ViT on scikit-learn's digits, seconds
    python benchmarks/train_small.py cifar10 --layers 8 --steps 6000 --out vit
    python benchmarks/train_small.py tinystories --tokenizer stories260K --steps 4000 --out stories
    python benchmarks/train_small.py wikitext2 --model gpt2 --tokenizer gpt2 --out wiki
    python benchmarks/train_small.py multi30k-de-en --layers 4 --out translator    # makes its tokenizer

Interrupted? Run the same command again: it resumes. The result is a standard checkpoint with its processor or
tokenizer, training.json (metrics, settings, speed) beside it. Any task of ``ffnkit tasks`` that classifies images,
models language or writes text for a prompt will do; of others the files of your own, with --train-file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What is used of a task unless the command line says otherwise. d, ff: width of the model, hidden neurons."""

    layers: int
    d: int
    heads: int
    ff: int
    steps: int
    batch_size: int
    learning_rate: float
    schedule: str = "cosine"
    augment: str = "none"
    side: int = 0  # pixels of an image
    patch: int = 0
    length: int = 0  # tokens of a block


PRESETS = {
    "digits": Preset(4, 64, 4, 128, 300, 64, 2e-3, side=8, patch=2),
    "mnist": Preset(6, 64, 4, 256, 1500, 64, 1e-3, side=28, patch=7),
    "cifar10": Preset(8, 128, 4, 512, 5000, 128, 1e-3, augment="crop-flip", side=32, patch=4),
    "images": Preset(8, 128, 4, 512, 5000, 64, 1e-3, augment="crop-flip", side=64, patch=8),
    "tinystories": Preset(8, 128, 4, 512, 3000, 32, 1e-3, length=256),
    "text": Preset(8, 128, 4, 512, 3000, 32, 1e-3, length=128),
    "translation": Preset(4, 128, 4, 512, 3000, 64, 2e-3, schedule="inverse_sqrt", length=48),
}
KINDS = {"images": ("vit", "deit"), "text": ("llama", "gpt2"), "translation": ("marian", "t5")}  # the first is taken


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="digits", help="a task by name [digits]")
    parser.add_argument("--train-file", help="images or text of your own, in place of the task's name")
    parser.add_argument("--data-dir", help="folder of TASK/...; else FFNKIT_DATA, else the hub")
    parser.add_argument("--model", choices=sum(KINDS.values(), ()), help="[vit, llama or marian, by the task]")
    parser.add_argument(
        "--tokenizer", help="a folder or a model of the hub; of a translator [made of its training texts]"
    )
    parser.add_argument("--vocabulary", type=int, default=4000, help="tokens of a tokenizer that is made")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; a temporary one if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="training rows")
    parser.add_argument("--dev", type=int, help="rows carved out of train to choose the checkpoint by")
    parser.add_argument("--report-limit", type=int, help="rows of the reported split")
    parser.add_argument("--eval-every", type=int, help="steps between evaluations and checkpoints [a tenth of all]")
    for name, kind in (("layers", int), ("d", int), ("heads", int), ("ff", int), ("side", int), ("patch", int)):
        parser.add_argument(f"--{name}", type=kind, help="of the model")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--init", type=float, help="spread of the first weights [the family's own]")
    for name, kind in (("steps", int), ("batch-size", int), ("learning-rate", float), ("length", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--schedule", help="linear, cosine, inverse_sqrt, ...")
    parser.add_argument("--augment", choices=("none", "flip", "crop-flip"))
    parser.add_argument("--weight-decay", type=float, default=0.05)
    return parser.parse_args()


def preset_of(name: str, group: str, given: argparse.Namespace) -> Preset:
    """The task's preset with what the command line says."""
    preset = PRESETS.get(name, PRESETS[group])
    chosen = {key: getattr(given, key) for key in vars(preset) if getattr(given, key, None) is not None}
    return Preset(**{**vars(preset), **chosen})


def image_model(preset: Preset, task: Any, kind: str, dropout: float, init: float | None) -> tuple[Any, Any]:
    """An untrained ViT or DeiT with its processor."""
    import transformers

    from ffnkit.tasks.images.batches import processor_of

    kinds = {
        "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
        "deit": (transformers.DeiTConfig, transformers.DeiTForImageClassification),
    }
    config_class, model_class = kinds[kind]
    config = config_class(
        hidden_size=preset.d,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        intermediate_size=preset.ff,
        image_size=preset.side,
        patch_size=preset.patch,
        hidden_dropout_prob=dropout,
        id2label=task.id2label,
        label2id={name: number for number, name in task.id2label.items()},
        problem_type="single_label_classification",
        **({} if init is None else {"initializer_range": init}),
    )
    return model_class(config), processor_of(config)


def text_model(preset: Preset, task: Any, kind: str, tokenizer: str, dropout: float) -> tuple[Any, Any]:
    """An untrained LLaMA-like (gated) or GPT-2-like (plain) decoder with an existing tokenizer."""
    import transformers

    from ffnkit.tasks.models import set_padding

    read = task.load_tokenizer(tokenizer)
    ids = {"bos_token_id": read.bos_token_id, "eos_token_id": read.eos_token_id, "vocab_size": len(read)}
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            **ids,
            hidden_size=preset.d,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            intermediate_size=preset.ff,
            max_position_embeddings=preset.length,
            attention_dropout=dropout,
            tie_word_embeddings=True,
        )
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        drops = {f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")}
        config = transformers.GPT2Config(
            **ids,
            **drops,
            n_embd=preset.d,
            n_layer=preset.layers,
            n_head=preset.heads,
            n_inner=preset.ff,
            n_positions=preset.length,
        )
        model = transformers.GPT2LMHeadModel(config)
    set_padding(model, read, kind)
    return model, read


def made_tokenizer(texts: Any, size: int) -> Any:
    """Byte-pair encoding of ``size`` tokens, made of texts of both languages; sentences end with </s>."""
    import tokenizers
    import transformers

    special = ["<pad>", "</s>", "<unk>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def translator(preset: Preset, kind: str, read: Any, dropout: float) -> tuple[Any, Any]:
    """An untrained Marian or T5 with ``layers`` on each side."""
    import transformers

    ids = {
        "vocab_size": len(read),
        "pad_token_id": read.pad_token_id,
        "eos_token_id": read.eos_token_id,
        "decoder_start_token_id": read.pad_token_id,
    }
    if kind == "t5":
        shape: dict[str, Any] = {
            "num_layers": preset.layers,
            "num_heads": preset.heads,
            "d_kv": preset.d // preset.heads,
        }
        config: Any = transformers.T5Config(**ids, **shape, d_model=preset.d, d_ff=preset.ff, dropout_rate=dropout)
        return transformers.T5ForConditionalGeneration(config), read
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_layers": preset.layers,
            f"{side}_attention_heads": preset.heads,
            f"{side}_ffn_dim": preset.ff,
        }
    config = transformers.MarianConfig(
        **ids,
        **sides,
        d_model=preset.d,
        dropout=dropout,
        activation_function="swish",
        scale_embedding=True,
        max_position_embeddings=256,
        forced_eos_token_id=None,
    )
    return transformers.MarianMTModel(config), read


def main() -> None:
    """Train, report, save."""
    given = arguments()
    import ffnkit
    from ffnkit import tasks, tune
    from ffnkit.errors import FfnkitError
    from ffnkit.io.files import write_text
    from ffnkit.tasks.generation.sets import add_special_tokens

    name = None if given.train_file else given.task
    try:
        task = tasks.choose(name=name, train=given.train_file)
        groups = {"image-classification": "images", "language-modelling": "text", "generation": "translation"}
        group = groups.get(task.kind)
        if group is None:
            do = "Choose a task of images, of plain text or of translation (ffnkit tasks)"
            raise FfnkitError(f"task {task.name}", f"it is a {task.kind}", do)
        if group == "text" and given.tokenizer is None:
            raise FfnkitError(f"task {task.name}", "a decoder needs a tokenizer", "Name one with --tokenizer")
        kind = given.model or KINDS[group][0]
        if kind not in KINDS[group]:
            do = f"Name one of {', '.join(KINDS[group])}"
            raise FfnkitError(f"--model {kind}", f"task {task.name} is none that it is trained on here", do)
        preset = preset_of(task.name, group, given)
        out = given.out or Path(tempfile.mkdtemp(prefix="train-small-"))
        splits = task.splits(
            given.data_dir, dev=given.dev, train_limit=given.limit, report_limit=given.report_limit
        )  # the same rows for every seed
        tune.seed_everything(given.seed)
        if group == "images":
            model, reader = image_model(preset, task, kind, given.dropout, given.init)
        elif group == "text":
            model, reader = text_model(preset, task, kind, given.tokenizer, given.dropout)
        else:
            texts = (text for row in splits.train for text in (row["prompt"], *row["references"]))
            made = task.load_tokenizer(given.tokenizer) if given.tokenizer else made_tokenizer(texts, given.vocabulary)
            add_special_tokens(made, task.special_tokens)
            model, reader = translator(preset, kind, made, given.dropout)
        settings = tune.TrainSettings(
            learning_rate=preset.learning_rate,
            schedule=preset.schedule,  # type: ignore[arg-type]
            warmup=0.05,
            weight_decay=given.weight_decay,
            steps=preset.steps,
            batch_size=preset.batch_size,
            eval_batch_size=256 if group == "images" else 32,
            max_length=preset.length or 128,
            augment=preset.augment,  # type: ignore[arg-type]
            eval_every=given.eval_every or max(1, preset.steps // 10),
            best_metric="loss" if group == "translation" else None,  # texts are written once, at the end
        )
        print(f"{task.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {preset}", flush=True)
        result = tune.train(
            model, reader, task, splits, settings, seed=given.seed, out_dir=out / "work", progress=sys.stderr.isatty()
        )
        length = settings.max_length
        metrics = tune.evaluate(result.model, reader, task, splits.report, batch_size=64, max_length=length)
        ffnkit.save(result.model, out, tokenizer=reader)
        report = {
            "task": task.name,
            "data": [splits.source, *splits.notes],
            "model": kind,
            "seed": given.seed,
            "preset": vars(preset),
            "settings": settings.model_dump(mode="json"),
            "metrics": metrics,
            "seconds": result.seconds,
            "examples_per_second": result.samples_per_second,
            "steps_per_second": result.samples_per_second / preset.batch_size,
            "history": result.history,
        }
        write_text(out / "training.json", json.dumps(report, indent=2) + "\n")
    except FfnkitError as error:
        raise SystemExit(f"train_small: error: {error}") from None
    shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    print(f"{shown}; {report['steps_per_second']:.2f} steps/s; saved in {out}")


if __name__ == "__main__":
    main()
