"""Transforms of a program, one file each. A new one is a new file here."""
