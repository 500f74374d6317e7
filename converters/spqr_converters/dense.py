"""The dense tensors of an SpQR checkpoint, as torch has them."""

from __future__ import annotations

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint

TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def dense_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The tensor as it is stored. E505 for a dtype that torch computes nothing with (8-bit floats)."""
    kind = checkpoint.dtype_of(name)
    if kind not in TORCH:
        raise SpqrError("E505", name, f"stored as {kind}, which is not read here")
    array = np.array(checkpoint.read(name))
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if kind == "BF16" else torch.from_numpy(array)
