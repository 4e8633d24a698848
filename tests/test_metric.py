"""What errors of an FFN's outputs count by, and what the FFN is to give, against slow loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as T
from families import FAMILIES
from tolerance import assert_close

from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.fisher import DAMPING, fisher
from ffnkit.calibration.hooks import Activations
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.calibration.statistics import Statistics
from ffnkit.calibration.stored import PROBED
from ffnkit.calibration.streams import Streams
from ffnkit.methods.narrow.judging import Judged
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.finding import ffns
from ffnkit.ops.apart import RUN, held_out
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import refit
from ffnkit.ops.similarity import linear_cka, standardized_cka
from ffnkit.ops.subset import leverage, weighed


def _moments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    h, mixing, down = (torch.randn(*shape, generator=draw).double() for shape in ((100, 7), (7, 7), (4, 7)))
    return h @ mixing, down, draw.manual_seed(1) and torch.randn(100, 4, generator=draw).double()


def test_scores_in_a_metric_are_what_is_lost_in_it() -> None:
    h, down, _ = _moments()
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()
    metric = root.T @ root + torch.eye(4)
    found = leverage(h.T @ h, 0.0, weighed(down, metric))
    for number in range(7):
        others = [i for i in range(7) if i != number]
        gap = h @ down.T - h[:, others] @ torch.linalg.lstsq(h[:, others], h @ down.T).solution
        lost = sum(float(e @ metric @ e) for e in gap)
        assert float(found[number]) == pytest.approx(lost, rel=1e-6)
    plain = leverage(h.T @ h, 0.0, down)
    assert found.argsort().tolist() != plain.argsort().tolist()  # the control: the metric tells them apart
    assert_close(weighed(down, metric.diagonal()).square().sum(0), metric.diagonal() @ down.square(), rel=1e-9)


def test_a_refit_gives_what_is_missing_too() -> None:
    h, down, missing = _moments()
    kept = torch.tensor([0, 2, 3, 6])
    wanted = torch.linalg.lstsq(h[:, kept], h @ down.T + missing).solution.T
    assert_close(refit(h.T @ h, down, kept, 0.0, missing.T @ h)[0], wanted, rel=1e-8)
    assert float((refit(h.T @ h, down, kept, 0.0)[0] - wanted).norm()) > 1e-3 * float(wanted.norm())


def test_columns_that_depend_on_each_other_stay_as_they_were() -> None:
    h, down, _ = _moments()
    h = torch.cat((h[:, :3], h[:, :3] @ torch.ones(3, 3).double(), h[:, 3:4]), 1)  # the last one goes
    kept = torch.arange(6)
    fitted, _ = refit((h.T @ h).float(), down.float(), kept, 0.0)
    assert float((fitted - down[:, kept]).norm()) < 10 * float(down.norm())
    gap = h @ down.T - h[:, kept] @ fitted.T
    best = h @ down.T - h[:, :3] @ torch.linalg.lstsq(h[:, :3], h @ down.T).solution
    assert float(gap.norm()) == pytest.approx(float(best.norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_fisher_information_is_that_of_a_loop(name: str) -> None:
    model = FAMILIES[name].model()
    batch = FAMILIES[name].inputs(model, seed=1)
    batch = {key: value[:2] for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    found = fisher(model, ffns(model)[:2], [batch], seed=5)
    ffn, caught = ffns(model)[1], []

    def keep(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    handle = ffn.linear("down").register_forward_hook(keep)
    output = model(**batch)
    handle.remove()
    rows = output.logits if name == "llama" else model.base_model(**batch)[0]
    if name == "bert":
        handle = ffn.linear("down").register_forward_hook(keep)
        rows = model.base_model(**batch)[0]
        handle.remove()
    rows = rows[batch["attention_mask"].bool()]
    draw = torch.Generator().manual_seed(5)
    if name == "llama":
        noise = -(-torch.rand(rows.shape, generator=draw).clamp_min(1e-30).log()).log()
        drawn = (rows + noise).argmax(-1)
        loss = -sum(row.log_softmax(-1)[t] for row, t in zip(rows, drawn, strict=True))
    else:
        loss = sum(
            a @ b.float() for a, b in zip(rows, torch.randint(0, 2, rows.shape, generator=draw) * 2 - 1, strict=True)
        )
    (gradient,) = torch.autograd.grad(loss, caught[-1])
    slow = sum(torch.outer(g, g) for g in gradient.reshape(-1, ffn.d))
    slow = (slow / slow.diagonal().mean() + DAMPING * torch.eye(ffn.d)) / (1 + DAMPING)
    assert_close(found[ffn.name], slow, rel=1e-3)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("more", [{}, {"window": True}], ids=["vit", "swin"])
def test_images_are_gone_back_over_by_the_tokens_that_they_are(more: dict[str, bool]) -> None:
    """Nothing in a batch of images says how many; it was a pass an image, over all of them."""
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 3}
    if more:  # 16 tokens an image in the first stage, 4 in the last
        config = T.SwinConfig(**sizes, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
        model: Any = T.SwinForImageClassification(config)
    else:
        wide = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = T.ViTForImageClassification(T.ViTConfig(**sizes, **wide))
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["pixel_values"])), with_kwargs=True)
    draw = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.randn(100, 3, 32, 32, generator=draw)} for _ in range(14)]
    told, least = (16, 4) if more else (17, 17)
    found = fisher(model.eval(), list(ffns(model)), batches)
    assert len(found) == 2
    assert rows[0] == 1 and max(rows) == 512 // told  # then as many as fit
    assert PROBED <= sum(rows) * least < PROBED + 512
    rows.clear()
    fisher(model, list(ffns(model)), batches[:1])
    assert sum(rows) == 100  # where there are fewer, all


def test_sound_is_gone_back_over_by_its_frames_not_by_the_words_beside_it() -> None:
    """Eight words stand for 200 frames: 64 rows of so many words were 12,800 tokens at once."""
    sizes = {
        "vocab_size": 60,
        "d_model": 16,
        "num_mel_bins": 4,
        "max_source_positions": 200,
        "max_target_positions": 20,
    }
    parts = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
    }
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    wide = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model: Any = T.WhisperForConditionalGeneration(T.WhisperConfig(**sizes, **parts, **special, **wide)).eval()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_features"])), with_kwargs=True)
    words = torch.arange(4, 12).repeat(100, 1)
    batch = {"input_features": torch.randn(100, 4, 400), "decoder_input_ids": words}
    assert len(fisher(model, list(ffns(model)), [batch])) == 2
    assert rows[0] == 1 and max(rows) == 2 and sum(rows) == 100  # 800 words: all


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_ffn_is_to_give_what_its_reader_lacks(name: str) -> None:
    model = FAMILIES[name].model()
    data = [FAMILIES[name].inputs(model, seed=seed) for seed in range(2)]
    first, second = ffns(model)[:2]

    def read() -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        block = model.get_submodule(second.name if name == "bert" else second.name.removesuffix(".mlp"))
        norm = block.get_submodule("output.LayerNorm") if name == "bert" else None
        handle = (
            norm.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
            if norm is not None
            else block.register_forward_hook(
                lambda _, __, out: rows.append((out[0] if isinstance(out, tuple) else out).detach())
            )
        )
        with torch.no_grad():
            for batch in data:
                model(**batch)
        handle.remove()
        return [each[batch["attention_mask"].bool()] for each, batch in zip(rows, data, strict=True)]

    before = read()
    streams = Streams(model, data, [first, second])
    assert streams.factors == {ffn.name: pytest.approx(1.0, rel=1e-3) for ffn in (first, second)}
    seen: Statistics[_Kept] = Statistics(lambda _: _Kept())
    with Blockwise(model, data, [first, second]) as blocks:
        for group in blocks.groups:
            streams.see(blocks, group, seen)
            if group[0].name == first.name:
                blocks.install(first, first.raw().take(torch.arange(first.width // 2)))
                blocks.advance(group)
                now = read()
    wanted = torch.cat([a - b for a, b in zip(before, now, strict=True)])
    found = torch.cat(seen.parts[second.name, 0].missing)
    assert float(wanted.norm()) > 1e-3  # the control: the layers before are others
    assert_close(found, wanted, rel=1e-3)
    assert float(torch.cat(seen.parts[first.name, 0].missing).norm()) < 1e-4  # nothing is compressed before it


class _Kept:
    """What is missing, call by call."""

    def __init__(self) -> None:
        self.missing: list[torch.Tensor] = []

    def update(self, acts: Activations) -> None:
        kept = acts.counted()
        assert kept.missing is not None
        self.missing.append(kept.missing)

    def merge(self, other: _Kept) -> None: ...
    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, state: dict[str, torch.Tensor]) -> None: ...


def test_the_held_out_error_is_as_the_reader_sees_it() -> None:
    draw = torch.Generator().manual_seed(0)
    old = Neurons(torch.randn(6, 3, generator=draw), torch.randn(3, 6, generator=draw))
    new = old.take(torch.tensor([0, 2, 5]))
    x = torch.randn(400, 3, generator=draw)
    part = Part(0)
    part.update(Activations(x, torch.relu(x @ old.up.T), x, missing=0.1 * x))
    tokens = torch.rand(400, generator=draw)
    metric = Metric(torch.tensor([2.0, 0.1, 0.9]), tokens, tokens[held_out(400)])
    places = [i for i in range(400) if held_out(400)[i]]
    rows = [(x[i], tokens[i]) for n, i in enumerate(places) if n // RUN % 2 == 0]  # the others decide
    ys = [(old.down @ torch.relu(old.up @ v) + 0.1 * v, new.down @ torch.relu(new.up @ v), w) for v, w in rows]
    mean = sum(w * y for y, _, w in ys) / sum(w for *_, w in ys)
    lost = sum(w * ((a - b).square() @ metric.dimensions) for a, b, w in ys)
    spread = sum(w * ((a - mean).square() @ metric.dimensions) for a, _, w in ys)
    judged = Judged(old, part, [torch.relu], torch.float32)
    given = judged.error(new, metric)
    assert given == pytest.approx(float(lost / spread), rel=1e-4)
    plain = judged.error(new, dataclasses.replace(metric, apart=None))
    assert plain != pytest.approx(given, rel=1e-3)  # the control: tokens weigh


def test_dimensions_of_routed_experts_weigh_as_their_norm_reads_them() -> None:
    model = FAMILIES["mixtral"].model()
    metrics = output_metric(model, ffns(model), [FAMILIES["mixtral"].inputs(model, seed=0)])
    assert all(float(each.dimensions.std()) > 0 and each.apart is None for each in metrics.values())


def test_a_large_dimension_hides_no_other_once_standardized() -> None:
    draw = torch.Generator().manual_seed(0)
    large, x, y = (torch.randn(500, width, generator=draw) for width in (1, 6, 6))
    one, other = torch.cat((100 * large, x), 1), torch.cat((100 * large, y), 1)
    assert linear_cka(one, other) > 0.99 > 0.3 > standardized_cka(one, other)
    z = (one - one.mean(0)) / one.std(0), (other - other.mean(0)) / other.std(0)
    assert standardized_cka(one, other) == pytest.approx(linear_cka(*z), rel=1e-4)
