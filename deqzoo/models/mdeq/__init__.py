"""Multiscale deep equilibrium models for images."""
