"""Layers shared by the model families. Each file has `specs` beside `apply`; a family file composes them."""
