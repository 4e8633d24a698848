"""The ways in which families write an FFN: a family is a row of ``LAYOUTS``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ffnkit._registry import added, not_of


@dataclass(frozen=True)
class Layout:
    """One way in which model families write an FFN: dotted paths from the module that owns its linears.

    Attributes:
        name: what the row is called in ``inspect``.
        up, down: the linears from d to ff and back.
        gate: the gate's linear; the name of ``up`` again where one linear holds the gate in its first half of rows.
        experts: the paths are 3-D parameters, (E, rows, columns), not linears.
        transposed: of experts: the parameters lie as (E, in, out), applied as ``x @ weight``.
        up_first: where one linear holds both, its first half is up and its second the gate.
        interleaved: where one parameter of experts holds both, rows of gate and up take turns.
        owner: the row holds for classes of this name only; "" for all.
        runs: config keys, where one module runs several times in a pass: so many layers run, and the product of the
            other numbers is how many there are.
    """

    name: str
    up: str
    down: str
    gate: str | None = None
    experts: bool = False
    transposed: bool = False
    up_first: bool = False
    interleaved: bool = False
    owner: str = ""
    runs: tuple[str, ...] = ()

    @cached_property
    def roots(self) -> frozenset[str]:
        """Where its paths begin: an owner has children of these names; none where they are parameters."""
        paths = () if self.experts else (self.up, self.gate or self.up, self.down)
        return frozenset(path.partition(".")[0] for path in paths)

    @property
    def fused(self) -> bool:
        return self.gate == self.up


# Gated rows come first: a gated FFN also has an up and a down.
LAYOUTS: list[Layout] = [
    Layout("gated", "up_proj", "down_proj", gate="gate_proj"),  # LLaMA, OLMo, Mistral, Qwen, Gemma, shared experts
    Layout(
        "Phi-4 audio", "gate_up_proj", "down_proj", gate="gate_up_proj", up_first=True, owner="Phi4MultimodalAudioMLP"
    ),
    Layout("gated fused", "gate_up_proj", "down_proj", gate="gate_up_proj"),  # Phi-3, GLM
    Layout("gated experts", "gate_up_proj", "down_proj", gate="gate_up_proj", experts=True),  # Mixtral, OLMoE
    Layout(
        "gated experts transposed", "gate_up_proj", "down_proj", gate="gate_up_proj", experts=True, transposed=True
    ),  # Llama 4, Aria
    Layout(
        "gated experts in turns",
        "gate_up_proj",
        "down_proj",
        gate="gate_up_proj",
        experts=True,
        transposed=True,
        interleaved=True,
    ),  # GPT-OSS
    Layout("gated experts apart", "up_proj", "down_proj", gate="gate_proj", experts=True),  # Inkling's shared experts
    Layout("experts", "up_proj", "down_proj", experts=True),
    Layout("LFM2", "w3", "w2", gate="w1"),
    Layout("T5 gated", "wi_1", "wo", gate="wi_0"),
    Layout("T5", "wi", "wo"),  # also every expert of Switch
    Layout("ModernBERT", "Wi", "Wo", gate="Wi"),
    Layout("BERT", "intermediate.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa, BEiT, Swin
    Layout("wav2vec2", "intermediate_dense", "output_dense"),
    Layout("DistilBERT", "lin1", "lin2"),
    Layout("GPT-2", "c_fc", "c_proj"),  # Conv1D in GPT-2, Linear in GPT-Neo and StarCoder2
    Layout("fc", "fc1", "fc2"),  # ViT, CLIP, OPT, BART, Marian, mBART, Whisper, Phi
    Layout("GPT-NeoX", "dense_h_to_4h", "dense_4h_to_h"),  # also BLOOM, Falcon
    Layout("GPT-J", "fc_in", "fc_out"),
    Layout("ALBERT", "ffn", "ffn_output", runs=("num_hidden_layers", "num_hidden_groups", "inner_group_num")),
    Layout("PVT", "dense1", "dense2", owner="PvtFFN"),  # of the same names: heads of OWL-ViT, adapters of X-MOD
    Layout("plain", "up_proj", "down_proj"),  # Nemotron, MPT
]


def _wrong(row: object) -> str:
    return not_of(row, Layout)


def layouts() -> list[Layout]:
    """The rows in the order in which they are tried; other packages' (entry points ``ffnkit.families``) come last.

    A row for classes of one name comes before all: it can be meant for nothing else.
    """
    every = [*LAYOUTS, *(row for _, row in added("ffnkit.families", _wrong))]
    return [row for row in every if row.owner] + [row for row in every if not row.owner]
