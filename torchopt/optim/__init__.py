"""Optimizers that hold parameters or a network: object-oriented and differentiable."""
