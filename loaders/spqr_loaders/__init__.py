"""SpQR models in Hugging Face transformers. Importing this package registers the format:

    import spqr_loaders
    model = AutoModelForCausalLM.from_pretrained("folder-in-spqr-format")

Without the import transformers refuses such a folder: the packed codes are called `weight` and have another shape.
"""

from .config import SpqrFormatConfig
from .linear import SpqrLinear
from .load import from_pretrained
from .quantizer import SpqrFormatQuantizer

__all__ = ["SpqrFormatConfig", "SpqrFormatQuantizer", "SpqrLinear", "from_pretrained"]
