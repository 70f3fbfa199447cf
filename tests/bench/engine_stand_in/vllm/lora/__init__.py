"""Stands for vllm.lora."""
