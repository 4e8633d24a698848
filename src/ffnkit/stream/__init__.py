"""Compressing a checkpoint from its files, for models that memory does not hold."""
