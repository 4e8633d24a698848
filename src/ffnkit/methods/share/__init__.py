"""Methods that let layers share one FFN."""
