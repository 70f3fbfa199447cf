"""The backends: implementations of the masked-LoRA linear, as `contract.Backend` describes it."""
