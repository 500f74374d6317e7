"""What is timed: our product and its peers'. Each makes a random matrix of its own kind and says what exactly it stands for."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from random_weights import random_tensors
from torch import Tensor

from spqr_format.layout import Layout, Statistics
from spqr_kernels import reference
from spqr_kernels.joined import join
from spqr_kernels.ops import geometry

TILE = 16
GEMLITE_GROUP = 128
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A matrix to multiply with: its shape out x in, the share of outliers, and how ours is quantized."""

    shape: tuple[int, int]
    share: float = 0.0
    weight_bits: int = 3
    statistics: Statistics = "bilevel"
    group_size: int = 16

    @property
    def layout(self) -> Layout:
        """Ours, still without outliers."""
        return Layout(*self.shape, self.weight_bits, self.group_size, self.statistics)


@dataclass(frozen=True)
class Matrix:
    """One stored matrix: `bind` makes a product x [batch, in] -> y [batch, out] of these tensors or of a copy of them."""

    tensors: list[Tensor]
    bind: Callable[[list[Tensor]], Product]
    exact: Callable[[], Tensor]  # float64 [out, in]: what the stored tensors say, without rounding
    dtype: torch.dtype = torch.float16  # of x

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read of the matrix."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Peer:
    """A kind of product. `fields` are those of Case that it depends on; of cases that agree in them one is measured."""

    make: Callable[[Case, str], Matrix]
    fields: tuple[str, ...]
    module: str | None = None  # what must be installed
    fits: Callable[[Case], bool] = lambda case: True
    largest_batch: int = 2**31
    late: bool = False  # measured after the others, as it tunes itself

    def key(self, case: Case) -> tuple[object, ...]:
        """Equal for cases that are one to this peer."""
        return tuple(getattr(case, name) for name in self.fields)


def state(peer: Peer) -> str:
    """The version of what is installed, `absent`, or `failed: why` where it does not import (or compile)."""
    if peer.module is None:
        return torch.__version__
    try:
        importlib.import_module(peer.module)
        return importlib.metadata.version(peer.module)
    except ModuleNotFoundError as error:
        return "absent" if error.name == peer.module else f"failed: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _ours(case: Case, device: str, dtype: torch.dtype) -> Matrix:
    """As a layer calls it: the stored tensors in one. dtype: of x."""
    tensors, layout = random_tensors(case.layout, case.share, 0, device)
    numbers = geometry(layout)

    def bind(copies: list[Tensor]) -> Product:
        return lambda x: torch.ops.spqr.linear_forward(x, None, copies, *numbers)

    return Matrix([join(tensors, layout)], bind, lambda: reference.dequantize(tensors, layout).double(), dtype)


def _dense(case: Case, device: str, dtype: torch.dtype) -> Matrix:
    weight = (torch.randn(*case.shape, device=device) * 0.02).to(dtype)
    return Matrix([weight], lambda t: lambda x: torch.nn.functional.linear(x, t[0]), weight.double, dtype)


def _csr(case: Case, device: str) -> Matrix:
    """The dequantized rest in fp16 by cuBLAS plus the outliers by cuSPARSE. On a CPU fp32: torch has no fp16 CSR there."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    tensors, _ = random_tensors(case.layout, case.share, 0, device)
    rest = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in ("outlier_ptr", "outliers")}
    dense = reference.dequantize(rest, case.layout).to(dtype)
    crow, columns, values = csr(tensors, case.shape)
    values = values.to(dtype)

    def bind(copies: list[Tensor]) -> Product:
        sparse = torch.sparse_csr_tensor(*copies[1:], size=case.shape, check_invariants=False)

        def product(x: Tensor) -> Tensor:
            y = torch.nn.functional.linear(x, copies[0])
            return y + (torch.mv(sparse, x[0]) if x.shape[0] == 1 else (sparse @ x.T).T)

        return product

    return Matrix([dense, crow, columns, values], bind, lambda: reference.add_outliers(dense.double(), tensors), dtype)


def csr(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The outliers as int32 crow_indices [out + 1] and col_indices and float16 values [outliers]."""
    rows, columns, values = reference.outliers(tensors, shape[1])
    order = (rows * shape[1] + columns).argsort()
    counts = rows.bincount(minlength=shape[0])
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(), columns[order].int(), values[order]


