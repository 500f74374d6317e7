"""SpQR models in Hugging Face transformers. Importing this package registers the format:

    import spqr_loaders
    model = AutoModelForCausalLM.from_pretrained("folder-in-spqr-format")

Without the import transformers refuses such a folder: the packed codes are called `weight` and have another shape.

A dense folder is quantized while it loads with `quantization_config=SpqrFormatConfig(weight_bits=3)`; a stored one loads
dense with `quantization_config=SpqrFormatConfig(dequantize=True)`. `model.dequantize()` and `model.save_pretrained()`
work, and so do PEFT's adapters; merging an adapter needs `dequantize()` first. What does not fit, or is missing, is a
SpqrError: no weight is ever left random.
"""

from .config import SpqrFormatConfig
from .decoding import RecordingError, graph_decoding
from .linear import SpqrLinear
from .load import from_pretrained
from .quantizer import SpqrFormatQuantizer

__all__ = ["RecordingError", "SpqrFormatConfig", "SpqrFormatQuantizer", "SpqrLinear", "from_pretrained", "graph_decoding"]
