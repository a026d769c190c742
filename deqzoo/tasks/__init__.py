"""Tasks: their batches, figures and evaluations."""
