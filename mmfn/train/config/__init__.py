"""The settings of a run: what there is, how it is read, and what does not go together."""
