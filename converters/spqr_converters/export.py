"""The way out: an SpQR checkpoint as dense safetensors, as a GGUF file, or as GPTQ. One tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import TILE
from spqr_format.lock import FolderLock
from spqr_format.matrix import SpqrMatrix
from spqr_format.reader import Checkpoint
from spqr_format.writer import PARTIAL, TORCH_DTYPES, require_empty

from .dense import TORCH, dense_tensor
from .job import companions

Progress = Callable[[str, int, int], None]
_PIECE = 512  # rows, a multiple of TILE
TARGETS = ("safetensors", "gguf", "gptq")
DTYPES = {
    "safetensors": ("auto", "float16", "bfloat16", "float32"),
    "gguf": ("auto", "float16", "bfloat16", "float32", "q8_0"),
    "gptq": ("auto",),
}


@dataclass
class ExportReport:
    """What was written. rounding: module -> relative Frobenius error of the dtype alone, against the exact float32
    weights of the checkpoint."""

    to: str
    dtype: str
    files: list[str] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    rounding: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest_rounding": max(self.rounding.values(), default=0.0)}


def export(
    model: str | Path, destination: str | Path, *, to: str, dtype: str = "auto", max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> ExportReport:  # fmt: skip
    """Writes the checkpoint `model` into the new folder `destination`. Until the end it has no config.json (GGUF: no
    .gguf file), so a killed run leaves nothing that loads.

    dtype: "auto" is the model's own (config.json); see `DTYPES` for each target's. progress(tensor, done, total) counts
    parameters. Errors: E505 for a target or dtype that does not exist or cannot hold the weights, E506, E510 where GPTQ
    has no place for what is stored, and the reader's for a broken checkpoint.
    """
    started = time.monotonic()
    if to not in TARGETS or dtype not in DTYPES[to]:
        raise SpqrError("E505", "export", f"to {to!r} with dtype {dtype!r}: expected {DTYPES.get(to, TARGETS)}")
    target = Path(destination)
    leftovers = require_empty(target)
    with Checkpoint.open(model) as checkpoint:
        exporter = {"safetensors": _Dense, "gguf": _gguf, "gptq": _Gptq}[to](checkpoint, Path(model), dtype, progress)
        with Output(target, leftovers) as output:
            exporter.write(output, max_shard_bytes)
            output.publish()
    report: ExportReport = exporter.report
    report.files = sorted(output.names)
    report.bytes = sum((target / name).stat().st_size for name in report.files)
    report.seconds = time.monotonic() - started
    return report


class Output:
    """Files under temporary names. `publish` gives them their own, in the order they were made; if the block raises,
    all that was made is removed."""

    def __init__(self, folder: Path, leftovers: Iterable[Path]) -> None:
        self.folder, self.names, self._published = folder, list[str](), False
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        for path in leftovers:
            path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where to write the file that will be `name`."""
        self.names.append(name)
        return self.folder / (name + PARTIAL)

    def put(self, name: str, content: bytes) -> None:
        self.path(name).write_bytes(content)

    def publish(self) -> None:
        for name in self.names:
            with open(self.folder / (name + PARTIAL), "rb") as file:
                os.fsync(file.fileno())
        for name in self.names:
            os.replace(self.folder / (name + PARTIAL), self.folder / name)
        self._published = True

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()
        if kind is None:
            return
        for name in self.names:
            for path in (self.folder / (name + PARTIAL), self.folder / name):
                path.unlink(missing_ok=True)
        if self._made:
            self.folder.rmdir()


