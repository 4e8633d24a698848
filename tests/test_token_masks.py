"""Which tokens count: statistics over padded batches are those of every example alone, without its padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from families import BART, CLIP_TEXT, ENCODER, FAMILIES, IMAGE, T5
from family import redraw
from test_layer_numbers import gemma3n
from torch import Tensor, nn

import ffnkit as fk
from ffnkit import methods
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.features import Features, passages
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.calibration.padding import TokenMasks
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.heads import head_activity
from ffnkit.methods.drop.weights import column_norms, prunable
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns
from ffnkit.ops.moments import Moments
from ffnkit.plans import plan

SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "conv_bias": True, "vocab_size": 20,
}  # fmt: skip
LENGTHS = (7, 4)
Batch = dict[str, Tensor]


def _ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (1, count), generator=torch.Generator().manual_seed(seed))


def _padded(rows: list[Batch], fill: dict[str, int]) -> Batch:
    """One batch of rows (batches of one) padded on the right: names in ``fill`` by that number, others by noise."""
    found: Batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        longest = max(v.shape[1] for v in values)
        found[name] = torch.cat([
            torch.cat([v, torch.full((1, longest - v.shape[1], *v.shape[2:]), fill.get(name, 0)).to(v)], 1)
            for v in values
        ])  # fmt: skip
    return found


def _text(seed: int, *, labels: bool = False, decoder: bool = False) -> list[Batch]:
    rows = []
    for number, length in enumerate(LENGTHS):
        row = {"input_ids": _ids(length, seed + number), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        if labels:
            row["labels"] = _ids(length - 2, seed + number + 50)
        if decoder:
            row["decoder_input_ids"] = _ids(length - 1, seed + number + 50)
            row["decoder_attention_mask"] = torch.ones(1, length - 1, dtype=torch.long)
        rows.append(row)
    return rows


def _wave(seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {"input_values": torch.randn(1, n, generator=draw), "attention_mask": torch.ones(1, n, dtype=torch.long)}
        for n in (120, 61)
    ]


def _mel(seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(1, n, 8, generator=draw),
            "attention_mask": torch.ones(1, n, dtype=torch.long),
            "labels": _ids(n // 8, seed),
        }
        for n in (40, 19)
    ]


def _clip(seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {**row, "pixel_values": torch.randn(1, 3, 8, 8, generator=draw)}
        for row in (
            {"input_ids": _ids(n, seed + n), "attention_mask": torch.ones(1, n, dtype=torch.long)} for n in (5, 3)
        )
    ]


@dataclass(frozen=True)
class Case:
    """A model, and rows of data for it by seed."""

    build: Callable[[], nn.Module]
    rows: Callable[[int], list[Batch]]


def _built(model_class: str, args: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, model_class)
    model = kind(kind.config_class(**args))
    redraw(model, seed=0)
    return model.eval()


def _case(model_class: str, args: dict[str, Any], rows: Callable[[int], list[Batch]]) -> Case:
    return Case(lambda: _built(model_class, args), rows)


CLIP = {
    "text_config": CLIP_TEXT | {"projection_dim": 12, "num_hidden_layers": 2},
    "vision_config": IMAGE | {"projection_dim": 12}, "projection_dim": 12,
}  # fmt: skip
LED = BART | {"attention_window": [4, 4], "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
MEL = BART | {
    "input_feat_per_channel": 8, "input_channels": 1, "num_conv_layers": 2, "conv_kernel_sizes": (3, 3),
    "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 30,
}  # fmt: skip
CASES = {
    "bert": _case("BertModel", ENCODER, _text),
    "bert-chunks": _case("BertModel", ENCODER | {"chunk_size_feed_forward": 1}, _text),
    "bert-chunks-tied": _case("AlbertModel", ENCODER | {"embedding_size": 12, "chunk_size_feed_forward": 1}, _text),
    "wav2vec2": _case("Wav2Vec2ForCTC", SPEECH, _wave),
    "hubert": _case("HubertForCTC", SPEECH, _wave),
    "wavlm": _case("WavLMModel", SPEECH, _wave),
    "speech-to-text": _case("Speech2TextForConditionalGeneration", MEL, _mel),
    "longformer": _case("LongformerModel", ENCODER | {"attention_window": [4] * 3}, _text),
    "longformer-chunks": _case(
        "LongformerModel", ENCODER | {"attention_window": [4] * 3, "chunk_size_feed_forward": 2}, _text
    ),
    "led": _case("LEDForConditionalGeneration", LED, lambda seed: _text(seed, decoder=True)),
    "clip": _case("CLIPModel", CLIP, _clip),
    "bart-labels": _case("BartForConditionalGeneration", BART, lambda seed: _text(seed, labels=True)),
    "bart-classifier": _case("BartModel", BART, _text),
    "t5": _case("T5ForConditionalGeneration", T5, lambda seed: _text(seed, labels=True)),
    "switch": Case(lambda: FAMILIES["switch"].model(), lambda seed: _text(seed, labels=True)),
    "mixtral": Case(lambda: FAMILIES["mixtral"].model(), _text),
    "llama4": Case(lambda: FAMILIES["llama4"].model(), _text),
    "gpt2": Case(lambda: FAMILIES["gpt2"].model(), _text),
    "gemma3n": Case(lambda: gemma3n(2), _text),  # several streams of the tokens pass through a layer
}  # fmt: skip
FILL = {"labels": -100, "input_ids": 1, "decoder_input_ids": 1}


def _data(case: Case) -> tuple[list[Batch], list[Batch]]:
    """Padded batches, and all examples alone."""
    rows = [case.rows(seed) for seed in (0, 100)]
    batches = [
        _padded(each, FILL)
        if "pixel_values" not in each[0]
        else {
            **_padded([{k: v for k, v in row.items() if k != "pixel_values"} for row in each], FILL),
            "pixel_values": torch.cat([row["pixel_values"] for row in each]),
        }
        for each in rows
    ]
    return batches, [row for each in rows for row in each]


class Sums:
    """Moments of what every FFN's down receives, as the methods take them."""

    def __init__(self) -> None:
        self.by: dict[tuple[str, int | None], Moments] = {}

    def add(self, ffn: FFN, acts: Activations) -> None:
        key = ffn.name, acts.expert
        self.by.setdefault(key, Moments(acts.hidden.shape[1], acts.hidden.device)).add(acts.hidden, acts.weights)


