"""A stored matrix by where its one tensor begins (`joined`), and at which word of that what else it has: for kernels that reach
several."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import Layout

from .joined import places

FIELDS = 4  # of `words_of`


def words_of(layout: Layout) -> list[int]:
    """At which word of the joined tensor scales, zeros (or what there is of two levels), pointers and outliers begin."""
    found = places(layout)
    statistics = ("stat_codes", "tile_stats") if layout.statistics == "bilevel" else ("group_sc", "group_zp")
    sparse = ("outlier_ptr", "outliers") if layout.outliers else ()
    begins = [found[leaf].begin * found[leaf].dtype.itemsize // 4 for leaf in (*statistics, *sparse)]
    return begins + [0] * (FIELDS - len(begins))


@gluon.jit
def leaves_in(Joined, words):
    """Pointers to Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers and Outliers of the matrix that lies in `Joined`, by
    its `words_of`. Those that the matrix does not have point elsewhere."""
    scales = Joined + gl.multiple_of(words[0], 32)
    zeros = Joined + gl.multiple_of(words[1], 32)
    return (
        Joined, scales, zeros.to(gl.pointer_type(gl.int16)), scales.to(gl.pointer_type(gl.int16)),
        zeros.to(gl.pointer_type(gl.uint8)), Joined + gl.multiple_of(words[2], 32), Joined + gl.multiple_of(words[3], 32),
    )  # fmt: skip
