"""One adapted linear layer: timed, tuned, predicted, and what it costs the host."""
