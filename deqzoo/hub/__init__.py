"""Cards, verification and publishing of the zoo's checkpoints."""
