"""The dimension letters of mmfn: one table, used as suffixes of tensor names (`x_TD` is `[T, D]`).

A suffix states the logical shape. A scalar has none. Digits are literal sizes (`positions_3T` is `[3, T]`).
"""

DIMS = {
    "T": "packed tokens (queries)",
    "S": "packed tokens (keys)",
    "P": "vision patches",
    "A": "audio frames",
    "N": "images, clips or segments",
    "B": "rows of a batch (generation)",
    "D": "model width",
    "H": "query heads",
    "K": "key-value heads",
    "G": "query heads per key-value head (H / K)",
    "C": "channels of a head",
    "R": "rotated channel pairs; or routed rows",
    "F": "feed-forward width; or values of one flattened patch",
    "E": "experts",
    "X": "experts per token",
    "V": "vocabulary",
    "L": "layers",
    "W": "ranks of a mesh axis",
}
