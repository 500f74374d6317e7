"""The SpQR checkpoint format: layout, packing, reading, writing and checking, on numpy and safetensors alone."""

from .errors import CODES, SpqrError
from .layout import Layout
from .matrix import SpqrMatrix

__all__ = ["CODES", "Layout", "SpqrError", "SpqrMatrix"]
__version__ = "0.1.0"
