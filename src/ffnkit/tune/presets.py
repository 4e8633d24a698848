"""Training as the papers' released code has it, by paper and model. Light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffnkit.settings.presets import Preset

FUSION, MERGING = "MLP Fusion (arXiv 2307.08941), released code", "FFN merging (arXiv 2501.06126), released code"
_CLIPPED: Mapping[str, Any] = {"max_grad_norm": 1.0}
_SLOW: Mapping[str, Any] = {  # AdamW of transformers at that time: no weight decay
    "learning_rate": 5e-5, "schedule": "inverse_sqrt", "schedule_options": {"timescale": 10000}, "warmup": 0,
    "weight_decay": 0.0, **_CLIPPED,
}  # fmt: skip

TRAINING: Mapping[str, Preset] = {
    "mlp-fusion-glue": Preset(
        f"{FUSION}, RoBERTa; rates of 1, 2, 4, 6, 8e-5 are searched, in fp16",
        {
            "epochs": 10, "batch_size": 32, "learning_rate": 1e-5, "schedule": "polynomial", "warmup": 0.06,
            "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "max_length": 512, **_CLIPPED,
        },
    ),
    "mlp-fusion-webnlg": Preset(
        f"{FUSION}, GPT-2; rates of 2 and 5e-5",
        {
            "epochs": 10, "batch_size": 8, "learning_rate": 2e-5, "schedule": "linear", "warmup": 0.06,
            "weight_decay": 0.1, "early_stopping": 5, "best_metric": "loss", **_CLIPPED,
        },
    ),
    "mlp-fusion-switch": Preset(
        f"{FUSION}, Switch; the warm-up is 8 of 10 epochs, gradients are not clipped",
        {
            "epochs": 10, "batch_size": 64, "learning_rate": 1e-4, "schedule": "linear", "warmup": 0.8,
            "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "max_length": 100, "max_grad_norm": 0.0,
            "best_metric": "accuracy",
        },
    ),
    "ffn-merging-gpt2": Preset(
        f"{MERGING}; two GPUs with one row each, in fp16",
        {**_SLOW, "steps": 100000, "batch_size": 2, "max_length": 1024, "eval_every": 1000, "best_metric": "loss"},
    ),
    "ffn-merging-vit": Preset(
        f"{MERGING}, in fp16; the paper: up to 50,000 steps",
        {
            "steps": 20000, "batch_size": 128, "eval_batch_size": 256, "learning_rate": 5e-5, "schedule": "polynomial",
            "schedule_options": {"power": 1.0, "lr_end": 1e-6}, "warmup": 0, "weight_decay": 0.0, "eval_every": 3000,
            "best_metric": "accuracy", **_CLIPPED,
        },
    ),
    "ffn-merging-opus": Preset(
        f"{MERGING}, in fp16; the paper: up to 100,000 steps",
        {**_SLOW, "steps": 20000, "batch_size": 64, "max_length": 128, "eval_every": 3000, "best_metric": "bleu"},
    ),
}  # fmt: skip
