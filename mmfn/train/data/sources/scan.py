"""Where the rows of a text file begin: whole blocks of bytes at once, without decoding them.

Legend: B bytes of a block, S its segments (what lies between line ends), N rows, G gaps.
"""

from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from mmfn.errors import UserError

BLOCK = 2**20  # what is worked on stays in the processor's cache
BOM = b"\xef\xbb\xbf"
_WHITE = np.isin(np.arange(256), list(b" \t\r\n"))
Array = npt.NDArray[np.int64]
Rows = Iterator[tuple[Array, Array]]
NO_GAPS: Array = np.zeros((0, 2), np.int64)


def scan_lines(file: IO[bytes], on_block: Callable[[bytes], object]) -> Rows:
    """The lines that hold more than white space, block by block: `(starts int64[N], gaps int64[G, 2])`.

    The last start is the end of the file. A gap is (row, blank lines before it), given where their number changes.
    `on_block` is called with every block.
    """
    at = start = len(BOM) * _has_bom(file, on_block)  # of the block; of the line that reaches into it
    row = line = shift = 0
    is_filled = False
    while block := file.read(BLOCK):
        on_block(block)
        bytes_B = np.frombuffer(block, np.uint8)
        ends_S = np.flatnonzero(bytes_B == ord("\n"))
        begins_S = np.concatenate([[0], ends_S + 1])
        filled_S = _filled(bytes_B, begins_S, np.concatenate([ends_S, [len(block)]]))
        filled_S[0] |= is_filled
        starts_S = begins_S + at
        starts_S[0] = start
        rows_N = np.flatnonzero(filled_S[:-1])
        blank_N = line + rows_N - (row + np.arange(len(rows_N)))  # before each row
        changes = np.flatnonzero(np.diff(blank_N, prepend=shift))
        yield starts_S[rows_N], np.stack([row + changes, blank_N[changes]], axis=1)
        shift = int(blank_N[-1]) if len(rows_N) else shift
        row, line, at = row + len(rows_N), line + len(ends_S), at + len(block)
        start, is_filled = int(starts_S[-1]), bool(filled_S[-1])
    last = [(row, line - row)] if is_filled and line - row != shift else []
    yield np.array([start] * is_filled + [at], np.int64), np.array(last, np.int64).reshape(-1, 2)


def scan_list(file: IO[bytes], on_block: Callable[[bytes], object]) -> Rows:
    """The elements of one JSON list, block by block, as `scan_lines` gives lines: from behind a comma to the next one.

    The last start is the place of the bracket that ends the list. Raises ValueError where there is none, or something
    behind it.
    """
    at = len(BOM) * _has_bom(file, on_block)
    depth, in_string, odd, end = 0, False, False, -1
    while block := file.read(BLOCK):
        on_block(block)
        bytes_B = np.frombuffer(block, np.uint8)
        begin = 0
        if end < 0:
            quotes_B = bytes_B == ord('"')
            odd = _drop_escaped(bytes_B, quotes_B, odd)
            quoted_B = np.bitwise_xor.accumulate(quotes_B.view(np.uint8))  # whether the quotes so far are odd
            folded_B = bytes_B | 0x20  # brackets become braces
            opens_B, closes_B = folded_B == ord("{"), folded_B == ord("}")
            places_M = np.flatnonzero(opens_B | closes_B | (bytes_B == ord(",")))
            places_M = places_M[quoted_B[places_M] == in_string]
            in_string ^= bool(quoted_B[-1])
            steps_M = opens_B[places_M].astype(np.int64) - closes_B[places_M]
            depths_M = depth + np.cumsum(steps_M)
            depth = int(depths_M[-1]) if len(places_M) else depth
            ends = np.flatnonzero((depths_M == 0) & (steps_M == -1))
            stop = int(ends[0]) if len(ends) else len(places_M)
            starts_N = at + 1 + places_M[:stop][(depths_M[:stop] == 1) & (steps_M[:stop] >= 0)]
            yield starts_N, NO_GAPS
            if len(ends):
                begin = int(places_M[stop]) + 1
                end = at + begin - 1
        if end >= 0 and not _WHITE[bytes_B[begin:]].all():
            raise UserError(f"something stands behind the end of the list, byte {end}")
        at += len(block)
    if end < 0:
        raise UserError("the list does not end")
    yield np.array([end], np.int64), NO_GAPS


def _has_bom(file: IO[bytes], on_block: Callable[[bytes], object]) -> bool:
    """Whether a file begins with a byte order mark; reading goes on behind it."""
    file.seek(0)
    if file.read(len(BOM)) == BOM:
        on_block(BOM)
        return True
    file.seek(0)
    return False


def _filled(bytes_B: npt.NDArray[np.uint8], begins_S: Array, ends_S: Array) -> npt.NDArray[np.bool_]:
    """Whether segments hold more than white space: nearly always their first byte tells."""
    padded = np.append(bytes_B, np.uint8(ord(" ")))
    filled_S = ~_WHITE[padded[begins_S]] & (begins_S < ends_S)
    doubt = np.flatnonzero(~filled_S & (ends_S > begins_S))
    if len(doubt):
        count_B = np.concatenate([[0], np.cumsum(~_WHITE[bytes_B])])
        filled_S[doubt] = count_B[ends_S[doubt]] > count_B[begins_S[doubt]]
    return filled_S


def _drop_escaped(bytes_B: npt.NDArray[np.uint8], quotes_B: npt.NDArray[np.bool_], odd: bool) -> bool:
    """Clear quotes behind an odd number of backslashes. `odd`, before and behind the block: such a number ends it."""
    slashes = np.flatnonzero(bytes_B == ord("\\"))
    if not len(slashes):
        quotes_B[0] &= not odd
        return False
    is_first = np.diff(slashes, prepend=-2) != 1
    runs = slashes[is_first]
    lengths = np.diff(np.append(np.flatnonzero(is_first), len(slashes)))
    if runs[0] == 0:
        lengths[0] += odd
    else:
        quotes_B[0] &= not odd
    behind = slashes[np.append(np.flatnonzero(is_first)[1:], len(slashes)) - 1] + 1
    escaped = behind[lengths % 2 == 1]
    quotes_B[escaped[escaped < len(bytes_B)]] = False
    return bool(escaped.size and escaped[-1] == len(bytes_B))
