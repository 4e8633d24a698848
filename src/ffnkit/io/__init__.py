"""Files, and checkpoints as they lie on disk: written in one step, opened with one-line errors."""
