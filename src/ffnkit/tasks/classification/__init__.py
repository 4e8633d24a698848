"""Labelled texts, as classes or numbers: the task, GLUE, files of the user's own, label words."""
