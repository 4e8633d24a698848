"""Prompts to answer in words: the task, its sets, decoding, and what all tasks of models that write share."""
