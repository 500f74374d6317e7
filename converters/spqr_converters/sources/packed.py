"""What GPTQ and AWQ checkpoints share: integer codes with a scale and an integer zero a group, packed into 32-bit words."""

from __future__ import annotations

import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import MAX_JSON_BYTES, Header, read_header, short, strict_json
from spqr_format.layout import MAX_DIMENSION, MAX_ELEMENTS, TILE, WEIGHT_BITS, Layout, ceil_div
from spqr_format.matrix import PackedMatrix, SpqrMatrix

from .base import Carried, Entry, Source, read_config
from .dense import DTYPES

Bytes = npt.NDArray[np.uint8]
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPTION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_MAX_HEADER = 10_000_000  # bytes: some 80,000 tensors in one file
_CHUNK = 1 << 17  # weights that are dequantized at once: what a core keeps near
_ADVICE = "convert without --lossless: that quantizes the dequantized weights anew"


@dataclass(frozen=True)
class Module:
    """One quantized linear layer as the headers show it: W[rows, columns] of `bits` bits in `groups` groups.

    leaves: leaf name -> stored tensor. group_size: columns of a group where `g_idx` does not say. kind: its packing.
    """

    name: str
    leaves: dict[str, Entry]
    rows: int
    columns: int
    bits: int
    groups: int
    group_size: int
    kind: str

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass
class Parts:
    """What a module stores, unpacked: W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]) with g = g_idx[i].

    codes uint8 [rows, columns]; zeros int16 [rows, groups]; scales [rows, groups]; g_idx int64 [columns] or None, then
    group i // group_size. offsets [rows, groups], where the source adds a rounded -scale * zero instead of the zero.
    """

    codes: Bytes
    zeros: npt.NDArray[np.int16]
    scales: torch.Tensor
    g_idx: npt.NDArray[np.int64] | None = None
    offsets: torch.Tensor | None = None


@dataclass
class CarriedWords:
    """words int32 as the format stores them; zeros int16 and scales [rows, groups] as in `Parts`; codes(begin, end): codes
    uint8 of some rows, from the source's words."""

    words: npt.NDArray[np.int32]
    zeros: npt.NDArray[np.int16]
    scales: torch.Tensor
    codes: Callable[[int, int], Bytes]


