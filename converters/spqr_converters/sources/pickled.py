"""torch.save files, read without executing anything: a look at their pickle first, then torch with weights_only."""

from __future__ import annotations

import io
import os
import pickletools
import re
import threading
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short

from .base import Entry

_MAX_PICKLE = 8 << 20  # bytes of structure in one file, without the tensors' data
_MAX_OPERATIONS = 300_000  # 7 000 tensors of an older file; torch's own reader needs a microsecond for each
_MAX_RECORDS = 30_000  # tensors of a zip file: a dump of Llama-2-70B's widest layer has 10 755
_PER_RECORD, _BESIDE = 64, 20_000  # operations that a zip file may have for each record, and beside
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter|sparse_tensor)|torch (Size|device|\w+Storage)"
    r"|torch (float|bfloat|int|uint)\d+|torch (bool|Tensor)|torch\.nn\.parameter Parameter|torch\.storage \w+Storage"
    r"|torch\.serialization _get_layout|_codecs encode"
)
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, storage keys


def load_pickled(path: Path, name: str) -> Any:
    """What a torch.save file holds; the tensors of zip files are only mapped into memory. E501 naming `name`.

    Sizes that the file states are bounded by its own size before torch sees it. Tensors outside their data are refused.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if mapped:
                _scan_zip(file, size, name)
            else:
                _scan_legacy(file, size, name)
    except OSError as error:
        raise SpqrError("E501", name, f"cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file raises whatever torch's readers raise
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpqrError("E501", name, f"torch cannot read it: {short(what, 200)}") from None


def names_leaf(path: Path, leaf: str) -> bool:
    """True where the pickle of a torch.save file has a string with this ending. False, not an error, for any other file."""
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    found = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
                    if found.compress_type != zipfile.ZIP_STORED or found.file_size > _MAX_PICKLE:
                        return False
                    pickles: list[IO[bytes]] = [io.BytesIO(archive.read(found))]
            else:
                file.seek(0)
                pickles = [file] * _LEGACY_PICKLES
            for stream in pickles:
                for count, (_, argument, _) in enumerate(pickletools.genops(_Bounded(stream))):  # type: ignore[arg-type]
                    if count >= _MAX_OPERATIONS:
                        break
                    if isinstance(argument, str) and argument.endswith(leaf):
                        return True
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, StopIteration, zipfile.BadZipFile):
        pass
    return False


class PickledFiles:
    """State dicts of one or more files of a folder. Zip files stay mapped; of the others, one is in memory at a time."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.tensors: dict[str, Entry] = {}
        self._cached: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._lock = threading.Lock()
        for file in files:
            for name, tensor in self._open(file).items():
                if name in self.tensors:
                    raise SpqrError("E501", file, f"{name} stands in {self.tensors[name].file} too")
                size = tensor.numel() * tensor.element_size()
                self.tensors[name] = Entry(file, tensor.dtype, tuple(tensor.shape), 0, size)

    def _open(self, file: str) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._cached[0] != file:
                self._cached = ("", {})  # freed before the next one is read
                path = self.folder / file
                self._cached = (file, tensors_of(load_pickled(path, file), path.stat().st_size, file))
            return self._cached[1]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, in memory of its own. E501."""
        info = self.tensors.get(name)
        if info is None:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        tensor = self._open(info.file).get(name)
        if tensor is None or (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise SpqrError("E501", info.file, f"{name} changed while it was read")
        return tensor.clone(memory_format=torch.contiguous_format)


def tensors_of(value: Any, size: int, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dict (parameters as plain tensors). E501 where it is none. Other values are left out."""
    if isinstance(value, dict) and set(value) <= {"state_dict", "model", "epoch"} and len(value) > 0:
        value = value.get("state_dict", value.get("model"))
    if not isinstance(value, dict):
        raise SpqrError("E501", name, f"holds a {type(value).__name__}, expected a state dict")
    found = {}
    for key, tensor in value.items():
        if not isinstance(key, str):
            raise SpqrError("E501", name, f"the key {short(key)} is no name")
        if isinstance(tensor, torch.Tensor):
            found[key] = plain(tensor, size, f"{name} {key}")
    return found


def plain(value: Any, size: int, where: str) -> torch.Tensor:
    """A dense tensor that its file of `size` bytes can hold. E501."""
    if not isinstance(value, torch.Tensor):
        raise SpqrError("E501", where, f"a {type(value).__name__}, expected a tensor")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise SpqrError("E501", where, f"a {tensor.layout} tensor on {tensor.device}, expected a dense one")
    if tensor.numel() * tensor.element_size() > size:
        raise SpqrError("E501", where, f"shape {tuple(tensor.shape)} of {tensor.dtype} in a file of {size} bytes")
    return tensor


def _scan_zip(file: IO[bytes], size: int, name: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            total, found = 0, None
            if len(archive.infolist()) > _MAX_RECORDS:
                raise SpqrError("E501", name, f"{len(archive.infolist())} records, the limit is {_MAX_RECORDS}")
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise SpqrError("E501", name, f"{short(info.filename)} is compressed, which torch.save never does")
                total += info.file_size
                if info.filename.endswith("/data.pkl"):
                    found = info
            if total > size:
                raise SpqrError("E501", name, f"{total} bytes of contents in a file of {size}")
            if found is None:
                raise SpqrError("E501", name, "a zip archive that torch.save did not write: no data.pkl")
            if found.file_size > _MAX_PICKLE:
                raise SpqrError("E501", name, f"{found.file_size} bytes of structure, the limit is {_MAX_PICKLE}")
            most = _PER_RECORD * len(archive.infolist()) + _BESIDE
            _scan(io.BytesIO(archive.read(found)), size, name, most)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        if isinstance(error, SpqrError):
            raise
        raise SpqrError("E501", name, f"not a zip archive: {short(str(error))}") from None


def _scan_legacy(file: IO[bytes], size: int, name: str) -> None:
    if file.read(1) != b"\x80":
        raise SpqrError("E501", name, "not a file of torch.save")
    file.seek(0)
    for number in range(_LEGACY_PICKLES):
        _scan(file, size, name, _MAX_OPERATIONS, magic=number == 0)
    if file.tell() > _MAX_PICKLE:
        raise SpqrError("E501", name, f"{file.tell()} bytes of structure, the limit is {_MAX_PICKLE}")


def _scan(file: IO[bytes], size: int, name: str, most: int, magic: bool = False) -> None:
    """Look over one pickle without running it: only known globals, and no integer above the file's size."""
    start = file.tell()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(_Bounded(file))):  # type: ignore[arg-type]
            if count >= most or file.tell() - start > _MAX_PICKLE:
                raise SpqrError("E501", name, f"more than {most} operations of structure")
            if operation.name in ("GLOBAL", "INST") and not _ALLOWED.fullmatch(str(argument)):
                raise SpqrError(
                    "E501", name, f"asks for {short(argument)}, which no file of weights needs; nothing of it was run"
                )
            if (
                isinstance(argument, int)
                and not isinstance(argument, bool)
                and not magic
                and abs(argument) > max(size, 1 << 20)
            ):
                raise SpqrError("E501", name, f"states {short(argument)}, its own size is {size} bytes")
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, SpqrError):
            raise
        raise SpqrError("E501", name, f"its structure is damaged: {short(str(error))}") from None


class _Bounded:
    """A file that refuses long reads: genops trusts stated lengths."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if count > _MAX_PICKLE:
            raise ValueError(f"a string of {count} bytes")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)


def relative(path: Path, folder: Path) -> str:
    """The path as it is named in errors and fingerprints."""
    return os.path.relpath(path, folder)
