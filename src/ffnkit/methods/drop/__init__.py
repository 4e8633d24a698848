"""Methods that remove weights, heads, neurons or layers."""
