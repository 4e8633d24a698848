"""The families of models, a row each."""
