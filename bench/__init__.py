"""The benchmarks; `python bench/run.py` runs them, docs/benchmark.md explains them."""
