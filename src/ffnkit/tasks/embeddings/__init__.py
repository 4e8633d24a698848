"""Sentence embeddings: texts compared by the cosine of what a model makes of them."""
