"""The plugin that teaches stock vLLM to serve Activated LoRA. Importing it needs no vLLM."""
