"""Widths by layer under one budget of FFN parameters."""
