"""Special linears: each keeps ``.weight`` and ``.bias`` under their usual names and folds to a plain layer."""
