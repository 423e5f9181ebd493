"""Data sets and task samplers shared by the examples."""
