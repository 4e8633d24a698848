"""Checkpoints: the two forms, the from_pretrained hook, adapters."""
