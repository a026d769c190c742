"""How right and how costly the gradient modes are for a model."""
