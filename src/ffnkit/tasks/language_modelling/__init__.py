"""Plain text: the task, its sets, and the perplexity by a window that moves."""
