"""What stands in the writer's place on ranks that do not write."""

from __future__ import annotations

from typing import Any

from spqr_format.matrix import PackedMatrix, SpqrMatrix
from spqr_format.writer import Packed, pack


class Follower:
    """Takes a `CheckpointWriter`'s calls and keeps its `notes` alone: module or dense tensor -> what was noted with it."""

    def __init__(self, notes: dict[str, Any]) -> None:
        self.notes = notes

    def pack(self, module: str, matrix: SpqrMatrix | PackedMatrix) -> Packed:
        """As the writer packs, digests included."""
        return pack(module, matrix)

    def add(self, packed: Packed, note: Any = None) -> None:
        self.notes[packed.key] = note

    def add_dense(self, name: str) -> None:
        self.notes[name] = None
