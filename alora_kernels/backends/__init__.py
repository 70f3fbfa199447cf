"""The backends: each computes the operation of `contract` in its own way."""
