"""The dimension letters of mmfn: one table, used as suffixes of tensor names (`x_TD` is `[T, D]`).

A suffix states the logical shape. A scalar has none. Digits are literal sizes (`positions_3T` is `[3, T]`). A letter
with two meanings has one in a file, which its legend says.
"""

DIMS = {
    "T": "packed tokens (queries)",
    "S": "packed tokens (keys); columns of a cache",
    "U": "inputs or units of an encoder; ranks that split heads",
    "P": "rows an encoder computes with",
    "I": "items of an encoder, which may lie on any rank",
    "M": "features of all ranks; tokens of a block",
    "N": "segments, features, images or clips; supervised tokens",
    "A": "micro-batches of a rank; adapters",
    "B": "rows of a batch (generation)",
    "D": "model width; ranks with their own data",
    "H": "query heads; height in pixels",
    "K": "key-value heads",
    "G": "query heads per key-value head (H / K); groups of rows",
    "C": "channels of a head",
    "R": "rotated channel pairs; routed rows",
    "F": "feed-forward width; values of one input of an encoder",
    "E": "experts",
    "X": "experts per token",
    "V": "vocabulary",
    "L": "layers; tokens of a row",
    "W": "ranks of a mesh axis; width in pixels",
}
