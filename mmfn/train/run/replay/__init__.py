"""A step of a run once more: whether it is the same, and what differs first where it is not."""
