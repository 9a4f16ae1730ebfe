"""The order in which programs walk the tiles of a symmetric matrix, so that neighbours read few column panels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(i_tile, GROUP: tl.constexpr):
    """Tile number → (row, column) of the lower triangle, GROUP rows at a time; rows beyond the matrix may come out."""
    # groups before g hold (u² + u) / 2 tiles, u = GROUP·g; the square root is float32, hence the fix-up
    i_group = ((tl.sqrt(8.0 * i_tile + 1.0) - 1.0) / (2 * GROUP)).to(tl.int32)
    i_first = i_group * GROUP
    i_group = tl.where(i_first * (i_first + 1) // 2 > i_tile, i_group - 1, i_group)
    i_next = (i_group + 1) * GROUP
    i_group = tl.where(i_next * (i_next + 1) // 2 <= i_tile, i_group + 1, i_group)
    i_first = i_group * GROUP
    i_rest = i_tile - i_first * (i_first + 1) // 2
    # the square part column by column, then the triangle on the diagonal
    i_inner = i_rest - i_first * GROUP
    i_row = ((tl.sqrt(8.0 * tl.maximum(i_inner, 0) + 1.0) - 1.0) / 2).to(tl.int32)
    i_row = tl.where(i_row * (i_row + 1) // 2 > i_inner, i_row - 1, i_row)
    i_row = tl.where((i_row + 1) * (i_row + 2) // 2 <= i_inner, i_row + 1, i_row)
    i_column = i_inner - i_row * (i_row + 1) // 2
    in_square = i_inner < 0
    return (
        i_first + tl.where(in_square, i_rest % GROUP, i_row),
        tl.where(in_square, i_rest // GROUP, i_first + i_column),
    )
