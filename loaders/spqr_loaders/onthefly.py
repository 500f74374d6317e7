"""Quantizing a dense model while it loads: without data, one weight at a time, on the device where it will stay."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging

from spqr_format.errors import SpqrError

from .config import SpqrFormatConfig
from .linear import SpqrLinear, torch_tensors
from .names import linears, matches
from .placement import split_experts

if TYPE_CHECKING:
    from .quantizer import SpqrFormatQuantizer

logger = logging.get_logger(__name__)


def plan(model: PreTrainedModel, config: SpqrFormatConfig, files: list[str]) -> bool:
    """Puts a waiting SpqrLinear in the place of each linear layer that is to be quantized.

    Returns whether experts were split. Raises SpqrError E505 where the quantizer is not installed and E504 where
    nothing is left to quantize.
    """
    converter()
    skip = config.modules_to_not_convert
    if skip is None:
        # Not transformers' get_modules_to_not_convert: its fp32 entries are patterns for parameters, not modules.
        skip = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    split = _stores_single_experts(files) and bool(split_experts(model))
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name]
    if fused:
        logger.warning("The checkpoint stores experts fused; they stay dense. Use `spqr convert` to quantize them.")
    chosen = [(name, dense) for name, dense in linears(model) if not any(matches(name, pattern) for pattern in skip)]
    if not chosen:
        raise SpqrError("E504", type(model).__name__, "no linear layer is left to quantize")
    for name, dense in chosen:
        model.set_submodule(name, SpqrLinear.awaiting(dense))
    return split


class QuantizeWeight(ConversionOps):
    """One dense weight [out, in] to the packed tensors of its module."""

    def __init__(self, quantizer: SpqrFormatQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]  # called with these keywords by every version
        self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """{"M.weight": dense} to {"M.<leaf>": packed}.

        A failure is kept for later: transformers would turn it into a RuntimeError that has lost the code.
        """
        ((name, value),) = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        module = name.removesuffix(".weight")
        if self.quantizer.failure is not None:
            return {}
        assert model is not None
        layer = model.get_submodule(module)
        assert isinstance(layer, SpqrLinear)
        try:
            if tuple(weight.shape) != (layer.out_features, layer.in_features):
                expected = [layer.out_features, layer.in_features]
                raise SpqrError("E508", name, f"shape {list(weight.shape)}, but the model has {expected}")
            options, quantize = converter()
            config = self.quantizer.quantization_config
            matrix = quantize(
                weight,
                options(
                    weight_bits=config.weight_bits,
                    group_size=config.group_size,
                    statistics=config.statistics,
                    outlier_share=config.outlier_share or None,
                ),
                name,
            )
        except SpqrError as error:
            self.quantizer.failure = error
            return {}
        # Exact placeholders, so that 5.23 finds the shapes that it compares with.
        layer.shape_as(matrix.layout, "meta")
        return {f"{module}.{leaf}": tensor.to(weight.device) for leaf, tensor in torch_tensors(matrix).items()}


def converter() -> tuple[Any, Any]:
    """SolverOptions and quantize of the data-free converter. Raises SpqrError E505 where it is not installed."""
    # Imported by name and late: loaders stand beside converters and must not depend on them to load a stored model.
    try:
        options = importlib.import_module("spqr_converters.options").SolverOptions
        return options, importlib.import_module("spqr_converters.datafree").quantize
    except ImportError as error:
        what = f"quantizing while loading needs spqr_converters, which cannot be imported ({error})"
        raise SpqrError("E505", "quantization_config", what) from error


def _stores_single_experts(files: list[str]) -> bool:
    """Whether the checkpoint stores each expert's weights under its own name."""
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as shard:
                names = shard.keys()
                if any(re.search(r"\.experts\.\d+\.", name) for name in names):
                    return True
    return False
