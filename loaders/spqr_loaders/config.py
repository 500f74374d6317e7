"""What config.json says of a quantized model, and what a caller asks for when it loads or quantizes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers.quantizers.auto as auto
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from spqr_format.metadata import FORMAT_VERSION, QUANT_METHOD, check_config

RUNTIME = ("dequantize", "outlier_share")  # asked for by a caller, never stored


@register_quantization_config(QUANT_METHOD)
class SpqrFormatConfig(QuantizationConfigMixin):
    """The quantization_config of a model in SpQR format: the stored section (spec 9) and two requests of the caller.

    Stored: format_version, features, weight_bits, group_size, statistics, modules_to_not_convert, provenance, x_ keys.
    Geometry is not here: it stands, module by module, in the shards.
    Requests, never stored: dequantize (the loaded model is dense) and outlier_share (the fraction of the weights that
    quantizing while loading keeps as outliers).
    modules_to_not_convert: module names, or their last or first parts. None leaves the output embedding, whatever is
    tied, and the modules that the model wants in fp32 dense. It decides only what to quantize while loading; a stored
    model is read as its shards say.
    Raises SpqrError E102, E103 for an unknown version or feature and E111 for a section that breaks the schema.
    """

    def __init__(
        self,
        weight_bits: int = 3,
        group_size: int = 16,
        statistics: str = "bilevel",
        outlier_share: float = 0.0,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool = False,
        format_version: str = FORMAT_VERSION,
        features: list[str] | None = None,
        provenance: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **extra: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # a str, as transformers allows
        self.format_version = format_version
        self.features = [] if features is None else features
        self.weight_bits = weight_bits
        self.group_size = group_size
        self.statistics = statistics
        self.modules_to_not_convert = modules_to_not_convert
        self.provenance = provenance
        self.extra = extra
        self.outlier_share = outlier_share
        self.dequantize = dequantize
        check_config(self.to_dict(), "quantization_config")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a stored section. A required key that is absent is E111 here; `__init__` has defaults."""
        stored = {key: value for key, value in config_dict.items() if key not in RUNTIME}
        check_config(stored, "config.json quantization_config")
        return super().from_dict(dict(config_dict), return_unused_kwargs, **kwargs)

    def get(self, key: str, default: Any = None) -> Any:
        """A field, as from a dict: transformers asks so when a loaded model's config is passed to from_pretrained."""
        return getattr(self, key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller's config overrides in a stored one."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """The section as config.json stores it."""
        section = {key: value for key, value in super().to_dict().items() if key not in (*RUNTIME, "extra")}
        section |= self.extra
        return {key: value for key, value in section.items() if value is not None}


# transformers overrides a stored config's attributes only for the classes of this tuple; it has no registration call.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SpqrFormatConfig,)  # type: ignore[assignment]
