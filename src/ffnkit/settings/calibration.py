"""What calibration is unless it is told otherwise: what recipes, Python and the command line share. Light to import."""

from __future__ import annotations

TOKENS = 6400  # in all
MIX = 0.5  # the share that is of the text of many kinds, beside texts of the user's own
TEXT_COLUMN = "text"  # of tables
ROW_LENGTH, TEXT_LENGTH = 128, 512  # tokens of a task's row, and of a piece of running text, unless told otherwise
TEXTS_A_PASS = 16  # of ROW_LENGTH; fewer where they are longer
