"""A linear layer whose weight stays packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout
from spqr_format.matrix import SpqrMatrix
from spqr_kernels import dequantize
from spqr_kernels.eager import OneRow
from spqr_kernels.joined import TORCH_DTYPES, join, places, split
from spqr_kernels.ops import asks_for_gradient, geometry, layout_of

from .siblings import Siblings


class SpqrLinear(nn.Linear):
    """y = x W^T + bias, with W [out_features, in_features] stored as the tensors of `layout` (spec 5).

    Every stored tensor is a parameter of its leaf name (int32, int16 or uint8, no gradient): parameters are what
    device_map, offloading and sharding move, and integers are what `.to(dtype)` leaves alone. The packed codes are
    called `weight`, where PEFT and transformers look for a device. A subclass of nn.Linear, so that PEFT adapts it.

    On a GPU `join` makes them views of one tensor, the only input that a compiled graph has for them. Whether they still
    are is looked at in every forward that is not compiled and whenever something is assigned to the module; if not, forward
    goes back to the single tensors. Only what writes past both, as `layer.weight.data = ...`, goes unseen by a model that is
    compiled already.
    """

    layout: Layout | None
    leaves: tuple[str, ...]
    geometry: tuple[int | bool, ...]  # the operator's view of `layout`
    joined: Tensor | None = None  # int32, what `spqr_kernels.joined.join` makes of all
    _places: tuple[tuple[str, nn.Parameter, int], ...] = ()  # leaf, parameter, and at which byte of `joined` it begins
    _one_row: OneRow | None = None  # the way of eager calls with one row of x
    siblings: Siblings | None = None  # layers that are called with the same input
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
        self.geometry = geometry(layout)
        self.layout = layout = layout_of(*self.geometry)  # the operator's own: what is looked up by it is found at once
        for leaf, spec in layout.tensors().items():
            empty = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        # In tuples: torch.compile then sees constants.
        self.leaves = tuple(layout.tensors())
        self._is_hf_initialized = True  # transformers must not try to draw random codes

    def reset_parameters(self) -> None:
        """Nothing: packed codes have no random initial value."""

    def tensors(self) -> dict[str, Tensor]:
        """Leaf name -> stored tensor."""
        return {leaf: getattr(self, leaf) for leaf in self.leaves}

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features], fp16, bf16 or fp32, to [..., out_features] in the same dtype."""
        if torch.compiler.is_dynamo_compiling():  # which cannot ask where a tensor lies, and guards that `joined` is there
            whole = self.joined
        elif torch.compiler.is_exporting():  # the program would have the joined tensor beside the parameters
            whole = None
        else:
            if self.siblings is not None and not input.is_inference():
                found = self.siblings.product(self, input)
                if found is not None:
                    return found
            whole = self.joined if self.is_joined() else None
            if whole is not None and input.numel() == self.in_features:
                found = self._product_of_row(input, whole)
                if found is not None:
                    return found
        stored = [getattr(self, leaf) for leaf in self.leaves] if whole is None else [whole]
        differentiable = asks_for_gradient(input, self.bias)
        operator = torch.ops.spqr.linear if differentiable else torch.ops.spqr.linear_forward
        result: Tensor = operator(input, self.bias, stored, *self.geometry)
        return result

    def _product_of_row(self, x: Tensor, whole: Tensor) -> Tensor | None:
        """The output for a row of x past the dispatcher, where there is that way."""
        bias, way = self._parameters["bias"], self._one_row
        if asks_for_gradient(x, bias):
            return None
        if way is None or not way.is_of((whole,), (bias,)):
            assert self.layout is not None
            way = self.__dict__["_one_row"] = OneRow((whole,), (self.layout,), (bias,))
        found = way(x)
        return found[0] if found is not None else None

    def join(self, on_cpu: bool = True) -> None:
        """Makes the stored tensors views of one, unless they are, or are not all on one device (never on `meta`).

        Copies them once. Parameters stay the same objects. on_cpu=False leaves those on a CPU: they may be mapped from a
        file, which takes no memory of its own and is shared between processes, and a product takes long beside its call.
        """
        if self.layout is None or self.is_joined() or (self.weight.is_cpu and not on_cpu):
            return
        tensors: dict[str, Tensor] = {}
        for leaf, place in places(self.layout).items():
            parameter = self._parameters.get(leaf)
            if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.is_inference() or parameter.requires_grad:
                return
            if (parameter.dtype, parameter.shape, parameter.device) != (place.dtype, place.shape, self.weight.device):
                return
            tensors[leaf] = parameter
        self.lie_in(join(tensors, self.layout))

    def is_joined(self) -> bool:
        """Whether every stored tensor lies where `join` put it. If not, the tensor that held them is let go."""
        if self.joined is None:
            return False
        begin = self.joined.data_ptr()
        for leaf, parameter, offset in self._places:
            if self._parameters.get(leaf) is not parameter or parameter.data_ptr() != begin + offset:
                self.joined, self._places = None, ()
                self._forget()
                return False
        return True

    def lie_in(self, whole: Tensor) -> None:
        """Makes every stored tensor a view of `whole`, in which `spqr_kernels.joined.join` has put them."""
        assert self.layout is not None
        found = []
        for leaf, view in split(whole, self.layout).items():
            parameter = self._parameters.get(leaf)
            if parameter is None:
                parameter = self._parameters[leaf] = nn.Parameter(view, requires_grad=False)
            parameter.data = view
            found.append((leaf, parameter, view.data_ptr() - whole.data_ptr()))
        self._places = tuple(found)
        # Past nn.Module, which would register it. A parameter nevertheless: CUDA graphs copy what is none at each replay.
        self.__dict__["joined"] = nn.Parameter(whole, requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A tensor, or the hook of accelerate, which has replaced tensors past this method by now.
        if name not in ("joined", "_places"):
            self.is_joined()
            self._forget()

    def _forget(self) -> None:
        """What siblings have computed for this layer, and what is held of its tensors, before it changed."""
        self.__dict__["_one_row"] = None
        if self.siblings is not None:
            self.siblings.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> SpqrLinear:
        joined = self.joined is not None
        super()._apply(fn, recurse)
        self.join(on_cpu=joined)
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        joined = self.joined is not None
        super()._load_from_state_dict(*args, **kwargs)
        self.join(on_cpu=joined)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Of joined tensors the one that holds them: a copy of each would bring all of it along."""
        whole = self.is_joined()  # first of all: it may let go what was joined
        state = {name: value for name, value in self.__dict__.items() if name not in ("_places", "_one_row")}
        if self.joined is not None and self.joined.untyped_storage().nbytes() > self.joined.nbytes:  # a piece of a pool
            state["joined"] = nn.Parameter(self.joined.detach().clone(), requires_grad=False)
        if whole:
            state["_parameters"] = {name: None if name in self.leaves else p for name, p in self._parameters.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.joined is not None:
            self.lie_in(self.joined.data)

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
