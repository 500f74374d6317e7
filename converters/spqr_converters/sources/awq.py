"""AWQ checkpoints: AutoAWQ's gemm, gemv, gemv_fast and marlin, and auto-round's and llm-awq's files of the same layouts.

Every one holds 4-bit codes of W = s * (q - z). Layouts: AutoAWQ's packing_utils, WQLinear_GEMV, WQLinear_GEMVFast and
WQLinear_Marlin. Which one it is follows from the shapes of each module's tensors.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short
from spqr_format.layout import ceil_div
from spqr_format.matrix import SpqrMatrix

from ..words import from_awq, is_awq, stored
from .base import Entry
from .packed import SCALE_DTYPES, CarriedWords, Module, PackedSource, Parts, kind_of, packed_kind, unpack_stream

_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word holds column _NIBBLES[k]
_KINDS = ("gemm", "gemv", "gemv_fast", "awq marlin")
# GELU models of AutoAWQ divide a linear's input by stored scales: the holder of the scales, and the linears that may follow.
_ACT = re.compile(r"(?P<mlp>.*\.(?:mlp|ffn))\.(?:act|gelu_impl)\.scales")
_AFTER_ACT = ("c_proj", "dense_4h_to_h", "down_proj", "fc_out", "fc2")


class AwqSource(PackedSource):
    """An AWQ folder. All errors of a file are E501. Activation scales that were not folded are folded into the weight."""

    name = "AWQ"
    leaves = ("qweight", "qzeros", "scales", "scaled_zeros")

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        kind = packed_kind(folder, config)
        if kind is None:
            section = config.get("quantization_config")
            return isinstance(section, dict) and section.get("quant_method") == "awq"
        return kind in _KINDS

    def _check_options(self) -> None:
        bits = self._option("bits", "w_bit", "bits")
        if bits not in (None, 4):
            raise SpqrError("E501", "bits", f"{short(bits)}, AWQ has 4")
        group = self._option("group_size", "q_group_size", "group_size")
        bad = group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < -1 or group == 0)
        if bad:
            raise SpqrError("E501", "group_size", f"{short(group)}, expected -1 or at least 1")
        self._group_size: int | None = group
        self._folded: dict[str, str] = {}  # weight -> stored activation scales
        for name in self._stored:
            if match := _ACT.fullmatch(name):
                mlp = match["mlp"]
                after = [f"{mlp}.{leaf}" for leaf in _AFTER_ACT]
                after = [p for p in after if f"{p}.qweight" in self._stored or f"{p}.weight" in self._stored]
                if len(after) != 1:
                    raise SpqrError("E501", f"{self._stored[name].file} {name}", f"{len(after)} linear layers follow it")
                self._folded[f"{after[0]}.weight"] = name

    def _option(self, key: str, *names: str) -> Any:
        return next((self.options[name] for name in names if self.options.get(name) is not None), None)

    def _hidden(self, name: str) -> bool:
        return name in self._folded.values()

    # Geometry

    def _module(self, name: str, leaves: dict[str, Entry]) -> Module:
        weight, file = leaves["qweight"], leaves["qweight"].file
        if "scaled_zeros" in leaves:  # llm-awq's name
            leaves = {**leaves, "qzeros": leaves["scaled_zeros"]}
        scales = leaves.get("scales")
        if scales is None:
            raise SpqrError("E501", f"{file} {name}", "scales is missing")
        dtype = {torch.int32: "I32", torch.int16: "I16"}.get(weight.dtype, "")
        kind = kind_of(dtype, weight.shape, scales.shape, "qzeros" in leaves, "awq")
        if kind not in _KINDS:
            what = f"{weight.dtype} of shape {weight.shape} with scales of shape {scales.shape} is no AWQ packing"
            raise SpqrError("E501", f"{file} {name}.qweight", what)
        if scales.dtype not in SCALE_DTYPES:
            raise SpqrError("E501", f"{scales.file} {name}.scales", f"dtype {scales.dtype}")
        zeros = leaves.get("qzeros")
        if (zeros is None) != (kind == "awq marlin"):
            raise SpqrError("E501", f"{file} {name}", "qzeros is missing")
        first, second = weight.shape
        rows, columns = {
            "gemm": (second * 8, first), "gemv": (first, second * 8), "gemv_fast": (first * 4, second),
            "awq marlin": (second // 2, first * 16),
        }[kind]  # fmt: skip
        if rows < 1 or columns < 1:
            raise SpqrError("E501", f"{file} {name}.qweight", f"shape {weight.shape}")
        by_group = kind in ("gemv",)
        stored = scales.shape[1] if by_group else scales.shape[0]
        size = self._group(name, columns, stored, kind, scales)
        groups = ceil_div(columns, size)
        padded = kind in ("gemv", "gemv_fast")
        wanted = {
            "gemm": (groups, rows // 8), "gemv": (rows, ceil_div(stored, 8)), "gemv_fast": scales.shape,
        }.get(kind)  # fmt: skip
        other = stored if padded else groups
        expected = (rows, other) if by_group else (other, rows)
        if scales.shape != expected or stored < groups or (padded and stored % 8 and stored != groups):
            raise SpqrError("E501", f"{scales.file} {name}.scales", f"shape {scales.shape}, expected {expected}")
        if zeros is not None:
            dtype_wanted = scales.dtype if kind == "gemv_fast" else torch.int32
            if zeros.shape != wanted or zeros.dtype != dtype_wanted:
                what = f"{zeros.dtype} of shape {zeros.shape}, expected {dtype_wanted} of shape {wanted}"
                raise SpqrError("E501", f"{zeros.file} {name}.qzeros", what)
        if kind == "gemv_fast" and columns % 64:
            raise SpqrError("E501", f"{file} {name}.qweight", f"{columns} columns, gemv_fast packs multiples of 64")
        if kind == "awq marlin" and (rows % 64 or size % 16):
            raise SpqrError("E501", f"{file} {name}.qweight", f"{rows} rows, groups of {size}: marlin packs multiples of 64")
        return Module(name, leaves, rows, columns, 4, groups, size, kind)

    def _group(self, name: str, columns: int, stored: int, kind: str, scales: Entry) -> int:
        """Columns of a group; the scales may be padded where the packing is gemv."""
        size = columns if self._group_size == -1 else self._group_size
        padded = kind in ("gemv", "gemv_fast")
        if size is None:
            size = columns // stored if not padded and stored and columns % stored == 0 else 0
        if size < 1 or (stored < ceil_div(columns, size) if padded else stored != ceil_div(columns, size)):
            what = f"{stored} groups of {columns} columns, the options say group_size {self._group_size}"
            raise SpqrError("E501", f"{scales.file} {name}.scales", what)
        if padded and stored > ceil_div(columns, size) + 64:
            raise SpqrError("E501", f"{scales.file} {name}.scales", f"{stored} groups for {columns} columns of {size}")
        return size

    # Values

    def _parts(self, module: Module) -> Parts:
        weight = self.read(f"{module.name}.qweight").numpy()
        scales = self.read(f"{module.name}.scales")
        shape = (module.rows, module.groups)
        if module.kind == "gemm":
            zeros = _nibbles_of_words(self.read(f"{module.name}.qzeros").numpy()).astype(np.int16)
            return Parts(_nibbles_of_words(weight), zeros, scales.t().contiguous())
        if module.kind == "gemv":
            words = self.read(f"{module.name}.qzeros").numpy()
            zeros = unpack_stream(_as_bytes(words), 4, module.groups).astype(np.int16)
            codes = unpack_stream(_as_bytes(weight), 4, module.columns)
            return Parts(codes, np.ascontiguousarray(zeros), scales[:, : module.groups].contiguous())
        if module.kind == "awq marlin":
            codes, scales = _marlin(weight, scales, module.groups)
            return Parts(codes, np.full(shape, 8, np.int16), scales)
        leaf = "scaled_zeros" if "scaled_zeros" in module.leaves else "qzeros"
        offsets = self.read(f"{module.name}.{leaf}")[: module.groups].t().contiguous()
        scales = scales[: module.groups].t().contiguous()
        return Parts(_gemv_fast(weight), self._integer_zeros(module, scales, offsets), scales, offsets=offsets)

    def _words(self, module: Module, perm: npt.NDArray[np.int32] | None) -> CarriedWords | None:
        if module.kind != "gemm" or module.weight in self._folded:
            return None
        qweight = self.read(f"{module.name}.qweight").numpy()
        ours = from_awq(qweight.view(np.uint32))
        if not is_awq(ours, qweight.view(np.uint32)):
            raise SpqrError("E510", f"{module.name}.qweight", "the carried codes are not the source's")
        zeros = _nibbles_of_words(self.read(f"{module.name}.qzeros").numpy()).astype(np.int16)
        scales = self.read(f"{module.name}.scales").t().contiguous()

        def codes(begin: int, end: int) -> npt.NDArray[np.uint8]:
            return _nibbles_of_words(qweight[:, begin // 8 : end // 8])

        return CarriedWords(stored(ours), zeros, scales, codes)

    def _integer_zeros(self, module: Module, scales: torch.Tensor, offsets: torch.Tensor) -> npt.NDArray[np.int16]:
        """The zeros whose products with the scales, rounded, are the stored offsets; -1 where there is none."""
        s, o = scales.float(), offsets.float()
        zeros = torch.where(s == 0, torch.zeros_like(s), torch.round(-o / s)).clamp(-1, 255)
        exact = (-(s * zeros)).to(offsets.dtype) == offsets
        return torch.where(exact, zeros, torch.full_like(zeros, -1)).to(torch.int16).numpy()

    def _checked(self, module: Module) -> Parts:
        parts = super()._checked(module)
        if parts.offsets is not None and not torch.isfinite(parts.offsets).all():
            raise SpqrError("E502", f"{module.name}.qzeros", "not finite")
        return parts

    def load(self, name: str) -> torch.Tensor:
        weight = super().load(name)
        if name in self._folded:
            scales = self.read(self._folded[name])
            if scales.shape != (weight.shape[-1],) or not torch.isfinite(scales).all() or (scales == 0).any():
                where = f"{self._stored[self._folded[name]].file} {self._folded[name]}"
                raise SpqrError("E501", where, f"shape {tuple(scales.shape)} or a value does not fit {name}")
            weight = (weight.float() / scales.float()).to(weight.dtype)
        return weight

    def notes(self) -> list[str]:
        notes = super().notes()
        if any(module.kind == "gemv_fast" for module in self._modules.values()):
            notes.append(
                "gemv_fast stores -scale * zero rounded to fp16: the source's tool adds that, and its weights differ from "
                "s * (q - z) by up to half a unit in the last place of s * z; --lossless carries q, s and z over"
            )
        if self._folded:
            notes.append("activation scales of GELU layers were folded into the linear layers that follow them")
        return notes

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name in self._folded and name in self._modules:
            what = "its input is divided by stored activation scales, which no group scale holds"
            raise SpqrError("E510", name, f"{what}; convert without --lossless")
        return super().matrix(name)


def _as_bytes(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(words).view(np.uint8)


def _nibbles_of_words(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """uint8 [8 * m, n] from gemm's words [n, m], which hold 8 columns each in the order `_NIBBLES`."""
    n, m = words.shape
    across = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((m, 8, n), np.uint8)
    for k, column in enumerate(_NIBBLES):
        np.bitwise_and(across >> np.uint32(4 * k), np.uint32(15), out=out[:, column], casting="unsafe")
    return out.reshape(8 * m, n)