def _alone(model: nn.Module, rows: list[Batch]) -> Sums:
    """The slow way: example by example, every token counts."""
    sums = Sums()
    watch(model, rows, ffns(model), sums.add)
    return sums


def _gap(one: Sums, two: Sums) -> float:
    """The largest relative difference of counts, means and second moments."""
    assert set(k for k, m in one.by.items() if m.count) == set(k for k, m in two.by.items() if m.count)
    worst = 0.0
    for key, moments in two.by.items():
        mine = one.by[key]
        worst = max(worst, abs(mine.count - moments.count) / moments.count)
        for a, b in ((mine.mean(), moments.mean()), (mine.second(), moments.second())):
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*padding counts as data.*")
        yield


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of WavLM's own attention
@pytest.mark.parametrize("name", CASES)
def test_moments_of_padded_batches_are_those_of_the_examples_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES[name].build()
    batches, rows = _data(CASES[name])
    wanted = _alone(model, rows)
    for way in ("whole", "blocks"):
        got = Sums()
        with _quiet():
            if way == "whole":
                watch(model, batches, ffns(model), got.add)
            else:
                with Blockwise(model, batches, ffns(model)) as blocks:
                    for group in blocks.groups:
                        blocks.watch(group, got.add)
                        blocks.advance(group)
        assert _gap(got, wanted) < 1e-5, way
    # the negative control: with every token counted they differ
    monkeypatch.setattr(TokenMasks, "of", lambda *_, **__: None)
    got = Sums()
    watch(model, batches, ffns(model), got.add)
    assert _gap(got, wanted) > 1e-3


def test_segment_numbers_count_each_token_once() -> None:
    model = _built("BertModel", ENCODER)
    ids, mask = torch.cat([_ids(8), _ids(8, 1)]), torch.ones(2, 8, dtype=torch.long)
    mask[:, -2:] = 0
    packed = mask * torch.tensor([1, 1, 1, 2, 2, 3, 0, 0])
    found = {}
    for name, given in (("ones", mask), ("numbers", packed)):
        sums = Sums()
        # the model sees the plain mask in both cases: what differs is what counts
        masks = TokenMasks.of_ffns(model, ffns(model))
        masks.start({"input_ids": ids, "attention_mask": given})
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
        weights = masks.of(ffns(model)[0].name, x)
        sums.by["", None] = Moments(16, x.device)
        sums.by["", None].add(x.reshape(-1, 16), weights)
        found[name] = sums
    assert _gap(found["numbers"], found["ones"]) == 0
    weighed = Sums()
    weighed.by["", None] = Moments(16, x.device)
    weighed.by["", None].add(x.reshape(-1, 16), packed.reshape(-1).float())
    assert _gap(weighed, found["ones"]) > 1e-3


