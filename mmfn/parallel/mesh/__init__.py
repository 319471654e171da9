"""Ranks: the sizes of a mesh, one rank's axes and collectives, and what joins real or virtual ranks."""
