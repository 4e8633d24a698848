"""Tensors in, tensors out: the mathematics, with no knowledge of models."""
