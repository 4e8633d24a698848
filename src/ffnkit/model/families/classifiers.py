"""Classifiers of encoder-decoders for which transformers has none: Switch, Marian, Pegasus, LongT5, NLLB-MoE, ...

``AutoModelForSequenceClassification`` knows them once ffnkit is imported, and so do the checkpoints that name them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from types import ModuleType

    Model = PreTrainedModel
else:
    Model = object


class DecoderHead(nn.Module):
    """Dropout, linear, tanh, dropout, linear: (n, d) to (n, labels)."""

    def __init__(self, d: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(d, d)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d, labels)

    def forward(self, states: Tensor) -> Tensor:
        inner = torch.tanh(self.dense(self.dropout(states)))
        logits: Tensor = self.out_proj(self.dropout(inner))
        return logits


class OnDecoder(Model):
    """What these classes have in common: the decoder reads the text too, and its state at the end is classified.

    Source: the T5 and BART classifiers of transformers; the released code of MLP Fusion (arXiv 2307.08941v3) has the
        same for Switch.
    Differs: a text ends at its last end-of-text token that is no padding, and where there is none at its last token;
        those classes refuse texts that have different numbers of ends.
    """

    body: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.body(config))
        dropout = getattr(config, "classifier_dropout", None)
        self.classification_head = DecoderHead(config.hidden_size, config.num_labels, dropout or 0.0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Logits (n, labels), and with ``labels`` the loss; ``input_ids`` (n, tokens)."""
        more.pop("return_dict", None)
        outputs = getattr(self, self.base_model_prefix)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=shifted(input_ids, self.config) if decoder_input_ids is None else decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **{"use_cache": False, **more},
        )
        states = outputs.last_hidden_state
        ends = last(input_ids, attention_mask, self.config).to(states.device)
        logits = self.classification_head(states[torch.arange(len(ends), device=states.device), ends])
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return Seq2SeqSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


def shifted(ids: Tensor, config: Any) -> Tensor:
    """What the decoder reads: the text behind its start token, without its last token; (n, tokens).

    Raises:
        FfnkitError: the config names no token that the decoder could start with.
    """
    start = next((t for t in (config.decoder_start_token_id, config.pad_token_id) if t is not None), None)
    if start is None:
        found = "its config has neither decoder_start_token_id nor pad_token_id"
        raise FfnkitError(f"classifying with {config.model_type}", found, "Set one of them in its config.json")
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def last(ids: Tensor, mask: Tensor | None, config: Any) -> Tensor:
    """The place of each text's last end-of-text token, else of its last token; (n,)."""
    seen = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    if mask is None and config.pad_token_id not in (None, config.eos_token_id):
        seen = ids != config.pad_token_id
    named = config.eos_token_id if isinstance(config.eos_token_id, list | tuple) else [config.eos_token_id]
    ends = torch.isin(ids, ids.new_tensor([token for token in named if token is not None])) & seen
    places = torch.arange(ids.shape[1], device=ids.device)
    chosen = torch.where(ends.any(dim=1, keepdim=True), ends, seen)
    return (places * chosen).amax(dim=1)


def imported(models: ModuleType) -> None:
    """Register a classifier for the models of a module of transformers, where they have none."""
    for config in [each for each in vars(models).values() if isinstance(each, type) and each in MODEL_MAPPING]:
        if config not in AutoModelForSequenceClassification._model_mapping:
            AutoModelForSequenceClassification.register(config, classifier(MODEL_MAPPING[config]), exist_ok=True)


def classifier(body: Any) -> Any:
    """The classifier on a model without a head, named as transformers would."""
    name = f"{body.__name__.removesuffix('Model')}ForSequenceClassification"
    if hasattr(transformers, name):  # it is there, and only no Auto class knows it
        return getattr(transformers, name)
    family = next(each for each in body.__mro__[1:] if issubclass(each, PreTrainedModel))
    made = type(name, (OnDecoder, family), {"body": body, "__module__": __name__, "__doc__": OnDecoder.__doc__})
    setattr(sys.modules[__name__], name, made)  # where pickles look for it
    return made
