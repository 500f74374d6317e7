"""Kernels that begin while the one before ends ("programmatic dependent launch"; NVIDIA, sm_90 on).

A kernel that is launched so may read what nobody writes, the stored matrix, at once: where that lies in one tensor, which only
copies by the driver make (`joined.py`). Single tensors may have been made by the kernel before. It waits before it reads what a
kernel before it may have written, and before it writes anything: memory may be that of a tensor that is still read.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def await_previous(pointers):
    """`pointers`, once all kernels before have ended and what they wrote is there. Returns at once in a launch of the usual
    kind."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b64 $0, $1;", "=l,l,~{memory}", [pointers], dtype=pointers.dtype, is_pure=False, pack=1
    )


@gluon.jit
def let_next_begin(thread):
    """The next kernel may begin once all programs have come here or ended. Behind `await_previous`: what comes next may read at
    once what this kernel does not write, but one before it did (Inductor's kernels, with its `triton.enable_pdl`)."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


NONE = {"DEPENDENT": False, "launch_pdl": False}


@cache
def options(device: torch.device, joined: bool = True) -> dict[str, bool]:
    """The constant DEPENDENT, whether a kernel overlaps with others, and Triton's option for its launch. joined: whether the
    stored matrix is one tensor."""
    if not joined:
        return NONE
    overlaps = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"DEPENDENT": True, "launch_pdl": True} if overlaps else NONE