class PackedSource(Source):
    """A folder whose safetensors hold packed integer codes. Everything is checked from the headers when it is opened, so
    that nothing is reserved for sizes that the files do not have; values are checked when a module is read."""

    leaves: ClassVar[tuple[str, ...]]  # what belongs to a module; the first one tells that there is one

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config = read_config(self.folder)
        self.options = quantization_options(self.folder, config)
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self.files = weight_files(self.folder)
        self.metadata: dict[str, str] = {}
        self._stored = self._read_headers()
        self._modules: dict[str, Module] = {}
        self._notes: dict[str, str] = {}
        self._kept: dict[str, Parts] = {}  # `matrix` and `load` of one module follow each other: unpacked once
        self._check_options()
        self._find_modules()

    # What a kind fills in

    def _check_options(self) -> None:
        """Refuse what the options ask for and this kind does not read. E501."""

    @abstractmethod
    def _module(self, name: str, leaves: dict[str, Entry]) -> Module:
        """The geometry of a module from the shapes of its tensors. E501 where they contradict each other."""

    @abstractmethod
    def _parts(self, module: Module) -> Parts:
        """A module's tensors, read and unpacked. E501 where a value is out of range."""

    # Opening

    def _read_headers(self) -> dict[str, Entry]:
        stored: dict[str, Entry] = {}
        for file in self.files:
            header = headers(self.folder / file)
            self.metadata |= header.metadata
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                if info.dtype not in DTYPES:
                    raise SpqrError("E501", f"{file} {short(name)}", f"dtype {info.dtype}, which is not read")
                if name in stored:
                    raise SpqrError("E501", f"{file} {short(name)}", f"it stands in {stored[name].file} too")
                start = header.data_start
                stored[name] = Entry(file, DTYPES[info.dtype], info.shape, start + info.begin, start + info.end)
        return stored

    def _find_modules(self) -> None:
        first = self.leaves[0]
        members: dict[str, str] = {}  # stored tensor -> module
        for name in self._stored:
            prefix, _, leaf = name.rpartition(".")
            if leaf == first and prefix:
                members |= {f"{prefix}.{leaf}": prefix for leaf in self.leaves if f"{prefix}.{leaf}" in self._stored}
        self.entries = {}
        for name, entry in self._stored.items():
            prefix, _, leaf = name.rpartition(".")
            if name not in members:
                if leaf in self.leaves and leaf != "scales":
                    raise SpqrError("E501", f"{entry.file} {short(name)}", f"there is no {prefix}.{first} beside it")
                if not self._hidden(name):
                    self.entries[name] = entry
            elif leaf == first:
                leaves = {leaf: self._stored[f"{prefix}.{leaf}"] for leaf in self.leaves if f"{prefix}.{leaf}" in members}
                module = self._module(prefix, leaves)
                check_size(module)
                if module.weight in self._stored:
                    raise SpqrError("E501", f"{entry.file} {module.weight}", "stored dense and quantized")
                self._modules[module.weight] = module
                nbytes = sum(tensor.end - tensor.begin for tensor in leaves.values())
                shape = (module.rows, module.columns)
                self.entries[module.weight] = Entry("", self._dense_dtype(module), shape, 0, nbytes)
        if not self._modules:
            raise SpqrError("E501", str(self.folder), f"no tensor *.{first} in {', '.join(self.files)}")

    def _hidden(self, name: str) -> bool:
        """True for a stored tensor that is folded into another."""
        return False

    def _dense_dtype(self, module: Module) -> torch.dtype:
        return module.leaves["scales" if "scales" in module.leaves else "s"].dtype

    # Reading

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor as it is. E501 when it is missing or cut short."""
        if name not in self._stored:
            raise SpqrError("E501", str(self.folder), f"tensor {short(name)} is missing")
        entry = self._stored[name]
        data = bytearray(entry.end - entry.begin)
        with open(self.folder / entry.file, "rb") as file:
            file.seek(entry.begin)
            if file.readinto(data) != len(data):
                raise SpqrError("E501", f"{entry.file} {name}", "cut short")
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def where(self, module: Module, leaf: str) -> str:
        return f"{module.leaves[leaf].file} {module.name}.{leaf}"

    def load(self, name: str) -> torch.Tensor:
        if name not in self._modules:
            return self.read(name)
        module = self._modules[name]
        return dequantize(self._checked(module), module, self._dense_dtype(module))

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name not in self._modules:
            return None
        module = self._modules[name]
        self._holds(module)
        parts = self._checked(module)
        matrix = carry_over(parts, module)
        self._kept[name] = parts
        return matrix

    def carried(self, name: str) -> Carried | None:
        module = self._modules.get(name)
        if module is None or module.bits != 4 or module.rows % TILE or module.columns % TILE:
            return None
        order = columns_by_group(self._g_idx(module), module)
        found = self._words(module, order.perm)
        if found is None:
            return None
        finite_scales(found.scales, module)
        scales, zeros = statistics(found.scales, found.zeros, order, module)
        layout = Layout(
            module.rows, module.columns, 4, order.size, "direct", permuted=order.perm is not None, where=module.name
        )
        tensors: dict[str, Any] = {"weight": found.words, "group_sc": scales.view(np.int16), "group_zp": zeros}
        if order.perm is not None:
            tensors["perm"] = order.perm

        def weights(begin: int, end: int) -> torch.Tensor:
            rows = slice(begin, end)
            parts = Parts(found.codes(begin, end), found.zeros[rows], found.scales[rows], self._g_idx(module))
            return dequantize(parts, replace(module, rows=end - begin), self._dense_dtype(module))

        return Carried(PackedMatrix(layout, tensors), weights)

    def _words(self, module: Module, perm: npt.NDArray[np.int32] | None) -> CarriedWords | None:
        """A module of 4 bits, without its codes being unpacked one by one; None where a kind cannot. Column j of the words
        is column perm[j] of the source. E510 where the codes that come out are not those that went in."""
        return None

    def layout(self, name: str) -> Layout | None:
        if name not in self._modules:
            return None
        module = self._modules[name]
        self._holds(module)
        g_idx = self._g_idx(module)
        order = columns_by_group(g_idx, module)
        return Layout(
            module.rows, module.columns, module.bits, order.size, "direct", permuted=order.perm is not None, where=module.name
        )

    def _holds(self, module: Module) -> None:
        if module.bits not in WEIGHT_BITS:
            raise SpqrError("E510", module.name, f"codes of {module.bits} bits, the format has 2, 3 and 4; {_ADVICE}")

    def _checked(self, module: Module) -> Parts:
        kept = self._kept.pop(module.weight, None)
        if kept is not None:
            return kept
        parts = self._parts(module)
        finite_scales(parts.scales, module)
        return parts

    def _g_idx(self, module: Module) -> npt.NDArray[np.int64] | None:
        """The group of every column, checked, or None where groups are consecutive. E501."""
        if "g_idx" not in module.leaves:
            return None
        g_idx = self.read(f"{module.name}.g_idx").numpy().astype(np.int64)
        wrong = np.flatnonzero((g_idx < 0) | (g_idx >= module.groups))
        if wrong.size:
            at = int(wrong[0])
            what = f"{int(g_idx[at])} at column {at}, expected 0 .. {module.groups - 1}"
            raise SpqrError("E501", self.where(module, "g_idx"), what)
        return g_idx

    def notes(self) -> list[str]:
        return list(self._notes.values())


# Files and options


def headers(path: Path) -> Header:
    """A safetensors header, checked. E501 for whatever is wrong with it, and for one above 10 MB."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            state = os.fstat(file.fileno())
        if _MAX_HEADER < length <= state.st_size:
            raise SpqrError("E501", path.name, f"a header of {length} bytes, the limit is {_MAX_HEADER}")
        return _header(path, state.st_size, state.st_mtime_ns)
    except SpqrError as error:
        raise SpqrError("E501", error.where, error.what) from None
    except OSError as error:
        raise SpqrError("E501", path.name, f"cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1)
def _header(path: Path, size: int, changed: int) -> Header:
    """Kept for the kinds that look at one file one after the other."""
    return read_header(path)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files of a folder: by its index, or model.safetensors, or the one file that holds packed codes.

    Old checkpoints name their file after the settings (gptq_model-4bit-128g.safetensors). E501 where none or several fit.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    index = next((path for path in indices if path.name == "model.safetensors.index.json"), indices[0] if indices else None)
    if index is not None:
        return _indexed(folder, index)
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file() and any(name.endswith((".qweight", ".B")) for name in headers(path).tensors):
            found.append(path.name)
    if len(found) != 1:
        names = ", ".join(found) if found else "no safetensors file with packed codes"
        raise SpqrError("E501", str(folder), f"{names}: expected exactly one, or an index")
    return found


def _indexed(folder: Path, index: Path) -> list[str]:
    try:
        if index.stat().st_size > MAX_JSON_BYTES:
            raise SpqrError("E501", index.name, "too large for an index")
        weight_map = strict_json(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, SpqrError):
            raise
        raise SpqrError("E501", index.name, f"not a weight index: {short(str(error))}") from None
    for file in files:
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise SpqrError("E501", index.name, f"{short(file)} leaves the folder")
        if not (folder / file).is_file():
            raise SpqrError("E501", index.name, f"{short(file)} is missing")
    if not files:
        raise SpqrError("E501", index.name, "it names no file")
    return files


def quantization_options(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How the weights were quantized: config.json's quantization_config, completed by a file of its own. E501."""
    options: dict[str, Any] = {}
    for name in OPTION_FILES:
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text("utf-8")) if path.stat().st_size < 1 << 24 else None
            except (ValueError, OSError, RecursionError) as error:
                raise SpqrError("E501", name, f"not JSON: {short(str(error))}") from None
            if not isinstance(found, dict):
                raise SpqrError("E501", name, "not a JSON object")
            options = found
            break
    section = config.get("quantization_config") or {}
    if not isinstance(section, dict):
        raise SpqrError("E501", "config.json", "quantization_config is no object")
    return {**section, **{key: value for key, value in options.items() if value is not None or key not in section}}


def packed_kind(folder: Path, config: dict[str, Any]) -> str | None:
    """How the first quantized module of a folder is packed: "gptq", "gptq marlin", "gemm", "gemv", "gemv_fast",
    "awq marlin", or None where none is. Reads headers only."""
    try:
        method = str(quantization_options(folder, config).get("quant_method", "")).lower()
        files = weight_files(folder)
        for file in files:
            tensors = headers(folder / file).tensors
            for name in tensors:
                prefix, _, leaf = name.rpartition(".")
                if leaf == "B" and f"{prefix}.s" in tensors:
                    return "gptq marlin"
                if leaf == "qweight" and f"{prefix}.lookup_table" not in tensors:
                    scales, zeros = tensors.get(f"{prefix}.scales"), tensors.get(f"{prefix}.qzeros")
                    weight = tensors[name]
                    if scales is not None:
                        return kind_of(weight.dtype, weight.shape, scales.shape, zeros is not None, method)
    except SpqrError:
        return None
    return None


def kind_of(dtype: str, weight: tuple[int, ...], scales: tuple[int, ...], zeros: bool, method: str) -> str | None:
    """The packing of one module by the shapes of `qweight` and `scales`; the method decides where two would fit."""
    if len(weight) != 2 or len(scales) != 2:
        return None
    if dtype == "I16":
        return "gemv_fast"
    if dtype != "I32":
        return None
    fits = []
    if scales[1] == weight[1]:
        fits.append("gptq")
    if scales[0] == weight[0] and zeros:
        fits.append("gemv")
    if scales[1] == 8 * weight[1]:
        fits.append("gemm")
    if not zeros and 2 * scales[1] == weight[1]:
        fits.append("awq marlin")
    ours = [kind for kind in fits if (kind == "gptq") == (method != "awq")]
    return next(iter(ours or fits), None)


# Bits


def unpack_stream(rows: Bytes, bits: int, count: int) -> Bytes:
    """Codes uint8 [r, count] from bytes [r, n] that are a stream of `bits`-bit fields, lowest bit first."""
    if bits == 8:
        return rows[:, :count]
    if bits == 4:
        w16 = rows.astype(np.uint16)
        w16 |= w16 << 4
        w16 &= 0x0F0F
        return w16.view(np.uint8)[:, :count]
    if bits == 2:
        w32 = rows.astype(np.uint32)
        w32 |= w32 << 12
        w32 &= 0x000F000F
        w32 |= w32 << 6
        w32 &= 0x03030303
        return w32.view(np.uint8)[:, :count]
    if bits == 1:
        w64 = rows.astype(np.uint64)
        for shift, mask in ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101)):
            w64 |= w64 << np.uint64(shift)
            w64 &= np.uint64(mask)
        return w64.view(np.uint8)[:, :count]
    if bits != 3:
        raise ValueError(f"no stream of {bits} bits")
    if rows.shape[1] % 3:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 3)))
    w64 = rows[:, 0::3].astype(np.uint64)
    w64 |= rows[:, 1::3].astype(np.uint64) << np.uint64(8)
    w64 |= rows[:, 2::3].astype(np.uint64) << np.uint64(16)
    for shift, mask in ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707)):
        w64 |= w64 << np.uint64(shift)
        w64 &= np.uint64(mask)
    return w64.view(np.uint8)[:, :count]


