"""Kernels on stored tensors: `linear` and `dequantize`, on any device torch knows, fast on NVIDIA GPUs."""

from .ops import dequantize, linear

__all__ = ["dequantize", "linear"]
