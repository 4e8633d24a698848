"""How far a compressed model is from the uncompressed one, before it is tuned: kernels, FFN outputs, hidden states."""
