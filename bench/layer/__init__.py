"""Benchmarks of one adapted linear layer: its time, tuning, prediction, and cost on the host."""
