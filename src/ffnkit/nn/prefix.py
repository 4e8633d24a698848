"""peft's prefix around a model of any class."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForFeatureExtraction
from torch import Tensor


class PrefixModel(PeftModelForFeatureExtraction):
    """peft's model with a prefix, which hands its inputs on as they are, and what the model gives back.

    peft's own class for classifiers runs the head by itself, and the one for any class drops token types.
    """

    def forward(  # type: ignore[override]  # what is not named here goes on to the model as it is
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Any:
        """The model's outputs behind the prefix; input_ids and attention_mask are (batch, length)."""
        size = len(input_ids if input_ids is not None else inputs["inputs_embeds"])
        if attention_mask is not None:
            seen = attention_mask.new_ones(size, self.active_peft_config.num_virtual_tokens)
            attention_mask = torch.cat((seen, attention_mask), dim=1)
        prefix = self.get_prompt(size)
        return self.get_base_model()(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=prefix, **inputs
        )
