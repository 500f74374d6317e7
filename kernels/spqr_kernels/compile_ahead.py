"""Compile every kernel for a GPU that is not there, and count what became of it: `python -m spqr_kernels.compile_ahead`.

Triton's wheel carries the assembler and disassembler of NVIDIA GPUs and the compiler of AMD's. The tests fail where a
kernel spills registers or keeps an array in local memory on sm_90 beyond what they allow, which is nothing for most.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from spqr_format.packing import SPREAD

from . import decode, dequant, expert_batches, fit, gemm, gemm_plan, grouped, matvec, prepare, siblings, small, unpack
from .dispatch import FIT_COLUMNS, TOGETHER
from .weight_at import field_constants

NVIDIA = (80, 89, 90)
AMD = ("gfx942",)

_STORED = {"Weight": "*i32", "StatCodes": "*i32", "TileStats": "*i16", "GroupSc": "*i16", "GroupZp": "*u8"}
_UNALIGNED = (
    "batch", "out_features", "tile_rows", "chunks", "groups", "parts", "whole", "splits", "a_split", "all_outliers", "top",
    "tiles", "experts", "pairs_a_row", "programs", "first1", "first2", "base", "extra", "reciprocal",
    *(f"{name}{i}" for name in ("out_features", "outliers", "base", "extra") for i in range(TOGETHER)),
)  # fmt: skip
_FIT = ("search_kernel", "tile_start_kernel", "round_kernel", "residual_kernel")
_ROW = {"BF": 0, "OUTLIERS": True, "WHOLE": True, "WARPS": 4, "ENTRIES": 3}  # of one row of x
_MANY = 1 << 20  # tiles of a launch: so many that registers are limited
_OUTLIERS = {"Pointers": "*i32", "Outliers": "*i32"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: argument types and compile-time constants."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None  # a thread's limit, where the compiler's own choice spills or leaves room for fewer programs
    nvidia: tuple[int, ...] = NVIDIA

    @property
    def portable(self) -> bool:
        """True for a plain Triton kernel, False for one in NVIDIA's own layouts."""
        return self.kernel.__name__ in ("dense_kernel", "outliers_kernel") or self.kernel.__name__ in _FIT

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel; its `.asm` holds every stage."""
        constants = self.constants
        if "DEPENDENT" in self.kernel.arg_names:
            constants = constants | {"DEPENDENT": target.backend == "cuda" and target.arch >= 90}
        signature = self.arguments | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
                   if kind != "constexpr" and name not in _UNALIGNED}  # fmt: skip
        source = (ASTSource if self.portable else GluonASTSource)(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})
        return triton.compile(source, target=target, options=options)


def variants() -> list[Variant]:
    """What is compiled: every kernel, with the kinds of weights that differ in code."""
    kinds = {
        "3-bit bilevel": {"BITS": 3, "BILEVEL": True, "BLOCKS_A_GROUP": 1},
        "2-bit bilevel": {"BITS": 2, "BILEVEL": True, "BLOCKS_A_GROUP": 1},
        "3-bit bilevel g32": {"BITS": 3, "BILEVEL": True, "BLOCKS_A_GROUP": 2},
        "2-bit bilevel g64": {"BITS": 2, "BILEVEL": True, "BLOCKS_A_GROUP": 4},
        "4-bit direct g128": {"BITS": 4, "BILEVEL": False, "BLOCKS_A_GROUP": 8},
    }
    found = []
    sparse = {"OUTLIERS": True, "HAS_BIAS": False}
    for title, kind in kinds.items():
        for flavor, dtype in ((0, "*fp16"), (matvec.BF16, "*bf16")):
            operands = {"X": dtype, "XDense": dtype} | _STORED | _OUTLIERS | {"Bias": dtype, "Y": dtype}
            sizes = {"out_features": "i32", "chunks": "i32", "groups": "i32", "all_outliers": "i32"}
            constants = kind | sparse | _ROW | {"BF": flavor, "PERMUTED": False}
            registers = matvec.registers_for(constants, _MANY)
            found.append(Variant(f"matvec {title} {dtype}", matvec.matvec_kernel, operands | sizes, constants, 4, registers))
        found += [_sibling_rows(title, kind), _experts(title, kind)]
        operands = {"X": "*fp16", "Scale": "*fp32"} | _STORED | _OUTLIERS | {"Bias": "*fp16", "Y": "*fp16"}
        sizes = {"batch": "i32", "out_features": "i32", "tile_rows": "i32", "chunks": "i32", "groups": "i32"}
        for batch, tiles, warps, outliers in ((8, 4, 8, True), (32, 8, 8, True), (64, 8, 8, False)):
            constants = (
                kind
                | sparse
                | {
                    "OUTLIERS": outliers,
                    "SCALED": False,
                    "WHOLE": True,
                    "FULL": True,
                    "BATCH": batch,
                    "WARPS": warps,
                    "TILES": tiles,
                    "STAGES": 2,
                    "ENTRIES": 2,
                }
            )
            found.append(Variant(f"decode {title} batch {batch}", decode.decode_kernel, operands | sizes, constants, warps,
                                 decode.REGISTERS.get(batch)))  # fmt: skip
        found += _small(title, kind, operands, sizes)
        sizes |= dict.fromkeys(("parts", "base", "extra"), "i32")
        operands |= {"Partial": "*fp32"}
        clustered = {64: (2,), 128: (8,), 256: (2,)} if title == "3-bit bilevel" else {}
        for batch, cluster in [(width, size) for width in gemm_plan.CHOICES for size in (1, *clustered.get(width, ()))]:
            if title != "3-bit bilevel" and batch not in (32, 256):
                continue  # minutes of compiling for little
            choice = gemm_plan.CHOICES[batch]
            room = gemm_plan.room_bytes(kind["BITS"], 2, batch, choice.warps)
            constants = kind | {
                "OUTLIERS": True, "HAS_BIAS": False, "SCALED": False, "BATCH": batch, "WARPS": choice.warps,
                "ROOM": room, "ENTRIES": 2, "CLUSTER": cluster,
            }  # fmt: skip
            name = f"gemm {title} batch {batch}" + f" clusters of {cluster}" * (cluster > 1)
            found.append(Variant(name, gemm.gemm_kernel, {"X": "*fp16"} | operands | sizes, constants, choice.warps,
                                 choice.registers, nvidia=(90,)))  # fmt: skip
        sizes = {"out_features": "i32", "in_features": "i32", "chunks": "i32", "groups": "i32"}
        operands = _STORED | _OUTLIERS | {"Out": "*fp16"} | sizes
        words, bits_at = field_constants(kind["BITS"])
        constants = kind | {"BF": 0, "OUTLIERS": True, "FIELD_WORDS": words, "FIELD_BITS": bits_at, "WARPS": 4}
        found.append(Variant(f"unpack {title}", unpack.unpack_kernel, operands, constants, 4))
        if kind["BILEVEL"] and kind["BLOCKS_A_GROUP"] > 1:
            continue  # the portable kernels know the group size as a divisor alone
        shape = {"out_features": "i32", "in_features": "i32", "blocks": "i32", "groups": "i32"}
        constants = {
            "WORDS": words, "BITS_AT": bits_at, "BITS": kind["BITS"], "SPREAD_BIT": SPREAD,
            "GROUP": 16 * kind["BLOCKS_A_GROUP"], "BILEVEL": kind["BILEVEL"], "PERMUTED": True,
        }  # fmt: skip
        operands = _STORED | {"Perm": "*i32", "Out": "*fp16"} | shape
        found.append(Variant(f"dense {title}", dequant.dense_kernel, operands, constants | {"COLUMNS": 128}, 4))
        operands = _STORED | {"Place": "*i64", "OutlierPtr": "*i32", "Outliers": "*i32"} | {"Out": "*fp16"} | shape
        constants = constants | {"CELLS": dequant.CELLS, "ENTRIES": dequant.ENTRIES}
        found.append(Variant(f"outliers {title}", dequant.outliers_kernel, operands, constants, 4))
    return found + _sibling_batches(found) + _expert_batches(found) + _prepare() + _fit_variants()


def _prepare() -> list[Variant]:
    """What makes x anew before a product of many rows."""
    found = []
    for scaled in (False, True):
        x = "*bf16" if scaled else "*fp16"
        operands = {"X": x, "Out": "*fp16", "Scale": "*fp32", "in_features": "i32", "columns": "i32"}
        constants = {"SCALED": scaled, "WIDTH": 64, "BLOCK": 2048}
        found.append(Variant(f"prepare{' scaled' * scaled}", prepare.prepare_kernel, operands, constants, 4, nvidia=(90,)))
        constants = {"SCALED": scaled, "WIDTH": 64}
        found.append(Variant(f"prepare slots{' scaled' * scaled}", prepare.slots_kernel, operands, constants, 4, nvidia=(90,)))
    return found


def _small(title: str, kind: dict[str, Any], operands: dict[str, str], sizes: dict[str, str]) -> list[Variant]:
    """The kernel of small batches, as it runs for small matrices and large ones; without outliers for the first kind alone."""
    found = []
    operands = operands | {"Partial": "*fp32"} | sizes | dict.fromkeys(("reciprocal", "base", "extra"), "i32")
    dense = [(small.choice_for(8, True, False), 8, 0, " dense")]
    for choice, width, kept, what in [
        (small.choice_for(each, kind["BILEVEL"], large), each, 64, " large" * large)
        for each in small.WIDTHS
        for large in (False, True)[: 1 + (kind["BILEVEL"] and each in small.LARGE_CHOICES)]
    ] + dense * (title == "3-bit bilevel"):
        constants = kind | {
            "HAS_BIAS": False, "SCALED": False, "BATCH": width, "WARPS": choice.warps, "TALL": choice.tall,
            "STAGES": choice.stages, "KEPT": kept, "SETS": choice.sets,
            "ROOM": small.room_bytes(kind["BITS"], kept, width, choice.warps, choice.tall, choice.stages),
        }  # fmt: skip
        name = f"small {title} batch {width}{what}"
        found.append(Variant(name, small.small_kernel, operands, constants, choice.warps, choice.registers, nvidia=(90,)))
    return found


def _siblings(sizes: tuple[str, ...], of_each: tuple[str, ...]) -> dict[str, str]:
    """What kernels of three matrices that share x are given: these sizes, and of each matrix these besides its words."""
    three = range(TOGETHER)
    operands = {"X": "*fp16", "Scale": "*fp32"} | {f"Joined{i}": "*i32" for i in three}
    operands |= {f"{name}{i}": "*fp16" for name in ("Bias", "Y") for i in three}
    operands |= {"Partial": "*fp32"} | dict.fromkeys((*sizes, "first1", "first2"), "i32")
    for i in three:
        names = ("at_scales", "at_zeros", "at_pointers", "at_outliers", "out_features", *of_each)
        operands |= {f"{name}{i}": "i32" for name in names}
    return operands


def _sibling_rows(title: str, kind: dict[str, Any]) -> Variant:
    """Three matrices that share a row."""
    operands = _siblings(("chunks", "groups"), ("outliers",))
    del operands["Scale"], operands["Partial"]
    constants = kind | _ROW | {"HAS_BIAS": False}
    registers = matvec.registers_for(constants, _MANY)
    return Variant(f"siblings {title}", siblings.row_kernel, operands, constants, 4, registers)


def _sibling_batches(of_one: list[Variant]) -> list[Variant]:
    """Three matrices that share a batch, for the kernels of small_kernel and gemm_kernel."""
    kernels = {
        small.small_kernel: (siblings.few_rows_kernel, "reciprocal"),
        gemm.gemm_kernel: (siblings.many_rows_kernel, "parts"),
    }
    found = []
    for variant in of_one:
        if variant.kernel in kernels and "3-bit bilevel batch" in variant.name:  # one kind of clusters is enough
            if variant.constants.get("CLUSTER", 1) not in (1, 8):
                continue
            kernel, own = kernels[variant.kernel]
            operands = _siblings(("batch", "chunks", "groups", own), ("base", "extra"))
            found.append(dataclasses.replace(variant, name=f"siblings {variant.name}", kernel=kernel, arguments=operands))
    return found


def _experts(title: str, kind: dict[str, Any]) -> Variant:
    """The experts of each row."""
    operands = {"X": "*fp16", "Ids": "*i64", "Table": "*i64", "Stored": "*i32", "Y": "*fp16"}
    sizes = ("chunks", "groups", "tiles", "out_features", "experts", "parts", "pairs_a_row")
    operands |= dict.fromkeys((*sizes, "at_scales", "at_zeros", "at_pointers", "at_outliers"), "i32")
    registers = matvec.registers_for(kind | _ROW, _MANY)
    return Variant(f"experts {title}", grouped.experts_kernel, operands, kind | _ROW, 4, registers)


def _expert_batches(of_one: list[Variant]) -> list[Variant]:
    """Blocks of experts' rows, for the kernels of small_kernel and gemm_kernel."""
    kernels = {small.small_kernel: expert_batches.few_rows_kernel, gemm.gemm_kernel: expert_batches.many_rows_kernel}
    found = []
    for variant in of_one:
        if variant.kernel in kernels and "3-bit bilevel batch" in variant.name and variant.constants.get("CLUSTER", 1) == 1:
            operands = {"X": "*fp16", "Scale": "*fp32", "Blocks": "*i32", "Table": "*i64", "Stored": "*i32", "Y": "*fp16"}
            sizes = (
                "programs",
                "experts",
                "chunks",
                "groups",
                *(["reciprocal"] if variant.kernel is small.small_kernel else []),
            )
            operands |= dict.fromkeys((*sizes, "out_features", "base"), "i32")
            operands |= dict.fromkeys(("at_scales", "at_zeros", "at_pointers", "at_outliers"), "i32")
            constants = {name: value for name, value in variant.constants.items() if name not in ("HAS_BIAS", "CLUSTER")}
            constants["PARTS"] = 2
            found.append(
                dataclasses.replace(
                    variant,
                    name=f"experts {variant.name}",
                    kernel=kernels[variant.kernel],
                    arguments=operands,
                    constants=constants,
                )
            )
    return found


