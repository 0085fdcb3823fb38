"""One network trained: recipe, loop, checkpoints."""
