"""Several converted models beside each other: bits on disk and distance to the original, as rows and as a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqr_format.metadata import QUANT_METHOD
from spqr_format.reader import Checkpoint

from .evaluation import Evaluation


@dataclass(frozen=True)
class Compared:
    """bits: stored bits a quantized weight, counted from the bytes on disk; None for a folder that is not in SpQR format."""

    name: str
    bits: float | None
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """For `spqr eval --compare --json`."""
        return {"name": self.name, "bits": self.bits, **self.evaluation.as_dict()}


def stored_bits(folder: str | Path) -> float | None:
    """Stored bits a quantized weight of a checkpoint, outliers and statistics included; None where it is no SpQR one."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") != QUANT_METHOD:
        return None
    with Checkpoint.open(folder) as checkpoint:
        weights = sum(layout.out_features * layout.in_features for layout in checkpoint.modules.values())
        stored = sum(checkpoint.stored_bytes(name) for name in checkpoint.modules)
    return 8 * stored / weights if weights else None


def plot(rows: list[Compared], path: str | Path) -> None:
    """KL over bits as SVG, with standard errors; models whose bits are unknown are left out. The same rows give the same
    bytes. ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    points = [(row.name, row.bits, row.evaluation.kl) for row in rows if row.bits is not None and row.evaluation.kl]
    with matplotlib.rc_context({"svg.hashsalt": "spqr", "svg.fonttype": "none"}):  # ids and text that do not change
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, bits, kl in points:
            axes.errorbar(bits, kl.mean, kl.error, fmt="o", capsize=2)
            axes.annotate(name, (bits, kl.mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel("stored bits a weight")
        axes.set_ylabel("KL to the original, nats a token")
        axes.margins(0.2)
        axes.grid(which="both", linewidth=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