def _fit_variants() -> list[Variant]:
    """The quantizer's kernels for groups of 16 columns, with all that they can be given and with as little."""
    found = []
    w = {"W": "*fp32", "Free": "*i1", "U": "*fp32"}
    sizes = {"R": "i32", "top": "fp32", "stride": "i32"}
    per_row = {name: "*fp32" for name in ("Scale", "Zero", "WeightS", "WeightZ")}
    best = {"BestStats": "*fp32", "BestScales": "*u8", "BestZeros": "*u8", "BestCodes": "*u8", "BestLoss": "*fp32"}
    out = {"Values": "*fp32", "Errors": "*fp32", "Loss": "*fp32"}
    for title, metric, free in (("plain", False, False), ("outliers", False, True), ("metric and outliers", True, True)):
        kind = {"N": FIT_COLUMNS, "HAS_U": metric, "HAS_FREE": free}
        for leave, shrinks, refits in ((False, 8, 2), (True, 4, 1)):
            how = {"SHRINKS": shrinks, "REFITS": refits, "LEAVE": leave, "ROWS": fit.ROWS}
            operands = w | per_row | {"Loss": "*fp32"} | sizes
            found.append(Variant(f"search {title}{' leave' * leave}", fit.search_kernel, operands, kind | how, 2, nvidia=(90,)))
        found.append(Variant(f"round {title}", fit.round_kernel, w | {"Stats": "*fp32"} | best | sizes, kind, 2, nvidia=(90,)))
        operands, how = w | {"Decoded": "*fp32"} | out | {"R": "i32"}, {"STORE": metric, "ROWS": fit.ROWS}
        operands = {name: operands[name] for name in ("W", "Decoded", "Free", "U", "Values", "Errors", "Loss", "R")}
        found.append(Variant(f"residual {title}", fit.residual_kernel, operands, kind | how, 2, nvidia=(90,)))
    operands = per_row | {"Stats": "*fp32", "R": "i32"}
    found.append(Variant("tile start", fit.tile_start_kernel, operands, {"TILES": fit.TILES}, 2, nvidia=(90,)))
    return found


