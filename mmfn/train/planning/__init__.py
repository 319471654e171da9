"""Plans of the training step a config describes, and the search for a layout."""
