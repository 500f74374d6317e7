"""Legacy pytorch_model.bin, one file or sharded, zip or older: read with weights_only, and only where no safetensors lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short, strict_json

from .base import Entry, Source, read_config
from .pickled import PickledFiles
from .stored import INDEX, SINGLE, dense_config, quantization, weight_files

BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class TorchBinSource(Source):
    """Dense weights in torch.save files. Zip files are mapped; of the older kind one file at a time is held in memory."""

    name = "dense pytorch_model.bin"
    quantized = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = dense_config(read_config(self.folder))
        self.files = weight_files(self.folder, BIN_INDEX, BIN_SINGLE)
        if not self.files:
            raise SpqrError("E501", str(folder), f"no {BIN_SINGLE} and no {BIN_INDEX}")
        self._pickled = PickledFiles(self.folder, self.files)
        self.entries: dict[str, Entry] = dict(self._pickled.tensors)
        index = self.folder / BIN_INDEX
        if index.is_file():
            for name, file in strict_json(index.read_bytes())["weight_map"].items():
                if name not in self.entries or self.entries[name].file != file:
                    raise SpqrError("E501", BIN_INDEX, f"{short(name)} is not in {short(file)}")

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        if weight_files(folder, INDEX, SINGLE) or quantization(config):
            return False
        return (folder / BIN_INDEX).is_file() or (folder / BIN_SINGLE).is_file()

    def load(self, name: str) -> torch.Tensor:
        return self._pickled.read(name)
