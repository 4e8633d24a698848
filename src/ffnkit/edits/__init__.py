"""The kinds of edits: what a plan is made of."""
