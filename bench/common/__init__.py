"""What all benchmarks share: machine, clocks, statistics, flags, and how figures are shown."""
