"""Healing: a compressed model learns from the one that it was, on text without labels."""
