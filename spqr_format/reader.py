"""A checkpoint on disk: its structure checked from headers alone, then read tensor by tensor (spec 5 to 9).

Every file is opened once and read through that descriptor with pread into memory of our own. A file that is replaced
after the check still yields the bytes that were checked; one that is cut raises E001, where a mapping raises SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .header import MAX_JSON_BYTES, MAX_SHARDS, Header, TensorInfo, read_header_of, short, strict_json
from .layout import Layout
from .matrix import SpqrMatrix
from .metadata import Cache, ShardMetadata, check_config, check_header_hash, check_schema, features_of, parse
from .payload import check_payload

Array = npt.NDArray[np.generic]

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")

NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8", "F8_E4M3": "u1",
    "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1",
}  # fmt: skip

# Leaf names that no other format uses: where one stands without an entry in spqr_modules, an entry was lost (E108).
OWN_LEAVES = ("stat_codes", "tile_stats", "group_sc", "group_zp")
BIAS_DTYPES = ("F16", "BF16", "F32")


class Window:
    """One stored tensor, read piece by piece through its shard's descriptor."""

    def __init__(self, descriptor: int, offset: int, info: TensorInfo, where: str) -> None:
        self.shape, self.dtype = info.shape, np.dtype(NUMPY[info.dtype])
        self._descriptor, self._offset, self._where = descriptor, offset, where

    def flat(self, begin: int, end: int) -> Array:
        """Elements [begin, end) in row-major order, read-only."""
        out = np.empty(end - begin, self.dtype)
        _pread_into(self._descriptor, out, self._offset + begin * self.dtype.itemsize, self._where)
        out.flags.writeable = False
        return out


def _pread_into(descriptor: int, out: Array, offset: int, where: str) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + 2**30]], offset + done)
        if count == 0:
            raise SpqrError("E001", where, f"the file ends at byte {offset + done}: it was cut after it was checked")
        done += count