@pytest.mark.parametrize("name", ["bert-chunks", "longformer", "bart-labels", "led", "t5", "switch", "mixtral", "clip"])
def test_column_norms_of_padded_batches_are_those_of_the_examples_alone(name: str) -> None:
    """Linears of attention too: keys and values of cross-attention get the encoder's tokens."""
    model = CASES[name].build()
    batches, rows = _data(CASES[name])
    found = [each for each in prunable(model, "all") if "global" not in each.name]
    with _quiet():
        got = column_norms(model, batches, found)
    wanted = column_norms(model, rows, found)
    for label, norms in wanted.items():
        assert float((got[label] - norms).norm() / norms.norm()) < 1e-5, label


@pytest.mark.parametrize("name", ["bert", "bart-labels", "clip", "gpt2"])
def test_head_activity_of_padded_batches_is_that_of_the_examples_alone(name: str) -> None:
    model = CASES[name].build()
    batches, rows = _data(CASES[name])
    got, wanted = (head_activity(model, data, attentions(model)) for data in (batches, rows))
    for label, rms in wanted.items():
        assert float((got[label] - rms).norm() / rms.norm()) < 1e-5, label


@pytest.mark.parametrize("name", ["bert", "bert-chunks", "wav2vec2", "longformer", "bart-labels"])
def test_passages_hold_the_tokens_that_count(name: str) -> None:
    model = CASES[name].build()
    batches, rows = _data(CASES[name])
    layers = {block_name(ffn.name): ffn for ffn in ffns(model)}
    sums = []
    for data in (batches, rows):
        total: dict[str, Tensor] = {}

        def add(passed: dict[str, Any], total: dict[str, Tensor] = total) -> None:
            for layer, passage in passed.items():
                for what in ("entering", "leaving", "added"):
                    value = getattr(passage, what).double().square().sum(0)
                    total[f"{layer} {what}"] = total.get(f"{layer} {what}", 0) + value

        passages(model, data, layers, add)
        sums.append(total)
    for label, value in sums[1].items():
        assert float((sums[0][label] - value).norm() / value.norm()) < 1e-5, label


def test_a_mask_that_does_not_fit_is_said_once_and_all_tokens_count() -> None:
    model = _built("BertModel", ENCODER)
    mask = torch.ones(2, 1, 7, 7)
    batch = {"input_ids": torch.cat([_ids(7), _ids(7, 1)]), "attention_mask": mask}
    sums = Sums()
    with pytest.warns(UserWarning, match="padding counts as data") as said:
        watch(model, [batch, batch], ffns(model), sums.add)
    assert len([w for w in said if "padding counts" in str(w.message)]) == 1
    assert all(m.count == 28 for m in sums.by.values())


@torch.no_grad()
def test_numbers_that_are_not_finite_are_refused_but_in_padding() -> None:
    """Of heads, their refit and neurons: a token that counts ends it in one line, padding changes nothing."""
    model = _built("BertModel", ENCODER)
    batch = {"input_ids": torch.cat([_ids(7), _ids(7, 1)]), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    attention, ffn = attentions(model)[-1], ffns(model)[-1]
    heads = [fk.RemoveHeads(remove=1, **more) for more in ({"by": "activation"}, {"refit": True})]
    asked = (*heads, methods.Importance(width=8))
    sound = [plan(model, method, [batch]) for method in asked]

    def spoil(place: tuple[int, int]) -> list[Any]:
        def put(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            value = args[0].clone()
            value[place] = torch.nan
            return value

        return [module.register_forward_pre_hook(put) for module in (attention.linear("o"), ffn.linear("down"))]

    def texts() -> Tensor:
        return Features(model, [batch], [ffn], {ffn.name: ["texts"]}, 99).get(ffn.name, "texts")

    means = texts()
    handles = spoil((1, 5))
    assert torch.equal(texts(), means)
    for method, before in zip(asked, sound, strict=True):
        after = plan(model, method, [batch])
        assert after.description() == before.description()
        for mine, theirs in zip(after.edits, before.edits, strict=True):
            assert all(torch.equal(value, theirs.tensors()[name]) for name, value in mine.tensors().items())
    for handle in handles:
        handle.remove()
    spoil((1, 3))
    for method in asked:
        with pytest.raises(FfnkitError, match="it is NaN or infinite"):
            plan(model, method, [batch])