# Dequantizing and carrying over


def check_size(module: Module) -> None:
    """E501 for a matrix that no model has."""
    for what, size in (("rows", module.rows), ("columns", module.columns)):
        if not 1 <= size <= MAX_DIMENSION:
            raise SpqrError("E501", module.name, f"{size} {what}, expected 1 .. {MAX_DIMENSION}")
    if module.rows * module.columns > MAX_ELEMENTS:
        raise SpqrError("E501", module.name, f"{module.rows} x {module.columns} weights, the limit is 2**40")


def dequantize(parts: Parts, module: Module, dtype: torch.dtype) -> torch.Tensor:
    """W [rows, columns] in `dtype`, each weight rounded once. The product is exact in float32 for fp16 and bf16 scales."""
    g_idx = parts.g_idx
    if g_idx is None:
        g_idx = np.arange(module.columns, dtype=np.int64) // module.group_size
    group = torch.from_numpy(g_idx)
    out = torch.empty((module.rows, module.columns), dtype=dtype)
    step = max(1, _CHUNK // module.columns)
    codes, zeros = torch.from_numpy(parts.codes), torch.from_numpy(parts.zeros)
    whole = parts.g_idx is None or bool((g_idx[:-1] <= g_idx[1:]).all())
    if whole and module.columns == module.groups * module.group_size:
        whole = bool((g_idx.reshape(module.groups, -1) == np.arange(module.groups)[:, None]).all())
    else:
        whole = False
    split = (module.groups, module.group_size) if whole else (module.columns, 1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        """One value a column, or a group where columns of a group stand together."""
        return (values.float() if whole else values.float().index_select(1, group)).unsqueeze(-1)

    for begin in range(0, module.rows, step):
        rows = slice(begin, min(begin + step, module.rows))
        weight = codes[rows].float().view(-1, *split)
        if parts.offsets is None:
            weight -= spread(zeros[rows])
            weight *= spread(parts.scales[rows])
        else:
            weight *= spread(parts.scales[rows])
            weight += spread(parts.offsets[rows])
        out[rows] = weight.view(-1, module.columns)
    return out


@dataclass(frozen=True)
class Order:
    """Columns as the format wants them: `size` columns a group, all of group 0 first. perm: stored column j is original
    column perm[j], None where that changes nothing. groups: the source's group of each of ours."""

    size: int
    perm: npt.NDArray[np.int32] | None
    groups: npt.NDArray[np.int64] = field(repr=False)


def columns_by_group(g_idx: npt.NDArray[np.int64] | None, module: Module) -> Order:
    """Sort columns stably by group. E510 where the groups are not of one size that is a multiple of 16."""
    if g_idx is None:
        sizes = [min(module.group_size, module.columns - at) for at in range(0, module.columns, module.group_size)]
        used, perm = np.arange(len(sizes), dtype=np.int64), None
    else:
        counts = np.bincount(g_idx, minlength=module.groups)
        used = np.flatnonzero(counts).astype(np.int64)
        sizes = counts[used].tolist()
        perm = None if (np.diff(g_idx) >= 0).all() else np.argsort(g_idx, kind="stable").astype(np.int32)
    if len(sizes) == 1:
        return Order(ceil_div(module.columns, TILE) * TILE, perm, used)
    # Only the last group may be short. Where sizes differ, a common divisor repeats a group's statistics.
    size = math.gcd(*sizes[:-1])
    if size % TILE and sizes[-1] <= size:
        what = f"groups of {size} columns, the format has multiples of {TILE}"
        raise SpqrError("E510", module.name, f"{what}; {_ADVICE}")
    if size % TILE:
        what = f"groups of {min(sizes)} to {max(sizes)} columns, the format has one size, a multiple of {TILE}"
        raise SpqrError("E510", module.name, f"{what}; {_ADVICE}")
    return Order(size, perm, np.repeat(used, [ceil_div(count, size) for count in sizes]))


def carry_over(parts: Parts, module: Module) -> SpqrMatrix:
    """The same codes, scales and zeros as a SpQR matrix with direct statistics. E510 where it cannot hold them."""
    order = columns_by_group(parts.g_idx, module)
    group_scales, zeros = statistics(parts.scales, parts.zeros, order, module)
    layout = Layout(module.rows, module.columns, module.bits, order.size, "direct", where=module.name)
    codes = parts.codes if order.perm is None else np.take(parts.codes, order.perm, axis=1)
    return SpqrMatrix(layout, codes, group_scales=group_scales, group_zeros=zeros, perm=order.perm)


def finite_scales(scales: torch.Tensor, module: Module) -> None:
    """E502 for scales that are not."""
    if not torch.isfinite(scales).all():
        raise SpqrError("E502", f"{module.name}.scales", "not finite")


def statistics(
    scales: torch.Tensor, zeros: npt.NDArray[np.int16], order: Order, module: Module
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Scales and zeros [rows, groups] of direct statistics. E510 where the format cannot hold them."""
    if scales.dtype != torch.float16:
        as_half = scales.to(torch.float16)
        different = int((as_half.float() != scales.float()).sum())
        if different:
            what = f"{different} of {scales.numel()} scales ({str(scales.dtype).removeprefix('torch.')}) are no fp16 numbers"
            raise SpqrError("E510", module.name, f"{what}; {_ADVICE}")
        scales = as_half
    trivial = order.groups.size == module.groups and bool((np.diff(order.groups) == 1).all())
    group_scales = scales.numpy()
    if not trivial:
        group_scales, zeros = group_scales[:, order.groups], zeros[:, order.groups]
    wrong = int(((zeros < 0) | (zeros > 255)).sum())
    if wrong:
        raise SpqrError("E510", module.name, f"{wrong} groups have a zero that is no integer 0 .. 255; {_ADVICE}")
    return np.ascontiguousarray(group_scales), zeros.astype(np.uint8)
