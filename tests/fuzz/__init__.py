"""The fuzz campaign: random cases, every one the same everywhere, against the oracle. `python -m tests.fuzz --help`."""
