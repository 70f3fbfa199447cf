"""What tests/peft/sweep.py runs: small models of every architecture, the definition, the checks."""