class Exporter:
    """What the three targets share: the dense tensors of a checkpoint, by their names in a dense model."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, dtype: str, progress: Progress | None) -> None:
        if checkpoint.config is None:
            raise SpqrError("E505", str(folder), "a single file has no config.json: export the folder")
        self.checkpoint, self.folder, self.progress = checkpoint, folder, progress
        self.config: dict[str, Any] = checkpoint.config
        own = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float16").removeprefix("torch.")
        self.as_stored = dtype == "auto"  # dense tensors keep their dtype
        self.dtype = (own if own in ("float16", "bfloat16", "float32") else "float16") if dtype == "auto" else dtype
        self.report = ExportReport(self.to, self.dtype)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for module, layout in checkpoint.modules.items():
            self.shapes[f"{module}.weight"] = (layout.out_features, layout.in_features)
        for name in checkpoint.dense:
            self.shapes[name] = tuple(checkpoint.info(name).shape)
        self.names = sorted(self.shapes, key=_natural)
        self._done, self._total = 0, sum(math.prod(shape) for shape in self.shapes.values())

    to = ""

    def write(self, output: Output, max_shard_bytes: int) -> None:
        raise NotImplementedError

    def matrix(self, name: str) -> SpqrMatrix | None:
        """The quantized matrix that stands for weight `name`."""
        module = name.removesuffix(".weight")
        return self.checkpoint.matrix(module) if name.endswith(".weight") and module in self.checkpoint.modules else None

    def load(self, name: str) -> torch.Tensor:
        """The dense tensor: float32 where it is quantized (exact), else as it is stored."""
        matrix = self.matrix(name)
        if matrix is not None:
            return torch.from_numpy(dequantized(matrix))
        return dense_tensor(self.checkpoint, name)

    def cast(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in a dtype; E505 where that has no room for its values."""
        found = tensor.to(dtype)
        if not torch.isfinite(found).all():
            raise SpqrError("E505", name, f"a value does not fit {str(dtype).removeprefix('torch.')}: choose bfloat16")
        self.rounded(name, tensor, found)
        return found

    def rounded(self, name: str, exact: torch.Tensor, found: torch.Tensor) -> None:
        """Records the error of the export's own rounding."""
        module = name.removesuffix(".weight")
        if module in self.checkpoint.modules and name != module:
            norm = exact.norm().item()
            self.report.rounding[module] = (found.float() - exact).norm().item() / norm if norm else 0.0

    def advance(self, name: str) -> None:
        size = math.prod(self.shapes[name])
        self.report.tensors += 1
        self.report.parameters += size
        self._done += size
        if self.progress is not None:
            self.progress(name, self._done, self._total)

    def put_companions(self, output: Output) -> None:
        for name, path in companions(self.folder).items():
            output.put(name, path.read_bytes())

    def put_config(self, output: Output, section: Mapping[str, Any] | None = None) -> None:
        config = {key: value for key, value in self.config.items() if key not in ("quantization_config", "torch_dtype")}
        config["dtype"] = self.dtype
        if section is not None:
            config["quantization_config"] = dict(section)
        output.put("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())

    def write_shards(
        self, output: Output, stored: dict[str, tuple[str, tuple[int, ...]]],
        make: Callable[[str], Mapping[str, torch.Tensor]], owner: Mapping[str, str], max_shard_bytes: int,
    ) -> None:  # fmt: skip
        """safetensors shards. stored: tensor -> dtype and shape, in order. owner: tensor -> the name that `make` takes,
        which returns all tensors of one owner; an owner's tensors stand in one shard."""
        sizes = {name: _itemsize(kind) * math.prod(shape) for name, (kind, shape) in stored.items()}
        groups: dict[str, list[str]] = {}
        for name in stored:
            groups.setdefault(owner[name], []).append(name)
        shards: list[list[str]] = [[]]
        filled = 0
        for key, names in groups.items():
            size = sum(sizes[name] for name in names)
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(key)
            filled += size
        weight_map = {}
        for number, keys in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for key in keys:
                for name in groups[key]:
                    kind, shape = stored[name]
                    header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
                    weight_map[name] = file
                    offset += sizes[name]
            raw = json.dumps(header, separators=(",", ":")).encode()
            raw += b" " * (-len(raw) % 8)
            with open(output.path(file), "wb") as stream:
                stream.write(len(raw).to_bytes(8, "little") + raw)
                for key in keys:
                    made = make(key)
                    for name in groups[key]:
                        stream.write(_raw(made[name], *stored[name], name))
                    self.advance(key)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
            output.put("model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def dequantized(matrix: SpqrMatrix) -> np.ndarray:
    """`matrix.dequantize()` in pieces of rows: its statistics spread over all columns take three times the result."""
    rows, columns = matrix.layout.out_features, matrix.layout.in_features
    found = np.empty((rows, columns), np.float32)
    for begin in range(0, rows, _PIECE):
        end = min(begin + _PIECE, rows)
        fields: dict[str, Any] = {"codes": matrix.codes[begin:end], "perm": matrix.perm}
        for leaf in ("scale_codes", "zero_codes", "group_scales", "group_zeros"):
            array = getattr(matrix, leaf)
            fields[leaf] = None if array is None else array[begin:end]
        if matrix.tile_stats is not None:
            fields["tile_stats"] = matrix.tile_stats[begin // TILE : -(-end // TILE)]
        if matrix.crow_indices is not None and matrix.col_indices is not None and matrix.values is not None:
            pointers = matrix.crow_indices[begin : end + 1]
            fields["crow_indices"] = pointers - pointers[0]
            fields["col_indices"] = matrix.col_indices[pointers[0] : pointers[-1]]
            fields["values"] = matrix.values[pointers[0] : pointers[-1]]
        shape = replace(matrix.layout, out_features=end - begin, outliers=0, permuted=matrix.perm is not None)
        found[begin:end] = SpqrMatrix(shape, **fields).dequantize()
    return found


class _Dense(Exporter):
    to = "safetensors"

    def _kind(self, name: str) -> str:
        kind = self.checkpoint.dtype_of(name) if name in self.checkpoint.place and name in self._dense else ""
        floats = not kind or kind in ("F16", "BF16", "F32", "F64")
        return TORCH_DTYPES[self.dtype] if not kind or (floats and not self.as_stored) else kind

    def write(self, output: Output, max_shard_bytes: int) -> None:
        self._dense = set(self.checkpoint.dense)
        stored = {name: (self._kind(name), self.shapes[name]) for name in self.names}

        def make(name: str) -> dict[str, torch.Tensor]:
            tensor = self.load(name)
            kind = TORCH[stored[name][0]]
            return {name: self.cast(name, tensor, kind) if tensor.is_floating_point() else tensor}

        self.write_shards(output, stored, make, {name: name for name in self.names}, max_shard_bytes)
        self.put_companions(output)
        self.put_config(output)


class _Gptq(Exporter):
    """GPTQ v2: qweight, qzeros, scales, g_idx. The same codes and statistics; the readers of GPTQ round s (q - z) to fp16."""

    to = "gptq"

    def write(self, output: Output, max_shard_bytes: int) -> None:
        modules = self.checkpoint.modules
        if not modules:
            raise SpqrError("E510", str(self.folder), "no quantized modules: export --to safetensors")
        first = next(iter(modules.values()))
        for name, layout in modules.items():
            why = None
            if layout.statistics != "direct":
                why = "its scales and zeros are quantized themselves"
            elif layout.outliers:
                why = f"it has {layout.outliers} outliers"
            elif (layout.weight_bits, layout.group_size) != (first.weight_bits, first.group_size):
                why = f"{layout.weight_bits} bits in groups of {layout.group_size}, other modules differ"
            elif layout.in_features * layout.weight_bits % 32 or layout.out_features * layout.weight_bits % 32:
                why = f"{layout.out_features} x {layout.in_features} codes do not fill words of 32 bits"
            if why:
                raise SpqrError("E510", name, f"GPTQ has no place for it: {why}; export --to safetensors works")
        bits, group = first.weight_bits, first.group_size
        stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        owner: dict[str, str] = {}
        for name in self.names:
            module = name.removesuffix(".weight")
            if module == name or module not in modules:
                stored[name] = (self.checkpoint.dtype_of(name), self.shapes[name])
                owner[name] = name
                continue
            rows, columns = self.shapes[name]
            groups = -(-columns // group)
            stored |= {
                f"{module}.qweight": ("I32", (columns * bits // 32, rows)),
                f"{module}.qzeros": ("I32", (groups, rows * bits // 32)),
                f"{module}.scales": ("F16", (groups, rows)), f"{module}.g_idx": ("I32", (columns,)),
            }  # fmt: skip
            owner |= dict.fromkeys((f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")), name)
        middle, ordered = True, False

        def make(name: str) -> dict[str, torch.Tensor]:
            nonlocal middle, ordered
            matrix = self.matrix(name)
            if matrix is None:
                return {name: self.load(name)}
            tensors = gptq_tensors(matrix, name)
            middle = middle and bool(np.all(matrix.group_zeros == 1 << (bits - 1)))
            ordered = ordered or matrix.perm is not None
            module = name.removesuffix(".weight")
            return {f"{module}.{leaf}": torch.from_numpy(array) for leaf, array in tensors.items()}

        self.write_shards(output, stored, make, owner, max_shard_bytes)
        dense = [name for name in self.names if owner.get(name) == name and len(self.shapes[name]) == 2]
        left = [n.removesuffix(".weight") for n in dense if re.search(r"\.\d+\.", n) and n.endswith(".weight")]
        section = {
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": middle, "desc_act": ordered,
            "checkpoint_format": "gptq_v2", "format": "gptq_v2", "lm_head": "lm_head" in modules, "true_sequential": True,
            "damp_percent": 0.01, "meta": {"quantizer": ["spqr-format:export"]},
        }  # fmt: skip
        if left:
            section["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in left}
        self.report.notes.append("readers of GPTQ round each weight to fp16: the last bit may differ from spqr's float32")
        self.put_companions(output)
        output.put("quantize_config.json", (json.dumps(section, indent=2) + "\n").encode())
        self.put_config(output, section)


def gptq_tensors(matrix: SpqrMatrix, where: str) -> dict[str, np.ndarray]:
    """qweight int32 [in * b / 32, out], qzeros int32 [groups, out * b / 32] (v2: as they are), scales fp16 [groups, out],
    g_idx int32 [in]. E510 where a zero needs more bits than a code has."""
    bits, columns = matrix.layout.weight_bits, matrix.layout.in_features
    assert matrix.group_zeros is not None
    assert matrix.group_scales is not None
    if matrix.group_zeros.max(initial=0) >= 1 << bits:
        raise SpqrError("E510", where, f"a zero of {matrix.group_zeros.max()} in {bits} bits: export --to safetensors works")
    order = np.arange(columns) if matrix.perm is None else matrix.perm
    codes, groups = np.empty_like(matrix.codes), np.empty(columns, np.int32)
    codes[:, order] = matrix.codes
    groups[order] = np.arange(columns) // matrix.layout.group_size
    return {
        "qweight": pack_words(codes.T, bits), "qzeros": np.ascontiguousarray(pack_words(matrix.group_zeros, bits).T),
        "scales": np.ascontiguousarray(matrix.group_scales.T), "g_idx": groups,
    }  # fmt: skip


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 [k * bits / 32, m] from [k, m]: each column one stream of bits, low first. k * bits is a multiple of 32."""
    rows = values.shape[0] * bits // 32
    values = np.pad(values, ((0, -values.shape[0] % 32), (0, 0)))
    blocks = values.reshape(-1, 32, values.shape[1]).astype(np.uint32)
    words = np.zeros((blocks.shape[0], bits, blocks.shape[2]), np.uint32)
    for j in range(32):
        word, shift = divmod(bits * j, 32)
        words[:, word] |= blocks[:, j] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= blocks[:, j] >> np.uint32(32 - shift)
    return words.reshape(-1, values.shape[1])[:rows].view(np.int32)


def _gguf(checkpoint: Checkpoint, folder: Path, dtype: str, progress: Progress | None) -> Exporter:
    from .export_gguf import GgufExporter  # needs the package gguf

    return GgufExporter(checkpoint, folder, dtype, progress)


def _natural(name: str) -> list[tuple[int, Any]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in name.split(".")]


def _itemsize(kind: str) -> int:
    if kind not in TORCH:
        raise SpqrError("E505", "export", f"a tensor of {kind}, which is not exported")
    return TORCH[kind].itemsize


def _raw(tensor: torch.Tensor, kind: str, shape: tuple[int, ...], name: str) -> memoryview:
    if tensor.dtype != TORCH[kind] or tuple(tensor.shape) != shape:
        raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, planned {kind} {shape}")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
