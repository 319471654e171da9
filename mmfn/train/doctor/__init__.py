"""`mmfn doctor`: what a machine has, and whether its parts go together."""
