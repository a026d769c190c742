"""The model families, and `auto` that makes them known to transformers."""