@dataclass(frozen=True)
class Usage:
    """registers a thread; spills: loads and stores of local memory; instructions by name."""

    registers: int
    spills: int
    instructions: collections.Counter[str]


def _inspect(compiled: Any, what: str) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any) -> list[str]:
    """The instructions of an NVIDIA kernel, in their order."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", _inspect(compiled, "-sass"), re.MULTILINE)


def usage(compiled: Any) -> Usage:
    """What an NVIDIA kernel uses, read from its machine code."""
    names = [re.sub(r"^@!?U?P\w+ ", "", line) for line in machine_code(compiled)]
    instructions = collections.Counter(re.match(r"[A-Z0-9_]*", name)[0] for name in names)  # type: ignore[index]
    registers = int(re.findall(r"REG:(\d+)", _inspect(compiled, "-res-usage"))[0])
    return Usage(registers, instructions["LDL"] + instructions["STL"], instructions)


def main() -> None:
    """Print a line for each kernel on sm_90."""
    for variant in variants():
        used = usage(variant.compile(GPUTarget("cuda", 90, 32)))
        most = ", ".join(f"{name} {count}" for name, count in used.instructions.most_common(8))
        print(f"{variant.name}: {used.registers} registers, {used.spills} spills, {used.instructions.total()}: {most}")


if __name__ == "__main__":
    main()
