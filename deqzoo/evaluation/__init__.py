"""Measurements on data sets, written as evaluation files."""
