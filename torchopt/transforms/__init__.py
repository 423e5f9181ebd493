"""Transformations that are no optimizers by themselves."""
