"""A linear layer whose weight stays packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout
from spqr_format.matrix import SpqrMatrix
from spqr_kernels import dequantize, linear

DTYPES = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}  # of TensorSpec


class SpqrLinear(nn.Linear):
    """y = x W^T + bias, with W [out_features, in_features] stored as the tensors of `layout` (spec 5).

    Every stored tensor is a parameter of its leaf name (int32, int16 or uint8, no gradient): parameters are what
    device_map, offloading and sharding move, and integers are what `.to(dtype)` leaves alone. The packed codes are
    called `weight`, where PEFT and transformers look for a device. A subclass of nn.Linear, so that PEFT adapts it.
    """

    layout: Layout | None
    leaves: tuple[str, ...]
    _is_hf_initialized: bool

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Empty parameters of the shapes of `layout`; dtype is that of the bias [out_features]."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        self.in_features, self.out_features = layout.in_features, layout.out_features
        empty = nn.Parameter(torch.empty(layout.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty)
        self.shape_as(layout, device)

    @classmethod
    def awaiting(cls, dense: nn.Linear) -> SpqrLinear:
        """A layer whose `weight` is still the dense layer's placeholder, for weights that are quantized while loading.

        The placeholder is floating point because transformers before 5.23 casts what it reads to the placeholder's
        dtype before it quantizes: an integer one would turn every weight into 0.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = dense.in_features, dense.out_features
        layer.layout = None
        layer.weight = dense.weight
        layer.register_parameter("bias", dense.bias)  # type: ignore[arg-type]  # typed as a Tensor, and a Parameter
        return layer

    @classmethod
    def from_matrix(cls, matrix: SpqrMatrix, bias: Tensor | None = None) -> SpqrLinear:
        """A layer that computes with `matrix`, on the CPU."""
        layer = cls(matrix.layout)
        for leaf, tensor in torch_tensors(matrix).items():
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def shape_as(self, layout: Layout, device: torch.device | str | None) -> None:
        """Gives this layer the parameters of `layout`, empty, on `device`."""
        self.layout = layout
        for leaf, spec in layout.tensors().items():
            empty = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        # The stored names, in a tuple: torch.compile then sees a constant.
        self.leaves = tuple(layout.tensors())
        self._is_hf_initialized = True  # transformers must not try to draw random codes

    def reset_parameters(self) -> None:
        """Nothing: packed codes have no random initial value."""

    def tensors(self) -> dict[str, Tensor]:
        """Leaf name -> stored tensor."""
        return {leaf: getattr(self, leaf) for leaf in self.leaves}

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features], fp16, bf16 or fp32, to [..., out_features] in the same dtype."""
        return linear(input, self.tensors(), self.layout, self.bias)  # type: ignore[arg-type]  # None only while loading

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense layer of the same numbers. Raises SpqrError E508 while the tensors are offloaded."""
        if self.weight.is_meta or self.layout is None:
            raise SpqrError("E508", "dequantize", "the packed tensors are offloaded; load the model without offloading")
        with torch.device("meta"):  # the dense weight is allocated once, by `dequantize`
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        dense.weight = nn.Parameter(dequantize(self.tensors(), self.layout, dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.layout is None:
            return shape
        size = self.layout
        outliers = f", outliers={size.outliers}" if size.outliers else ""
        permuted = ", permuted" if size.permuted else ""
        bits = f"weight_bits={size.weight_bits}, group_size={size.group_size}"
        return f"{shape}, {bits}, {size.statistics}{outliers}{permuted}"


def torch_tensors(matrix: SpqrMatrix) -> dict[str, Tensor]:
    """Leaf name -> stored tensor of `matrix`, on the CPU."""
    arrays: dict[str, Any] = matrix.pack()
    return {leaf: torch.from_numpy(np.ascontiguousarray(array)) for leaf, array in arrays.items()}