class Checkpoint:
    """A structurally valid checkpoint. Close it, or use it as a context manager.

    config: config.json as a dict, or None. modules: name -> Layout. headers: shard path -> Header.
    place: tensor name -> shard path. dense: the tensors that belong to no module's packed weight, biases included.
    sha256: tensor name -> recorded digest.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] | None = None
        self.modules: dict[str, Layout] = {}
        self.headers: dict[Path, Header] = {}
        self.place: dict[str, Path] = {}
        self.dense: list[str] = []
        self.sha256: dict[str, str] = {}
        self.version = ""
        self._descriptors: dict[Path, int] = {}
        self._listed: dict[Path, Mapping[str, Layout]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: bool = True) -> Checkpoint:
        """The checkpoint in a folder, or in a single .safetensors file (which has no config.json to check).

        Checks every rule E0xx, E1xx and E4xx from headers alone and raises the first that is broken.
        """
        path = Path(path)
        if not path.is_dir():
            return cls.from_files([path])
        checkpoint = cls()
        try:
            settings = None
            if config:
                settings = _read_config(path)
            files, weight_map = find_shards(path)
            checkpoint._add_files(files)
            checkpoint._check_modules()
            if weight_map is not None:
                checkpoint._check_index(path, weight_map)
            if settings is not None:
                checkpoint._check_config(settings)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    @classmethod
    def from_files(cls, files: Iterable[str | os.PathLike[str]]) -> Checkpoint:
        """The checkpoint made of these shards, without config.json and index."""
        checkpoint = cls()
        try:
            checkpoint._add_files([Path(file) for file in files])
            checkpoint._check_modules()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def close(self) -> None:
        """Closes every file."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and byte range of a tensor."""
        return self.headers[self.place[name]].tensors[name]

    def dtype_of(self, name: str) -> str:
        """The stored dtype, by its safetensors name."""
        return self.info(name).dtype

    def window(self, name: str) -> Window:
        """The tensor, to be read piece by piece."""
        path = self.place[name]
        header = self.headers[path]
        info = header.tensors[name]
        return Window(self._descriptors[path], header.data_start + info.begin, info, f"{path.name} {name}")

    def read(self, name: str) -> Array:
        """The whole tensor, read-only. BF16 comes as its raw uint16 and 8-bit floats as uint8: see `dtype_of`."""
        window = self.window(name)
        return window.flat(0, int(np.prod(window.shape, dtype=object))).reshape(window.shape)

    def tensors(self, module: str) -> dict[str, Array]:
        """Leaf name -> stored tensor of one module, without its bias. Not checked: see `matrix`."""
        return {leaf: self.read(f"{module}.{leaf}") for leaf in self.modules[module].tensors()}

    def matrix(self, module: str) -> SpqrMatrix:
        """One module's matrix, its payload checked (E2xx, E3xx) on the very bytes that are returned."""
        layout, tensors = self.modules[module], self.tensors(module)
        check_payload(layout, tensors, module)
        return SpqrMatrix.unpack(layout, tensors)

    def stored_bytes(self, module: str) -> int:
        """Bytes on disk of one module's tensors, without its bias."""
        return sum(self.info(f"{module}.{leaf}").nbytes for leaf in self.modules[module].tensors())

    def _add_files(self, files: list[Path]) -> None:
        if len(files) > MAX_SHARDS:
            raise SpqrError("E006", str(files[0].parent), f"{len(files)} shards, the limit is {MAX_SHARDS}")
        cache: Cache = {}
        owner: dict[str, Path] = {}
        hash_owner: dict[str, Path] = {}
        for path in files:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            header = self.headers[path] = read_header_of(descriptor, path)
            check_header_hash(header)
            metadata = parse(header.metadata, path.name, cache)
            self._listed[path] = metadata.modules
            self._merge(path, metadata, owner)
            for name, digest in metadata.sha256.items():
                if self.sha256.setdefault(name, digest) != digest:
                    raise SpqrError("E106", f"{path.name} {name}", f"its sha256 differs from that in {hash_owner[name].name}")
                hash_owner.setdefault(name, path)
            for name in header.tensors:
                if name in self.place:
                    raise SpqrError("E404", f"{path.name} {short(name)}", f"it stands in {self.place[name].name} too")
                self.place[name] = path
        for name, path in hash_owner.items():
            if name not in self.place:
                raise SpqrError("E104", f"{path.name} spqr_sha256", f"{short(name)} is no tensor of this checkpoint")

    def _merge(self, path: Path, metadata: ShardMetadata, owner: dict[str, Path]) -> None:
        if self.version and metadata.version != self.version:
            raise SpqrError("E106", path.name, f"version {metadata.version}, another shard has {self.version}")
        self.version = metadata.version
        for name, layout in metadata.modules.items():
            first = self.modules.setdefault(name, layout)
            if first is not layout and first != layout:
                raise SpqrError("E106", f"{path.name} {short(name)}", f"{layout}, but {owner[name].name} has {first}")
            owner.setdefault(name, path)

    def _check_modules(self) -> None:
        """Rules E107 .. E110, and the list of dense tensors."""
        taken: set[str] = set()
        for module, layout in self.modules.items():
            for leaf, spec in layout.tensors().items():
                name = f"{module}.{leaf}"
                if name not in self.place:
                    raise SpqrError(
                        "E107", short(name, 600), f"the tensor is missing, expected {spec.dtype} {list(spec.shape)}"
                    )
                self._check_tensor(name, (spec.dtype,), spec.shape)
                taken.add(name)
            if f"{module}.bias" in self.place:
                self._check_tensor(f"{module}.bias", BIAS_DTYPES, (layout.out_features,))
        self.dense = [name for name in self.place if name not in taken]
        for name in self.dense:
            module, _, leaf = name.rpartition(".")
            if module in self.modules and leaf != "bias":
                raise SpqrError("E108", f"{self.place[name].name} {short(name)}", f"the entry of {module} has no {short(leaf)}")
            if leaf in OWN_LEAVES:
                raise SpqrError("E108", f"{self.place[name].name} {short(name)}", "spqr_modules has no entry for its module")
        for module in self.modules:
            self._check_listed(module)

    def _check_listed(self, module: str) -> None:
        """A shard lists at least the modules whose tensors stand in it (rule E106)."""
        for leaf in self.modules[module].tensors():
            path = self.place[f"{module}.{leaf}"]
            if module not in self._listed[path]:
                raise SpqrError("E106", f"{path.name} {short(module)}", f"the shard holds its {leaf} but not its entry")

    def _check_tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        info, where = self.info(name), f"{self.place[name].name} {name}"
        if info.dtype not in dtypes:
            raise SpqrError("E109", where, f"dtype {info.dtype}, expected {' or '.join(dtypes)}")
        if info.shape != shape:
            raise SpqrError("E110", where, f"shape {list(info.shape)}, expected {list(shape)}")

    def _check_index(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if self.place.get(name) != folder / file:
                found = self.place[name].name if name in self.place else "no shard"
                raise SpqrError("E403", f"{INDEX} {short(name)}", f"the index says {file}, the tensor stands in {found}")
        for name, path in self.place.items():
            if name not in weight_map:
                raise SpqrError("E403", f"{path.name} {short(name)}", "the index does not list this tensor")

    def _check_config(self, config: dict[str, Any]) -> None:
        section, where = config["quantization_config"], f"{CONFIG} quantization_config"
        if section["format_version"] != self.version:
            raise SpqrError("E105", where, f"format_version {section['format_version']}, the shards have {self.version}")
        used = features_of(self.modules.values())
        if set(section["features"]) != set(used):
            raise SpqrError("E105", where, f"features {section['features']}, the shards use {used}")
        for name in section.get("modules_to_not_convert") or ():
            if name in self.modules:
                raise SpqrError("E105", where, f"modules_to_not_convert names {short(name)}, which is quantized")
        self.config = config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise SpqrError("E111", CONFIG, "the file is missing")
    config = _read_json(path, "E111")
    if "quantization_config" not in config:
        raise SpqrError("E111", CONFIG, "no quantization_config")
    check_config(config["quantization_config"], f"{CONFIG} quantization_config")
    return config


def find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of a folder in the order of their names, and the index's weight_map where there is an index."""
    index, single = folder / INDEX, folder / SINGLE
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise _nothing(folder)
        _check_inside(folder, SINGLE)
        if not single.is_file():
            raise SpqrError("E402", SINGLE, "not a file")
        return [single], None
    if os.path.lexists(single):
        raise SpqrError("E401", INDEX, f"{SINGLE} stands beside it: which one is the checkpoint?")
    content = _read_json(index, "E401")
    check_schema("index", content, INDEX, "E401")
    names = sorted(set(content["weight_map"].values()))
    if len(names) > MAX_SHARDS:
        raise SpqrError("E006", INDEX, f"{len(names)} shards, the limit is {MAX_SHARDS}")
    for name in names:
        _check_inside(folder, name)
        if not (folder / name).is_file():
            raise SpqrError("E402", INDEX, f"shard {short(name)} is missing")
    return [folder / name for name in names], content["weight_map"]


def _nothing(folder: Path) -> SpqrError:
    names = sorted(entry.name for entry in os.scandir(folder))
    if any(name.endswith(".safetensors") for name in names):
        return SpqrError("E401", INDEX, "the index is missing, and there is no model.safetensors")
    for name in names:
        if name.endswith(OTHER_SUFFIXES):
            return SpqrError("E007", short(name), "no safetensors file in this folder, and no other kind is read")
    return SpqrError("E402", SINGLE, "no shard in this folder")


def _check_inside(folder: Path, name: str) -> None:
    """Rule E405. A link may lead into the blobs of the Hub cache that holds the folder, and nowhere else outside."""
    where = SINGLE if name == SINGLE else INDEX
    if name in (".", "..") or any(sign in name for sign in "/\\\0:"):
        raise SpqrError("E405", where, f"{short(name)} is not the name of a file in this folder")
    if not name.endswith(".safetensors"):
        raise SpqrError("E401", where, f"{short(name)} does not end in .safetensors")
    home = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(folder / name))  # Path.resolve raises RuntimeError on a loop
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if target.parent not in roots:
        raise SpqrError("E405", where, f"{short(name)} is a link that leaves the folder")


def _read_json(path: Path, code: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise SpqrError("E006", path.name, f"the limit is {MAX_JSON_BYTES} bytes")
        raw = file.read(MAX_JSON_BYTES + 1)
    try:
        content = strict_json(raw)
    except ValueError as error:
        raise SpqrError(code, path.name, f"not JSON: {short(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise SpqrError(code, path.name, "not a JSON object")
    return content
