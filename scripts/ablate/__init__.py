"""Grids of paired runs: see docs/ablations.md and `python -m scripts.ablate --help`."""