def spqr_words(out: int, inn: int, device: str) -> Tensor:
    """Random int64 words of spqr_quant [out / 16, in / 16, 16]: a word is a row of a 16 x 16 tile (`tile_weights`)."""
    tiles = (out // TILE, inn // TILE)
    scale = torch.rand(tiles, device=device) * 0.002 + 0.001
    zero = torch.rand(tiles, device=device) * 0.2 + 0.1
    stats = torch.stack([scale, zero, -2 - torch.rand(tiles, device=device), 3.5 - 3.5 / zero], -1).half()
    words = torch.randint(2**54, (*tiles, TILE), device=device)
    return words | stats.view(torch.uint8).long().repeat_interleave(2, -1) << 54


def tile_weights(words: Tensor) -> Tensor:
    """float64 [out, in] of spqr_quant's words: bits 0-2 scale code, 3-5 zero code, 6-53 sixteen codes, 54-61 a byte of the
    tile's four fp16 second-order statistics, which rows 2b and 2b + 1 both carry."""
    stats = (words[..., ::2] >> 54).to(torch.uint8).contiguous().view(torch.float16).double()
    scale, zero, scale_zero, zero_zero = (stats[..., i, None] for i in range(4))
    scales = scale * ((words & 7) - scale_zero)
    zeros = zero * ((words >> 3 & 7) - zero_zero)
    codes = words[..., None] >> torch.arange(6, 54, 3, device=words.device) & 7
    weight = scales[..., None] * (codes - zeros[..., None])
    return weight.transpose(1, 2).reshape(words.shape[0] * TILE, words.shape[1] * TILE)


def _spqr_quant(case: Case, device: str) -> Matrix:
    """spqr_quant's own kernel and layout (CSR). Its module waits for the GPU after each call, which no graph can capture;
    the flag here is the one it has for not waiting. A batch is a loop over rows, as in its module."""
    from spqr_quant.inference import FeatureFlags
    from spqr_quant.inference_kernels.cuda_kernel import call_spqr_mul

    out, inn = case.shape
    words = spqr_words(out, inn, device)
    tensors, layout = random_tensors(case.layout, case.share, 0, device)
    if layout.outliers:
        crow, columns, values = csr(tensors, case.shape)
        entries = values.view(torch.int16).int() << 16 | columns
    else:
        crow = torch.zeros(out + 1, dtype=torch.int32, device=device)
        entries = torch.zeros(0, dtype=torch.int32, device=device)

    def bind(copies: list[Tensor]) -> Product:
        dense, offsets, outliers = copies

        def product(x: Tensor) -> Tensor:
            y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
            for i in range(x.shape[0]):
                call_spqr_mul(
                    out, inn, 3, TILE, TILE, dense, offsets, outliers, outliers.numel(), x[i],
                    int(FeatureFlags.SPARSE_FUSED_FP32_ASYNC), y[i], y[i],
                )  # fmt: skip
            return y

        return product

    def exact() -> Tensor:
        weight = tile_weights(words)
        return reference.add_outliers(weight, tensors) if layout.outliers else weight

    return Matrix([words.view(-1), crow, entries], bind, exact)


def gemlite_config(device: str) -> Path:
    """Where the outcome of gemlite's tuning on this GPU is kept (`tune_gemlite.py`)."""
    name = torch.cuda.get_device_name() if device != "cpu" else device
    return Path(__file__).parent / "results" / f"gemlite-{name.lower().replace(' ', '-')}.json"


def gemlite_load(device: str, config: Path | None = None) -> None:
    """What was tuned on this GPU before is used; other shapes gemlite tunes at their first call, in some ten seconds each."""
    import gemlite

    config = config or gemlite_config(device)
    gemlite.reset_config()
    if config.exists():
        json.loads(config.read_text())  # gemlite only logs a broken file
        gemlite.load_config(str(config))


def _gemlite(case: Case, device: str) -> Matrix:
    """4 bits, groups of 128 with fp16 scales and zeros: 4.25 bits a weight. It has no 3 bits."""
    import gemlite

    out, inn = case.shape
    groups = inn // GEMLITE_GROUP
    codes = torch.randint(16, case.shape, dtype=torch.uint8, device=device)
    scales = torch.rand(out * groups, 1, device=device).half() * 0.003 + 0.002
    zeros = torch.rand(out * groups, 1, device=device).half() * 3 + 6
    made = gemlite.GemLiteLinear(4, GEMLITE_GROUP, inn, out, gemlite.DType.FP16, gemlite.DType.FP16)
    made.pack(codes, scales, zeros, None)
    meta = made.get_meta_args()

    def bind(copies: list[Tensor]) -> Product:
        return lambda x: gemlite.forward_functional(x, None, copies, meta)

    def exact() -> Tensor:
        # it keeps -zero * scale, rounded, for one multiply-add; both are [groups, out]
        scale, offset = (t.double().T.repeat_interleave(GEMLITE_GROUP, 1) for t in (made.scales, made.zeros))
        return scale.mul_(codes).add_(offset)

    return Matrix([tensor.detach() for tensor in made.get_tensor_args()], bind, exact)


def _fits_spqr_quant(case: Case) -> bool:
    tiles = case.shape[0] % TILE == 0 and case.shape[1] % TILE == 0
    return case.weight_bits == 3 and case.statistics == "bilevel" and tiles


_EVERY_FIELD = ("shape", "share", "weight_bits", "statistics", "group_size")
PEERS = {
    "ours": Peer(partial(_ours, dtype=torch.float16), _EVERY_FIELD),
    "ours_bf16": Peer(partial(_ours, dtype=torch.bfloat16), _EVERY_FIELD),
    "fp16": Peer(partial(_dense, dtype=torch.float16), ("shape",)),
    "bf16": Peer(partial(_dense, dtype=torch.bfloat16), ("shape",)),
    "spqr_quant": Peer(_spqr_quant, ("shape", "share"), "spqr_quant", _fits_spqr_quant, largest_batch=16),
    "csr": Peer(_csr, ("shape", "share"), fits=lambda c: c.share > 0),
    "gemlite": Peer(_gemlite, ("shape",), "gemlite", lambda c: c.shape[1] % GEMLITE_GROUP == 0, late=True),
}
