"""GPTQ checkpoints of AutoGPTQ, GPTQModel, auto-round and their kin: codes packed along the input columns.

Layouts: AutoGPTQ's qlinear_cuda, GPTQModel's TorchLinear and its planar packing, auto-round's qlinear_torch. Rules that
the files leave open are stated in `GptqSource` and reported by `notes`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short
from spqr_format.layout import ceil_div

from ..words import from_gptq, is_gptq, permuted, stored
from .base import Entry
from .packed import SCALE_DTYPES, CarriedWords, Module, PackedSource, Parts, packed_kind, unpack_stream

Zeros = Literal["auto", "v1", "v2"]
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # gptq_p: widths of the planes, lowest bits first
_FORMATS = {"gptq": "v1", "gptq_v2": "v2", "gptq_p": "v2"}
_CARRY = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GptqSource(PackedSource):
    """A GPTQ folder. Bits and groups follow from the tensors' shapes and g_idx; the options must agree with them, except
    where they have settings for single modules (`dynamic`, `extra_config`), which then only break ties.

    zeros: "v1" (stored zero = zero - 1) or "v2" (stored as it is). "auto": v2 if the checkpoint_format is gptq_v2 or gptq_p,
    or auto-round's own packing is not auto_gptq; else v1. With symmetric options, stored zeros that are all
    2**(bits - 1) mean v2, and all 2**(bits - 1) - 1 mean v1, whatever the label says.
    A v1 zero stored as 2**bits - 1 is what the writer made of -1 + 1 = 0, and readers differ: GPTQModel adds 1 to the
    32-bit word, auto-round (and AutoGPTQ for 3 bits or with desc_act) takes 2**bits, others 0. Each writer's own reader
    is followed. Everything wrong with a file is E501.
    """

    name = "GPTQ"
    leaves = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, folder: str | Path, zeros: Zeros = "auto") -> None:
        if zeros not in ("auto", "v1", "v2"):
            raise SpqrError("E505", "zeros", f"{zeros!r}, expected auto, v1 or v2")
        self._zeros_option = zeros
        self._ambiguous: dict[str, int] = {}
        self._looked_at: set[str] = set()  # modules whose ambiguous zeros were counted
        self._version: str | None = None
        super().__init__(folder)

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        kind = packed_kind(folder, config)
        if kind is None:
            section = config.get("quantization_config")
            return isinstance(section, dict) and section.get("quant_method") == "gptq"
        return kind == "gptq"

    # Options

    def _check_options(self) -> None:
        for key in ("rotation", "adapter"):
            if self.options.get(key):
                raise SpqrError("E501", str(self.folder), f"{key} = {short(self.options[key])} changes the weights: not read")
        self._bits = self._integer("bits", self.options.get("bits", self.metadata.get("gptq_bits")), 2, 8)
        group = self.options.get("group_size", self.metadata.get("gptq_group_size"))
        self._group_size = self._integer("group_size", group, -1, 2**31 - 1)
        if self._group_size == 0:
            raise SpqrError("E501", "group_size", "0, expected -1 or at least 1")
        self._sym = self.options.get("sym") is not False
        label = self.options.get("checkpoint_format") or self.options.get("format")
        label = label or self.metadata.get("gptq_checkpoint_format")
        if label is not None and label not in _FORMATS:
            raise SpqrError("E501", "checkpoint_format", f"{short(label)}, expected one of {', '.join(_FORMATS)}")
        self._label: str | None = label
        self._planar = label == "gptq_p"
        meta = self.options.get("meta")
        quantizer = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
        self._auto_round = "auto-round" in str(self.options.get("quant_method")) or "autoround_version" in self.options
        self._gptqmodel = "gptqmodel" in quantizer.lower()
        singles = [self.options.get(key) for key in ("dynamic", "extra_config")]
        self._singles: dict[str, Any] = {}
        for single in singles:
            if isinstance(single, dict):
                self._singles |= single

    def _integer(self, key: str, value: Any, low: int, high: int) -> int | None:
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,10}", value):
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise SpqrError("E501", key, f"{short(value)}, expected an integer {low} .. {high}")
        return value

    def _settings(self, name: str, key: str) -> list[int]:
        """What the options say of a module, the most likely first: its own, the checkpoint's, any other module's. Patterns
        are not matched (a hostile one takes forever): the shapes tell which setting it was."""
        own: list[int | None] = []
        others: list[int | None] = []
        for pattern, values in self._singles.items():
            if isinstance(values, dict) and values.get(key) is not None and not pattern.startswith("-:"):
                value = self._integer(f"{short(pattern)}: {key}", values[key], -1, 2**31 - 1)
                (own if pattern.removeprefix("+:") == name else others).append(value)
        base = self._bits if key == "bits" else self._group_size
        return [value for value in (*own, base, *others) if value is not None]

    # Geometry

    def _module(self, name: str, leaves: dict[str, Entry]) -> Module:
        for leaf in ("qweight", "qzeros", "scales"):
            if leaf not in leaves:
                raise SpqrError("E501", f"{leaves['qweight'].file} {name}", f"{leaf} is missing")
            if len(leaves[leaf].shape) != 2:
                raise SpqrError("E501", f"{leaves[leaf].file} {name}.{leaf}", f"shape {leaves[leaf].shape}, expected 2 numbers")
        for leaf, wanted in (("qweight", (torch.int32,)), ("qzeros", (torch.int32,)), ("scales", SCALE_DTYPES)):
            if leaves[leaf].dtype not in wanted:
                raise SpqrError("E501", f"{leaves[leaf].file} {name}.{leaf}", f"dtype {leaves[leaf].dtype}")
        words, rows = leaves["qweight"].shape
        groups, zero_words = leaves["qzeros"].shape
        where = f"{leaves['scales'].file} {name}.scales"
        if leaves["scales"].shape != (groups, rows) or groups < 1 or rows < 1:
            raise SpqrError("E501", where, f"shape {leaves['scales'].shape}, qzeros and qweight imply {(groups, rows)}")
        columns = None
        if "g_idx" in leaves:
            g_idx = leaves["g_idx"]
            if len(g_idx.shape) != 1 or g_idx.dtype not in (torch.int32, torch.int64):
                raise SpqrError("E501", f"{g_idx.file} {name}.g_idx", f"{g_idx.dtype} of shape {g_idx.shape}")
            columns = g_idx.shape[0]
        bits = self._module_bits(name, words, rows, zero_words, columns, leaves["qweight"].file)
        if columns is None:
            columns = words * 32 // bits
        return Module(name, leaves, rows, columns, bits, groups, self._module_group(name, columns, groups, leaves), "gptq")

    def _module_bits(self, name: str, words: int, rows: int, zero_words: int, columns: int | None, file: str) -> int:
        known = (2, 3, 4, 5, 6, 7, 8) if self._planar else (2, 3, 4, 8)
        fit = [b for b in known if ceil_div(rows * b, 32) == zero_words]
        fit = [b for b in fit if words > 0 and (columns is None or ceil_div(columns * b, 32) == words)]
        wanted = self._settings(name, "bits")
        for bits in wanted:
            if bits in fit:
                return bits
        if len(fit) == 1 and not wanted:
            return fit[0]
        shapes = f"qweight of {words} x {rows} words, qzeros of {zero_words} words a group, {columns or 'no'} g_idx"
        what = f"hold {fit[0]} bits" if len(fit) == 1 else "fit no number of bits" if not fit else "fit several numbers of bits"
        raise SpqrError("E501", f"{file} {name}", f"{shapes}: they {what}, the options say {short(wanted)}")

    def _module_group(self, name: str, columns: int, groups: int, leaves: dict[str, Entry]) -> int:
        wanted = self._settings(name, "group_size")
        for size in wanted:
            size = columns if size == -1 else size
            if size > 0 and ceil_div(columns, size) == groups:
                return size
        if not wanted and columns % groups == 0:
            return columns // groups
        what = f"{groups} groups of {columns} columns, the options say group_size {short(wanted)}"
        raise SpqrError("E501", f"{leaves['scales'].file} {name}.scales", what)

    # Values

    def _parts(self, module: Module) -> Parts:
        g_idx = self._g_idx(module)
        words = self.read(f"{module.name}.qweight").numpy()
        codes = self._unpack(np.ascontiguousarray(words.T).view(np.uint8), module.bits, module.columns)
        scales = self.read(f"{module.name}.scales").t().contiguous()
        return Parts(codes, np.ascontiguousarray(self._zeros(module).T), scales, g_idx)

    def _words(self, module: Module, perm: npt.NDArray[np.int32] | None) -> CarriedWords:
        qweight = self.read(f"{module.name}.qweight").numpy().view(np.uint32)
        in_order = qweight if perm is None else permuted(qweight, perm)
        ours = from_gptq(in_order)
        same = perm is None or np.array_equal(permuted(in_order, np.argsort(perm)), qweight)
        if not same or not is_gptq(ours, in_order):
            raise SpqrError("E510", f"{module.name}.qweight", "the carried codes are not the source's")
        scales = self.read(f"{module.name}.scales").t().contiguous()

        def codes(begin: int, end: int) -> npt.NDArray[np.uint8]:
            rows = np.ascontiguousarray(qweight[:, begin:end].T).view(np.uint8)
            return self._unpack(rows, module.bits, module.columns)

        return CarriedWords(stored(ours), np.ascontiguousarray(self._zeros(module).T), scales, codes)

    def _unpack(self, rows: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
        if not self._planar or bits not in _PLANES:
            return unpack_stream(rows, bits, count)
        blocks = ceil_div(count, 32)
        rows = np.pad(rows, ((0, 0), (0, 4 * bits * blocks - rows.shape[1])))
        words = rows.reshape(len(rows), blocks, 4 * bits)
        codes = np.zeros((len(rows), blocks * 32), np.uint8)
        offset = 0
        for width in _PLANES[bits]:
            plane = np.ascontiguousarray(words[:, :, 4 * offset : 4 * (offset + width)]).reshape(len(rows), -1)
            codes |= unpack_stream(plane, width, blocks * 32) << offset
            offset += width
        return codes[:, :count]

    def _stored_zeros(self, module: Module, words: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.uint8]:
        """uint8 [groups, rows]"""
        if words is None:
            words = self.read(f"{module.name}.qzeros").numpy()
        return self._unpack(np.ascontiguousarray(words).view(np.uint8), module.bits, module.rows)

    def _zeros(self, module: Module) -> npt.NDArray[np.int16]:
        if self.zeros_version == "v2":
            return self._stored_zeros(module).astype(np.int16)
        words = self.read(f"{module.name}.qzeros").numpy()
        stored = self._stored_zeros(module, words)
        top = 2**module.bits - 1
        count = int((stored == top).sum())
        self._looked_at.add(module.name)
        if count:
            self._ambiguous[module.name] = count
        if count and self._gptqmodel and module.bits in _CARRY:
            carried = (words.view(np.uint32) + np.uint32(_CARRY[module.bits])).view(np.int32)
            return self._stored_zeros(module, carried).astype(np.int16)
        zeros = stored.astype(np.int16) + 1
        if count and not self._takes_next(module.bits):
            zeros[stored == top] = 0
        return zeros

    def _takes_next(self, bits: int) -> bool:
        """A stored 2**bits - 1 means 2**bits. AutoGPTQ uses another class with desc_act, and for 3 bits another line."""
        return self._auto_round or (not self._gptqmodel and (self.options.get("desc_act") is True or bits == 3))

    @property
    def zeros_version(self) -> str:
        """ "v1" or "v2", by the rule in the class's text. Reads stored zeros until they decide."""
        if self._version is None:
            self._version = self._decide()
        return self._version

    def _decide(self) -> str:
        if self._zeros_option != "auto":
            self._notes["zeros"] = f"zero points read as {self._zeros_option}, as asked"
            return self._zeros_option
        packing = str(self.options.get("packing_format", ""))
        if self._label is not None:
            version, why = _FORMATS[self._label], f"checkpoint_format is {self._label}"
        elif self._auto_round and "auto-round" in str(self.options.get("quant_method")):
            version, why = ("v1" if "auto_gptq" in packing else "v2"), f"auto-round's packing is {packing or 'not named'}"
        else:
            version, why = "v1", "there is no checkpoint_format"
        other = "v2" if version == "v1" else "v1"
        if self._sym and self._all_zeros_are(0 if other == "v2" else 1):
            self._notes["zeros"] = (
                f"zero points read as {other} although {why}: in this symmetric checkpoint every stored one is "
                f"{'2**(bits - 1)' if other == 'v2' else '2**(bits - 1) - 1'}; --gptq-zeros {version} overrides this"
            )
            return other
        meaning = "stored zero + 1" if version == "v1" else "stored zero"
        self._notes["zeros"] = f"zero points read as {version} ({meaning}): {why}; --gptq-zeros {other} overrides this"
        return version

    def _all_zeros_are(self, below: int) -> bool:
        """Every stored zero of the checkpoint is 2**(bits - 1) - below. Stops at the first that is not."""
        for module in self._modules.values():
            if (self._stored_zeros(module) != 2 ** (module.bits - 1) - below).any():
                return False
        return True

    def choices(self) -> dict[str, Any]:
        return {"zeros": self._zeros_option}

    def notes(self) -> list[str]:
        version = self.zeros_version  # which notes its rule
        notes = super().notes()
        for module in self._modules.values():  # those that another run converted too
            if version == "v1" and module.name not in self._looked_at:
                self._zeros(module)
        if self._ambiguous:
            count, modules = sum(self._ambiguous.values()), len(self._ambiguous)
            how = "read as GPTQModel does, by adding to the packed word; nothing is lost"
            if not self._gptqmodel:
                how = "read as 0 or 2**bits, as the writer's own reader does; packers without borrow destroyed their neighbours"
            notes.append(f"{count} zero points in {modules} modules are stored as 2**bits - 1: {how}")
        return notes
