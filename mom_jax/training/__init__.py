"""The training loop and its parts: step, losses, optimizer, checkpoints."""
