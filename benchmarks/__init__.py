"""Measurements behind what the documentation claims; ``python -m benchmarks`` runs them all."""
