"""What a lane of the tensor-core kernels loads: aligned words, straight into registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import ptx

# Triton 3.9 renamed it.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
commit_copies = async_copy.commit_group
wait_copies = async_copy.wait_group

_STREAM4 = gl.constexpr(ptx.load(4, ".L1::no_allocate"))  # weights are read once
_LOAD4 = gl.constexpr(ptx.load(4))
_LOAD4_REGISTERS = gl.constexpr(ptx.load_constraints(4))
_LOAD2 = gl.constexpr(ptx.load(2))
_LOAD2_REGISTERS = gl.constexpr(ptx.load_constraints(2))
_LOAD1 = gl.constexpr(ptx.load(1))
_LOAD1_REGISTERS = gl.constexpr(ptx.load_constraints(1))


@gluon.jit
def stream4(pointer):
    """Four words at a 16-byte boundary, not kept in L1."""
    return gl.inline_asm_elementwise(
        _STREAM4, _LOAD4_REGISTERS, [pointer], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def load4(pointer):
    """Four words at a 16-byte boundary."""
    return gl.inline_asm_elementwise(
        _LOAD4, _LOAD4_REGISTERS, [pointer], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def load2(pointer):
    """Two words at an 8-byte boundary."""
    return gl.inline_asm_elementwise(_LOAD2, _LOAD2_REGISTERS, [pointer], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def load1(pointer):
    """One word."""
    return gl.inline_asm_elementwise(_LOAD1, _LOAD1_REGISTERS, [pointer], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def index(pointer, mask, WIDE: gl.constexpr):
    """A CSR index; narrow ones are unsigned 16-bit integers."""
    value = gl.load(pointer, mask=mask, other=0)
    if WIDE:
        return value
    else:
        return value.to(gl.int32) & 0xFFFF


@gluon.jit
def funnel(low, high, shift):
    """Bits shift .. shift + 31 of (high, low), shift below 32."""
    return gl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=gl.int32, is_pure=True, pack=1
    )
