"""Metrics by name: of labels and numbers, and of generated texts."""