def _gemv_fast(weight: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """Codes uint8 [4 * m, n] from words int16 [m, n]: 4 rows interleaved by 64 columns, 32 columns by pairs, 8 by nibbles."""
    m, n = weight.shape
    nibbles = unpack_stream(_as_bytes(weight), 4, 4 * n)  # 4 a word
    rows = nibbles.reshape(m, n // 64, 4, 64).swapaxes(1, 2).reshape(4 * m, n)
    eight = rows.reshape(4 * m, n // 8, 8)[..., np.argsort(_NIBBLES)]
    return np.ascontiguousarray(eight.reshape(4 * m, n // 32, 4, 4, 2).swapaxes(2, 3)).reshape(4 * m, n)


@cache
def _marlin_order() -> tuple[npt.NDArray[np.int64], list[int], list[int]]:
    """Where marlin puts the codes of a 16 x 64 tile, and the scales of many groups and of one."""
    order: list[int] = []
    for lane in range(32):
        rows = [2 * (lane % 4) + extra for extra in (0, 1, 8, 9)]
        for block in range(4):
            order.extend(16 * row + lane // 4 + 8 * half + 256 * block for half in (0, 1) for row in rows)
    codes = np.array(order).reshape(-1, 8)[:, list(_NIBBLES)].ravel()
    many = [i + 8 * j for i in range(8) for j in range(8)]
    one = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return codes, many, one


def _marlin(weight: npt.NDArray[np.int32], scales: torch.Tensor, groups: int) -> tuple[npt.NDArray[np.uint8], torch.Tensor]:
    """Codes uint8 [m, n] and scales [m, groups] from marlin's words [n / 16, 2 * m] and permuted scales [groups, m]."""
    tiles, m = weight.shape[0], weight.shape[1] // 2
    order, many, one = _marlin_order()
    stored = unpack_stream(_as_bytes(weight), 4, 16 * m).reshape(-1, 1024)
    tile = np.empty_like(stored)
    tile[:, order] = stored
    codes = tile.reshape(tiles, m // 16, 16, 16).transpose(1, 3, 0, 2).reshape(m, 16 * tiles)
    at = many if groups > 1 else one
    back = torch.from_numpy(np.argsort(at))
    plain = scales.reshape(-1, len(at))[:, back].reshape(groups, m)
    return np.ascontiguousarray(codes), plain.t().contiguous()
