"""Carrying plans out. Besides what docs/design.md lists, nothing else changes a model."""
