"""The training loop and what it needs: loss, checkpoints, several processes."""
