"""The model card of a converted checkpoint: what it is made of and how far it is from its source."""

from __future__ import annotations

from .report import Report

_MODES = {
    "quantized": "quantized from the dense weights of the source",
    "requantized": "the source's dequantized weights, quantized anew (the source's own error is unknown and comes on top)",
    "lossless": "the source's codes, carried over bit for bit",
}

_CARD = """---
library_name: transformers
tags:
- spqr
- quantized
---

# {source} in SpQR format

{facts}

Perplexity was not measured by the conversion: `spqr eval` does it. Every module's figures: `spqr_report.json`.

```python
import spqr_loaders  # pip install 'spqr-format[transformers]'
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def model_card(report: Report) -> bytes:
    """README.md with the metadata that the Hugging Face Hub reads, as UTF-8. Nothing in it depends on time or place."""
    totals, made = report.totals(), report.provenance
    calibration = made.get("calibration")
    text = "none: the weights alone" if not calibration else f"{calibration['tokens']} tokens of {calibration['text']}"
    bits, share = totals["bits_per_quantised_weight"], 100 * totals["outlier_share"]
    dense = f"{totals['dense_parameters']:,} parameters stay dense"
    facts = [
        f"Source: {made['source']} ({report.source}); sha256 of its files in `config.json`",
        f"Mode: {report.mode}, {_MODES[report.mode]}",
        f"Bits: {bits:.3f} a quantized weight, {share:.2f} % outliers, counted from the stored bytes; {dense}",
        f"Calibration: {text}",
    ]
    for tuned in made.get("tuning", ()):
        facts.append(
            f"Tuned: {len(tuned['epochs'])} epochs of {tuned['calibration']['tokens']} tokens; KL to the original on windows "
            f"held out {tuned['kl_before']:.5f} before, {tuned['kl_after']:.5f} after"
        )
    worst = max(report.modules, key=lambda module: module.weight_error, default=None)
    if worst is not None:
        facts.append(f"Largest error of a module's weights, relative norm: {worst.weight_error:.4f} ({worst.name})")
    facts += [f"Note: {note}" for note in report.notes]
    listed = "\n".join(f"- {fact}" for fact in facts)
    return _CARD.format(source=made["source"], facts=listed).encode()
