"""Programs that share a piece of Y of `gemm_kernel` as a cluster: they run at once, on multiprocessors in one part of an NVIDIA
GPU (sm_90), and read and write each other's shared memory.

Each of them has some of the columns of W, and so sums of the whole piece. Each sends what it has of a part of the rows of x to
the program that has that part: all add up and write at once, where by way of global memory one would, after the others. Every
sum has one fixed order: that of the programs' ranks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .pieces import place

# All threads of the cluster have come here, and see what the others wrote.
_MEET = gl.constexpr("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;")
# Four numbers, $12 .. $15, to $4 in shared memory of the program of rank $8.
_SEND = gl.constexpr(
    "{ .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $4; mapa.shared::cluster.u32 a, a, $8;"
    " st.shared::cluster.v4.f32 [a], {$12, $13, $14, $15};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
_SEND_REGISTERS = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 8 + ["f"] * 4))
# Number $3 is added to the one at $1 in shared memory of the program of rank $2.
_ADD = gl.constexpr(
    "{ .reg .b32 a; .reg .f32 f; mov.u32 a, global_smem; add.u32 a, a, $1; mapa.shared::cluster.u32 a, a, $2;"
    " ld.shared::cluster.f32 f, [a]; add.f32 f, f, $3; st.shared::cluster.f32 [a], f; mov.b32 $0, $1; }"
)


def _receive(programs: int, apart: int) -> str:
    """PTX: four numbers, each the sum of those at $4 and at every `apart` bytes behind, of so many programs, from the beginning
    of all shared memory on."""
    lines = ["{ .reg .f32 t0, t1, t2, t3; .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $4;"]
    lines.append("ld.shared.v4.f32 {$0, $1, $2, $3}, [a];")
    for other in range(1, programs):
        lines.append(f"ld.shared.v4.f32 {{t0, t1, t2, t3}}, [a+{apart * other}];")
        lines += [f"add.f32 ${i}, ${i}, t{i};" for i in range(4)]
    return "\n".join([*lines, "}"])


SIZES = (2, 4, 8)  # programs of a cluster


def at_once(size: int, multiprocessors: int) -> int:
    """How many clusters of a size find room together on a GPU, each program on a multiprocessor of its own. A cluster is in one
    part of the GPU, and of an H100's these have 14, 16 or 18 multiprocessors."""
    return multiprocessors // size if size == 2 else multiprocessors // size * 3 // 4


_RECEIVE = gl.constexpr(
    {  # by size, and numbers that a program sends to each: 128 rows of W, and some of x
        (size, 128 * each): _receive(size, 512 * each) for size in SIZES for each in (16, 32, 64, 128)
    }
)
_RECEIVE_REGISTERS = gl.constexpr(",".join(["=&f"] * 4 + ["r"] * 4))


@gluon.jit
def meet(thread):
    """Waits for all threads of all programs of the cluster, and for what they wrote."""
    gl.inline_asm_elementwise(_MEET, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send(acc, rank, row, n, zero, SIZE: gl.constexpr):
    """The sums acc [rows of W, rows of x] to the programs that have these rows of x: to the beginning of their shared memory,
    4 bytes for each number of acc, once none of them needs it any more. rank: the program's own. zero: as `opaque_zero` has
    it."""
    EACH: gl.constexpr = acc.shape[1] // SIZE
    WARPS: gl.constexpr = acc.shape[0] // 16
    to = (rank * (16 * WARPS * EACH) + place(row, n % EACH, zero, WARPS)) * 4
    gl.inline_asm_elementwise(_SEND, _SEND_REGISTERS, [to, n // EACH + row * 0, acc], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def add(more, rank, row, n, BATCH: gl.constexpr, WARPS: gl.constexpr, SIZE: gl.constexpr):
    """What the program has sent, plus these numbers: `more` of row `row` and row n of x of the piece."""
    EACH: gl.constexpr = BATCH // SIZE
    to = (rank * (16 * WARPS * EACH) + place(row, n % EACH, 0, WARPS)) * 4
    gl.inline_asm_elementwise(_ADD, "=r,r,r,f", [to, n // EACH + row * 0, more], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def receive(row, n, zero, SIZE: gl.constexpr, WARPS: gl.constexpr):
    """The sums of what all programs have sent, [rows of W, rows of x that this program has]."""
    EACH: gl.constexpr = n.shape[1]
    at = place(row, n, zero, WARPS) * 4
    return gl.inline_asm_elementwise(
        _RECEIVE[(SIZE, 16 * WARPS * EACH)], _RECEIVE_REGISTERS, [at], dtype=gl.float32, is_pure=False, pack=4
    )
