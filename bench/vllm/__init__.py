"""Adapters on a stock vLLM engine, which runs in a process and an environment of its own."""
