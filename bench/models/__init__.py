"""Whole models: a training step, a decoding step, and many adapters over one context."""
