"""Derivatives of a solution by the condition that it satisfies, not by the way to it."""
