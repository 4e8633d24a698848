"""Data passes through a model: what FFNs see, and statistics of it."""
