"""Writing a checkpoint, shard by shard, so that a run that dies never leaves a folder that looks complete (spec 10).

Shards are written under temporary names and synced. `finish` renames them, then writes the index, then the extra files,
and config.json with its quantization_config last of all: before that rename no reader accepts the folder.

With an identity to resume by, tensors are spooled beside a journal (journal.py) as they come, so that memory holds one
module, and a run that is killed at any moment is taken up by the next one with the same identity and the same calls. Where
it is known what will come (`expect`), a spool is laid out as its shard, and becomes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .header import DTYPE_BYTES, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_RANK, MAX_SHARDS, read_header, short
from .journal import JOURNAL, PARTIAL, Journal, Spooled, final_names, partial_shard
from .layout import Layout, TensorSpec
from .lock import FolderLock
from .matrix import PackedMatrix, SpqrMatrix
from .metadata import HEADER_HASH_KEY, NO_HASH, ShardMetadata, compact_json, header_hash, quantization_config
from .payload import InMemory, check_payload, not_finite_dense
from .reader import BIAS_DTYPES, CONFIG, INDEX, NUMPY, OWN_LEAVES, SINGLE

Array = npt.NDArray[np.generic]
Stored = Array | Spooled | TensorSpec  # what has a shape and nbytes

TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """What goes into a shard together: one quantized module with its bias, or one dense tensor.

    key: the module's or the tensor's name. tensors: name -> dtype and array. digests: name -> sha256 ({} where nobody
    asked for them).
    """

    key: str
    layout: Layout | None
    tensors: dict[str, tuple[str, Array]]
    digests: dict[str, str]


def pack(
    module: str, matrix: SpqrMatrix | PackedMatrix, bias: tuple[str, Array] | None = None, *, digests: bool = True
) -> Packed:
    """One module's packed tensors, checked, for `CheckpointWriter.add`. Several threads may call this at once."""
    packed: dict[str, Array] = matrix.pack()
    check_payload(matrix.layout, packed, module)
    specs = matrix.layout.tensors()
    # `pack` returns views of the caller's statistics and permutation, which may change before the shard is written.
    tensors = {
        f"{module}.{leaf}": (specs[leaf].dtype, array if leaf == "weight" else array.copy()) for leaf, array in packed.items()
    }
    if bias is not None:
        tensors[f"{module}.bias"] = bias
    return Packed(module, matrix.layout, tensors, _digests(tensors) if digests else {})


def _digests(tensors: Mapping[str, tuple[str, Array]]) -> dict[str, str]:
    return {name: hashlib.sha256(array.data).hexdigest() for name, (_, array) in tensors.items()}


def serialize(tensors: Mapping[str, tuple[str, Stored]], metadata: Mapping[str, str], *, hash_header: bool = True) -> bytes:
    """The 8 + N header bytes of a safetensors file with these tensors (name -> dtype, array or the like), in `file_order`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    if hash_header:
        entries["__metadata__"][HEADER_HASH_KEY] = NO_HASH
    position = 0
    for name in file_order(tensors):
        dtype, array = tensors[name]
        entries[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    raw = compact_json(entries).encode()
    raw += b" " * (-len(raw) % 8)
    if hash_header:
        raw = raw.replace(NO_HASH.encode(), header_hash(raw).encode(), 1)
    if len(raw) > MAX_HEADER_BYTES:
        raise SpqrError(
            "E002", "writer", f"a header of {len(raw)} bytes, the limit is {MAX_HEADER_BYTES}: write smaller shards"
        )
    return len(raw).to_bytes(8, "little") + raw


def file_order(tensors: Mapping[str, tuple[str, Stored]]) -> list[str]:
    """Wide dtypes first, then by name: every tensor starts at a multiple of its element's size."""
    return sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name))


