"""A run: the training loop, its folder, evaluation and progress."""
