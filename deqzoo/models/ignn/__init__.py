"""Implicit graph neural networks."""