def stored(array: Any, dtype: str | None = None) -> tuple[str, Array]:
    """dtype and raw numpy bytes of a numpy array or a torch tensor. `dtype` tells what raw integers are (BF16)."""
    if hasattr(array, "detach"):
        tensor = array.detach().cpu().contiguous()
        name = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if name in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
            torch = sys.modules["torch"]
            tensor = tensor.view(torch.int16 if name == "BF16" else torch.uint8)
        if name is None:
            raise SpqrError("E109", "writer", f"{tensor.dtype} is no dtype of this format")
        return dtype or name, tensor.numpy()
    array = np.asarray(array)
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    name = dtype or TORCH_DTYPES.get(array.dtype.name)
    if name not in DTYPE_BYTES or DTYPE_BYTES[name] != array.dtype.itemsize:
        raise SpqrError("E109", "writer", f"{array.dtype} as {short(dtype)} is no dtype of this format")
    raw = contiguous.view(NUMPY[name]) if array.ndim else contiguous.reshape(1).view(NUMPY[name]).reshape(())
    return name, raw.astype(raw.dtype.newbyteorder("<"), copy=False)


class CheckpointWriter:
    """Writes a checkpoint into an empty folder. Same calls, same bytes.

    config: the model's config.json. quantization_config: the base of its section (weight_bits, group_size, statistics,
    provenance, modules_to_not_convert, x_ keys); method, version and features are filled in here. hashes: record the
    sha256 of every tensor and header. At most one shard of `max_shard_bytes` (or one larger module) is held in memory.
    Raises E506 where the folder is not empty, E512 where another writer is at work in it. As a context manager it removes
    what it wrote if the block raises.

    resume: everything that the output depends on, as JSON. Then a journal is kept, and what an earlier run with the same
    identity had finished is taken over: `notes` says what that is, and the caller goes on with the call that would have
    come next. E511 where it was another identity; `restart` throws away what lies there. Of the exceptions of a block only
    SpqrError removes everything: after any other the next run goes on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        quantization_config: Mapping[str, Any] | None = None,
        max_shard_bytes: int = 5_000_000_000,
        provenance: Mapping[str, Any] | None = None,
        hashes: bool = True,
        resume: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._config = {key: value for key, value in config.items() if key != "quantization_config"}
        self._section = dict(quantization_config or {})
        for key in ("quant_method", "format_version", "features"):
            self._section.pop(key, None)
        if provenance is not None:
            self._section["provenance"] = provenance
        self._max_shard_bytes, self._hashes = max_shard_bytes, hashes
        self._modules: dict[str, Layout] = {}
        self._place: dict[str, int] = {}  # tensor -> number of its shard
        self._dense_parents: dict[str, str] = {}  # name without its leaf -> name, biases left out
        self.notes: dict[str, Any] = {}  # module or dense tensor that is written -> what the caller noted with it
        self._expected: dict[str, tuple[int, int, int]] = {}  # tensor -> number of its shard, offset in it, bytes
        self._total_bytes = self._shards = 0
        self._begin_shard()
        self._written: list[Path] = []  # temporary and final names of this run, for abort
        self._done = False
        make_quantization_config((), self._section)  # fails now rather than after hours
        self._journal: Journal | None = None
        require_empty(self.folder, resume is not None)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        try:
            self._prepare(resume, restart)
        except BaseException:
            self._lock.release()
            raise

    def _prepare(self, resume: Mapping[str, Any] | None, restart: bool) -> None:
        leftovers = require_empty(self.folder, resume is not None)  # again, now that nobody else is at work
        if resume is None or restart or not (self.folder / JOURNAL).exists():
            # The journal goes last: it says which final names are leftovers.
            for path in sorted(leftovers, key=lambda path: path.name == JOURNAL):
                path.unlink()
        if resume is not None:
            self._journal = Journal(self.folder, resume)
            self._replay(self._journal)

    def _replay(self, journal: Journal) -> None:
        """Everything as it was after the last call that the journal knows."""
        sizes: dict[int, int] = {}
        try:
            for record in journal.records:
                if "shard" in record:
                    self._shards = int(record["shard"])
                    sizes[self._shards] = int(record["bytes"])
                    self._place |= dict.fromkeys(self._open, self._shards)
                    self._begin_shard()
                elif "tensors" in record:
                    layout = None if record["layout"] is None else Layout(**record["layout"])
                    spooled = journal.spooled(record)
                    dtypes = {name: dtype for name, dtype, *_ in record["tensors"]}
                    held: dict[str, tuple[str, Array | Spooled]] = {
                        name: (dtypes[name], tensor) for name, tensor in spooled.items()
                    }
                    self._hold(record["key"], layout, held, {n: t.sha256 for n, t in spooled.items()}, record["note"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"not a journal that this version wrote ({short(str(error))}); --restart begins anew"
            raise SpqrError("E511", str(journal.path), what) from None
        for number, size in sizes.items():
            path = self._shard_path(number)
            if not path.is_file() or path.stat().st_size != size:
                raise SpqrError("E511", str(path), f"expected {size} bytes, as the journal says; --restart begins anew")

    # What goes in

    def expect(self, coming: Iterable[tuple[str, Layout | TensorSpec]]) -> None:
        """What will be added, from the first shard on and in this order, as far as it is known: modules with their layout (and
        no bias), dense tensors with dtype and shape.

        With a journal, bytes that come as expected are written once, to where they lie in their shard, and others twice. It
        changes no byte of the checkpoint. E002 where a shard's header would be too large."""
        for number, (tensors, modules) in enumerate(self._in_shards(coming), 1):
            position = len(self._head(tensors, modules, dict.fromkeys(tensors, NO_HASH)))
            for name in file_order(tensors):
                self._expected[name] = number, position, tensors[name][1].nbytes
                position += tensors[name][1].nbytes
        self._laid_out = self._lie_as_expected(self._open)

    def _in_shards(
        self, coming: Iterable[tuple[str, Layout | TensorSpec]]
    ) -> Iterator[tuple[dict[str, tuple[str, TensorSpec]], dict[str, Layout]]]:
        """The tensors and modules of each shard, as `_add` would fill them."""
        tensors: dict[str, tuple[str, TensorSpec]] = {}
        modules: dict[str, Layout] = {}
        size = 0
        for key, what in coming:
            if isinstance(what, Layout):
                specs = {f"{key}.{leaf}": spec for leaf, spec in what.tensors().items()}
            else:
                specs = {key: what}
            nbytes = sum(spec.nbytes for spec in specs.values())
            if tensors and size + nbytes > self._max_shard_bytes:
                yield tensors, modules
                tensors, modules, size = {}, {}, 0
            tensors |= {name: (spec.dtype, spec) for name, spec in specs.items()}
            if isinstance(what, Layout):
                modules[key] = what
            size += nbytes
        if tensors:
            yield tensors, modules

    def pack(self, module: str, matrix: SpqrMatrix | PackedMatrix, bias: Any = None) -> Packed:
        """`pack` for this writer, with a bias (F16, BF16 or F32 [out])."""
        raw = None if bias is None else self._bias(module, matrix.layout, *stored(bias))
        return pack(module, matrix, raw, digests=self._wants_digests)

    @property
    def _wants_digests(self) -> bool:
        return self._hashes or self._journal is not None

    def add(self, packed: Packed, note: Any = None) -> None:
        """Adds what `pack` gave. `note`, any JSON, is in `notes` under the module's name, also after a resumption."""
        module = packed.key
        if module in self._modules:
            raise SpqrError("E404", module, "the module was added before")
        if module in self._dense_parents:
            raise SpqrError("E108", self._dense_parents[module], f"a dense tensor of the quantized module {module}")
        self._add(packed, note)

    def add_matrix(self, module: str, matrix: SpqrMatrix | PackedMatrix, bias: Any = None, note: Any = None) -> None:
        """Adds one module's packed tensors, and its bias (F16, BF16 or F32 [out]). Its payload is checked first."""
        if module in self._modules:
            raise SpqrError("E404", module, "the module was added before")
        self.add(self.pack(module, matrix, bias), note)

    def add_dense(self, name: str, array: Any, dtype: str | None = None, note: Any = None) -> None:
        """Adds a numpy array or a torch tensor as it is. `dtype` tells what raw integers are (BF16, F8_E4M3)."""
        module, _, leaf = name.rpartition(".")
        raw = stored(array, dtype)
        if module in self._modules:
            if leaf != "bias":
                raise SpqrError("E108", name, f"{module} is quantized and its entry allows no {leaf}")
            raw = self._bias(module, self._modules[module], *raw)
        elif leaf in OWN_LEAVES:
            raise SpqrError("E108", name, f"{leaf} is a name of quantized modules")
        for error in not_finite_dense(InMemory(raw[1]), raw[0], name):
            raise error
        # A spool has the bytes at once; in memory they stay until the shard is written, and the caller's may change.
        tensors = {name: (raw[0], raw[1].copy() if self._journal is None else raw[1])}
        self._add(Packed(name, None, tensors, _digests(tensors) if self._wants_digests else {}), note)

    @staticmethod
    def _bias(module: str, layout: Layout, dtype: str, array: Array) -> tuple[str, Array]:
        if dtype not in BIAS_DTYPES:
            raise SpqrError("E109", f"{module}.bias", f"dtype {dtype}, expected {' or '.join(BIAS_DTYPES)}")
        if array.shape != (layout.out_features,):
            raise SpqrError("E110", f"{module}.bias", f"shape {array.shape}, expected {(layout.out_features,)}")
        for error in not_finite_dense(InMemory(array), dtype, f"{module}.bias"):
            raise error
        return dtype, array.copy()

    def _add(self, packed: Packed, note: Any) -> None:
        if self._done:
            raise RuntimeError("this writer is finished")
        tensors = packed.tensors
        for name, (_, array) in tensors.items():
            if name in self._open or name in self._place:
                raise SpqrError("E404", name, "the tensor was added before")
            if not 0 < len(name.encode()) <= MAX_NAME_BYTES or array.ndim > MAX_RANK:
                raise SpqrError("E006", short(name), f"{len(name.encode())} bytes of name, rank {array.ndim}")
        size = sum(array.nbytes for _, array in tensors.values())
        if self._open and self._open_bytes + size > self._max_shard_bytes:
            self._flush()
        held: dict[str, tuple[str, Array | Spooled]] = dict(tensors)
        if self._journal is not None:
            layout = None if packed.layout is None else packed.layout.as_dict()
            record = {"key": packed.key, "layout": layout, "note": note}
            spooled = self._journal.add(record, tensors, packed.digests, self._places(tensors))
            held = {name: (tensors[name][0], tensor) for name, tensor in spooled.items()}
        self._hold(packed.key, packed.layout, held, packed.digests, note)

    def _hold(
        self, key: str, layout: Layout | None, held: dict[str, tuple[str, Array | Spooled]], digests: dict[str, str], note: Any
    ) -> None:
        self.notes[key] = note
        self._laid_out = self._laid_out and self._lie_as_expected(held)
        self._open |= held
        self._open_digests |= digests
        if layout is not None:
            self._open_modules[key] = self._modules[key] = layout
        elif not key.endswith(".bias"):
            self._dense_parents.setdefault(key.rpartition(".")[0], key)
        size = sum(tensor.nbytes for _, tensor in held.values())
        self._open_bytes += size
        self._total_bytes += size

    def read_matrix(self, module: str) -> SpqrMatrix:
        """A module that was added before, in this run or in the one that it takes up."""
        packed = self.read_packed(module)
        return SpqrMatrix.unpack(packed.layout, packed.tensors)

    def read_packed(self, module: str) -> PackedMatrix:
        """The same in its stored form."""
        layout = self._modules[module]
        arrays: dict[str, Array] = {}
        for leaf in layout.tensors():
            name = f"{module}.{leaf}"
            if name in self._open:
                dtype, tensor = self._open[name]
                raw = b"".join(tensor.parts()) if isinstance(tensor, Spooled) else tensor.tobytes()
                shape = tensor.shape
            else:
                header = read_header(path := self._shard_path(self._place[name]))
                info = header.tensors[name]
                dtype, shape = info.dtype, info.shape
                with open(path, "rb") as file:
                    file.seek(header.data_start + info.begin)
                    raw = file.read(info.nbytes)
            arrays[leaf] = np.frombuffer(raw, NUMPY[dtype]).reshape(shape)
        return PackedMatrix(layout, arrays)

    # Shards

    def _partial(self, number: int) -> Path:
        return partial_shard(self.folder, number)

    def _begin_shard(self) -> None:
        self._open: dict[str, tuple[str, Array | Spooled]] = {}
        self._open_digests: dict[str, str] = {}
        self._open_modules: dict[str, Layout] = {}
        self._open_bytes = 0
        self._laid_out = True  # all tensors so far lie where they are expected

    def _lie_as_expected(self, held: Mapping[str, tuple[str, Array | Spooled]]) -> bool:
        return all(
            isinstance(tensor, Spooled) and self._expected.get(name) == (self._shards + 1, tensor.offset, tensor.nbytes)
            for name, (_, tensor) in held.items()
        )

    def _places(self, tensors: Mapping[str, tuple[str, Array]]) -> dict[str, int] | None:
        """The offsets of tensors that are expected in the open shard. None where one is not, or where an earlier one of the
        shard lies elsewhere, for places of both kinds could overlap."""
        found = {name: self._expected.get(name, (0, 0, 0)) for name in tensors}
        fit = all(found[name][::2] == (self._shards + 1, array.nbytes) for name, (_, array) in tensors.items())
        return {name: offset for name, (_, offset, _) in found.items()} if fit and self._laid_out else None

    def _head(
        self, tensors: Mapping[str, tuple[str, Stored]], modules: Mapping[str, Layout], digests: Mapping[str, str]
    ) -> bytes:
        hashes = {name: digests[name] for name in file_order(tensors)} if self._hashes else {}
        return serialize(tensors, ShardMetadata.of(modules, hashes).as_strings(), hash_header=self._hashes)

    def _lie_behind(self, head: bytes, order: Iterable[str]) -> bool:
        """True where the open tensors lie in their spool as they do in a shard with this head."""
        position = len(head)
        for name in order:
            tensor = self._open[name][1]
            if not isinstance(tensor, Spooled) or tensor.offset != position:
                return False
            position += tensor.nbytes
        return True

    def _flush(self) -> None:
        """Writes and syncs the open shard under its temporary name."""
        if self._shards == MAX_SHARDS:
            raise SpqrError("E006", str(self.folder), f"more than {MAX_SHARDS} shards")
        order = file_order(self._open)
        head = self._head(self._open, self._open_modules, self._open_digests)
        size = len(head) + self._open_bytes
        self._shards += 1
        journal = self._journal
        if not (journal and self._lie_behind(head, order) and journal.shard_spooled(self._shards, head, size)):
            parts = itertools.chain([head], *(_bytes_of(self._open[name][1]) for name in order))
            self._write(self._partial(self._shards), parts)
            if journal is not None:
                journal.shard_written(self._shards, size)
        self._place |= dict.fromkeys(order, self._shards)
        self._begin_shard()

    def _write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """A new file with these bytes, on disk when this returns. Its mode is 0o666 & ~umask."""
        try:
            if self._journal is not None:
                path.unlink(missing_ok=True)  # what a killed run had begun to write
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._written.append(path)
            try:
                for part in parts:
                    view = memoryview(part)
                    if view.nbytes:  # a view with a zero in its shape cannot be cast
                        _write_all(descriptor, view.cast("B") if view.ndim else view.tobytes())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            self._give_up()
            raise

    def _rename(self, source: Path, target: Path) -> None:
        try:
            os.rename(source, target)
            self._written.append(target)
        except OSError:
            self._give_up()
            raise

    def _sync_folder(self) -> None:
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            self._give_up()
            raise

    def _publish(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """write, fsync, rename, fsync of the folder."""
        target = self.folder / name
        self._write(self.folder / (name + PARTIAL), parts)
        self._rename(self.folder / (name + PARTIAL), target)
        self._sync_folder()

    def finish(self, extra_files: Mapping[str, bytes | str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] = ()) -> None:
        """Completes the checkpoint. `extra_files`: paths to copy under their own names, or name -> bytes or path."""
        if self._done:
            raise RuntimeError("this writer is finished")
        try:
            extra = extra_files if isinstance(extra_files, Mapping) else {Path(file).name: file for file in extra_files}
            if self._open or not self._shards:
                self._flush()
            names = {number: self._name(number) for number in range(1, self._shards + 1)}
            own = {CONFIG, INDEX, *names.values()}
            for name in sorted(extra):
                there = self._journal is None and (self.folder / name).exists()
                if name in own or Path(name).name != name or name.endswith(PARTIAL) or there:
                    raise SpqrError("E505", name, "not a name for an extra file")
            if self._journal is not None:
                self._journal.finishing(own | set(extra))
            for number, name in names.items():
                if self._journal is None or self._partial(number).exists():  # else renamed by the run that was killed
                    self._rename(self._partial(number), self.folder / name)
            self._sync_folder()
            if self._shards > 1:
                weight_map = {tensor: names[self._place[tensor]] for tensor in sorted(self._place)}
                index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
                self._publish(INDEX, [pretty_json(index)])
            for name in sorted(extra):
                self._publish(name, _parts(extra[name]))
            section = make_quantization_config(self._modules.values(), self._section)
            self._publish(CONFIG, [pretty_json({**self._config, "quantization_config": section})])
            if self._journal is not None:
                self._journal.remove()
        except BaseException as error:
            self._give_up(error)
            raise
        self._done = True
        self._lock.release()

    def _name(self, number: int) -> str:
        return SINGLE if self._shards == 1 else f"model-{number:05d}-of-{self._shards:05d}.safetensors"

    def _shard_path(self, number: int) -> Path:
        """Where shard `number` lies: under its temporary name, or under its own if a killed run had renamed it."""
        partial = self._partial(number)
        return partial if partial.exists() else self.folder / self._name(number)

    def _give_up(self, error: BaseException | None = None) -> None:
        """After an error: with a journal, all but a broken rule leaves what the next run can go on with, and no final name."""
        if self._journal is None or isinstance(error, SpqrError):
            self.abort()
        elif not self._done:
            self._done = True
            self._journal.close()
            if not (self.folder / CONFIG).exists():
                self._take_back()
            self._lock.release()

    def _take_back(self) -> None:
        """Final names back to temporary ones, as far as the disk allows."""
        with contextlib.suppress(OSError):
            for number in range(1, self._shards + 1):
                if not self._partial(number).exists():
                    os.rename(self.folder / self._name(number), self._partial(number))
            for name in final_names(self.folder / JOURNAL):
                (self.folder / name).unlink(missing_ok=True)

    def abort(self) -> None:
        """Removes every file that this run wrote, or took over. Does nothing after `finish`."""
        if self._done:
            return
        self._done = True
        partial: list[Path] = []
        if self._journal is not None:
            # In this order a kill leaves either what can be taken up or nothing but temporary names.
            self._take_back()
            with contextlib.suppress(OSError):
                self._journal.remove()
            partial = [self._partial(number) for number in range(1, self._shards + 1)]
        for path in [*self._written, *partial]:
            with contextlib.suppress(OSError):  # the disk is in trouble: the first error is the one to report
                path.unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._give_up(error)


def require_empty(folder: Path, resumable: bool = False) -> list[Path]:
    """What a killed run of ours left in `folder`, which is otherwise empty or missing. Raises E506 where it is not.

    resumable: a complete checkpoint whose journal is still there is such a leftover too; else it is a checkpoint."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise SpqrError("E506", str(folder), "the destination is not a folder")
    names = sorted(os.listdir(folder))
    ours = final_names(folder / JOURNAL)
    if CONFIG in names and not resumable:
        ours = set()
    taken = [name for name in names if not name.endswith(PARTIAL) and name not in ours]
    if taken:
        raise SpqrError("E506", str(folder), f"the destination is not empty: {short(taken[0])} and {len(taken) - 1} more")
    return [folder / name for name in names]


def make_quantization_config(layouts: Iterable[Layout], base: Mapping[str, Any]) -> dict[str, Any]:
    """The section for these modules from its base: see `CheckpointWriter`."""
    return quantization_config(layouts, **base)


def pretty_json(value: object) -> bytes:
    """Indented JSON with a final newline, in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view[: 2**26]) :]


def _bytes_of(tensor: Array | Spooled) -> Iterable[bytes | memoryview]:
    return tensor.parts() if isinstance(tensor, Spooled) else (tensor.data,)


def _parts(content: bytes | str | os.PathLike[str]) -> Iterable[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        while part := file.read(2**24):
            yield part
