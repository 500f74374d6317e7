"""The hooks that transformers calls, in the order in which it calls them. One class serves 5.17 to 5.23."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import logging

from spqr_format.errors import SpqrError
from spqr_format.metadata import FORMAT_VERSION, QUANT_METHOD, ShardMetadata, features_of
from spqr_format.payload import check_payload
from spqr_format.reader import Checkpoint
from spqr_kernels.joined import TORCH_DTYPES

from .compiling import prefer_overlap
from .config import SpqrFormatConfig
from .experts import SplitExperts
from .linear import SpqrLinear
from .names import hub_names, is_expert_converter
from .onthefly import QuantizeWeight, plan
from .placement import check_agreement, check_missing, place
from .siblings import share

logger = logging.get_logger(__name__)

HASHED_MODULES = 2048  # beyond it, hashes in every shard's header would weigh more than they help


@register_quantizer(QUANT_METHOD)
class SpqrFormatQuantizer(HfQuantizer):
    """Loads models that are stored in SpQR format, and quantizes dense ones while they load."""

    requires_calibration = False
    quantization_config: SpqrFormatConfig

    def __init__(self, quantization_config: SpqrFormatConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.files: list[str] = []
        self.placed: dict[str, str] = {}  # model name -> checkpoint name
        self.placeholders: dict[str, torch.dtype] = {}
        self.dtype = torch.get_default_dtype()
        self.split = False  # whether experts are single modules
        self.experts: list[SplitExperts] = []  # these modules
        self.dropped_conversions: list[Any] = []
        self.failure: SpqrError | None = None  # of an on-the-fly quantization, raised when transformers lets us

    # Before the weights

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses, with SpqrError E505, what quantizing while loading cannot do. Called again with the final map."""
        if self.pre_quantized:
            return
        if self.quantization_config.dequantize:
            raise SpqrError("E505", "dequantize", "True, but this model is not quantized yet")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            what = "places modules on disk, from where they cannot be quantized; run `spqr convert` first"
            raise SpqrError("E505", "device_map", what)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's dtype. Where no config names one, transformers may have taken that of packed integers."""
        self.dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        return self.dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        refuse_sharding(model)
        self.files = list(checkpoint_files or [])
        if not self.pre_quantized:
            self.split = plan(model, self.quantization_config, self.files)
            return
        if not self.files:
            raise SpqrError("E508", "state_dict", "a quantized model is read from its files; pass their folder")
        with Checkpoint.from_files(self.files) as checkpoint:
            check_agreement(self.quantization_config, checkpoint)
            self.placed = place(model, checkpoint)
        self.placeholders = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.split = any(isinstance(module, SplitExperts) for module in model.modules())

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Drops the conversions that fuse experts where ours are not fused. 5.21 and later pass the model too."""
        updated: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        if not self.split:
            return updated
        self.dropped_conversions = [c for c in updated if is_expert_converter(c)]
        return [c for c in updated if not is_expert_converter(c)]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is a weight that quantizing while loading packs."""
        module, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(module)
        return not self.pre_quantized and leaf == "weight" and isinstance(layer, SpqrLinear) and layer.layout is None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element, for device maps. A placeholder counts as what it will be once it is packed."""
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        config = self.quantization_config
        statistics = (10 if config.statistics == "bilevel" else 24) / config.group_size
        return (config.weight_bits + statistics + 32 * config.outlier_share) / 8

    def get_quantize_ops(self) -> QuantizeWeight:
        """The operation that turns a dense weight into packed tensors."""
        return QuantizeWeight(self)

    # After the weights

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        layers = spqr_layers(model)
        if not self.pre_quantized:
            self._describe(model, layers)
        self._check_loaded(model, layers)
        self._cast_dense(model)
        for layer in layers.values():
            layer.requires_grad_(False)  # the loader turns it on for every float parameter, such as a bias
        if self.pre_quantized and self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
            return model
        for layer in layers.values():  # one after the other: never more than one of them is there twice
            layer.join(on_cpu=False)
        self.experts = [module for module in model.modules() if isinstance(module, SplitExperts)]
        for experts in self.experts:
            experts.join(on_cpu=False)
        share(model)
        prefer_overlap(model)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of the single tensors
        return model

    def _check_loaded(self, model: PreTrainedModel, layers: dict[str, SpqrLinear]) -> None:
        """Every tensor is what the checkpoint holds and keeps the rules E2xx and E3xx, before a kernel sees it.

        Raises SpqrError E107, E109, E110, E2xx, E3xx for packed tensors, E508 for dense parameters that were not read.
        """
        offloaded: dict[str, SpqrLinear] = {}
        for name, layer in layers.items():
            hub = self.placed.get(name, name)
            if layer.layout is None:
                raise SpqrError("E508", hub, "the checkpoint has no weight for it; it would be random")
            tensors = layer.tensors()
            if any(tensor.is_meta for tensor in tensors.values()):
                offloaded[hub] = layer
                continue
            for leaf, spec in layer.layout.tensors().items():
                tensor, where = tensors[leaf], f"{hub}.{leaf}"
                if hasattr(tensor, "placements"):
                    raise SpqrError("E508", where, "tensor parallel loading of SpQR models is not supported")
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise SpqrError("E107", where, "the tensor was not read; its values would be random")
                if tensor.dtype != TORCH_DTYPES[spec.dtype]:
                    raise SpqrError("E109", where, f"dtype {tensor.dtype}, expected {spec.dtype}")
                if tuple(tensor.shape) != spec.shape:
                    raise SpqrError("E110", where, f"shape {list(tensor.shape)}, expected {list(spec.shape)}")
            if self.pre_quantized:
                check_payload(layer.layout, {leaf: tensor.cpu().numpy() for leaf, tensor in tensors.items()}, hub)
            if layer.bias is not None and not layer.bias.is_meta and not torch.isfinite(layer.bias).all():
                raise SpqrError("E204", f"{hub}.bias", "a value is not finite")
        if offloaded and self.pre_quantized:  # accelerate reads them from these very files, at every forward
            with Checkpoint.from_files(self.files) as checkpoint:
                for hub in offloaded:
                    check_payload(checkpoint.modules[hub], checkpoint.tensors(hub), hub)
        read = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
        }
        check_missing(model, read, "no tensor was read for it")

    def _cast_dense(self, model: PreTrainedModel) -> None:
        """Every dense parameter has the dtype that its placeholder had, or that the model keeps it in.

        Before 5.21 transformers leaves the tensors of a quantized model that it renames in their stored dtype.
        """
        kept = model._get_dtype_plan(self.dtype)  # pattern -> dtype, for modules that a model keeps in fp32
        pattern, groups, _ = build_glob_alternation(list(kept)) if kept else (None, {}, {})
        for name, parameter in model.named_parameters():
            match = pattern.search(name) if pattern is not None else None
            dtype = kept[groups[str(match.lastgroup)]] if match else self.placeholders.get(name, parameter.dtype)
            if parameter.dtype != dtype and parameter.is_floating_point() and not parameter.is_meta:
                parameter.data = parameter.data.to(dtype)

    def _describe(self, model: PreTrainedModel, layers: dict[str, SpqrLinear]) -> None:
        """Makes the config say what was done while loading."""
        config = self.quantization_config
        config.features = features_of(layer.layout for layer in layers.values() if layer.layout is not None)
        dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        config.modules_to_not_convert = sorted(hub_names(model, dense).values())
        config.provenance = {
            "source": str(model.config.name_or_path),
            "method": "data-free, while loading",
            "outlier_share": config.outlier_share,
        } | (config.provenance or {})

    # Saving and dequantizing

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state dict to save, and the metadata of every shard (spec 7): all modules, under their stored names."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved, and it holds no module of ours
        layers = spqr_layers(model)
        hubs = hub_names(model, layers)
        layouts = {hubs[name]: layer.layout for name, layer in layers.items() if layer.layout is not None}
        hashes: dict[str, str] = {}
        offloaded = any(parameter.is_meta for layer in layers.values() for parameter in layer.parameters())
        if len(layers) <= HASHED_MODULES and not offloaded:
            for name, layer in layers.items():
                for leaf, tensor in layer.tensors().items():
                    data = np.ascontiguousarray(tensor.detach().cpu().numpy())
                    hashes[f"{hubs[name]}.{leaf}"] = hashlib.sha256(data.data).hexdigest()
        metadata = ShardMetadata.of(layouts, hashes)
        # The folder's config.json is written after this call, from this very object.
        self.quantization_config.features = metadata.features
        self.quantization_config.format_version = FORMAT_VERSION
        return _apart(model.state_dict(), layers), metadata.as_strings()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Dense layers in place of packed ones. transformers may pass a dtype by its name."""
        chosen: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
        for name, layer in spqr_layers(model).items():
            replace(model, name, layer.dequantize(chosen))
        for name, module in list(model.named_modules()):
            if isinstance(module, SplitExperts):
                replace(model, name, module.fuse())
        if self.dropped_conversions:  # from now on, saving has to split the experts again
            used: list[Any] = getattr(model, "_weight_conversions", None) or []
            model._weight_conversions = [*used, *self.dropped_conversions]  # type: ignore[assignment]
            self.dropped_conversions = []
        return model

    # What transformers asks about us. The first is called, the others are read: that is how its base class has them.

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: the gradient passes through to the input."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether forward neither waits for the device nor branches on values, for the few tokens of a step."""
        return not self.split or (bool(self.experts) and all(experts.pooled for experts in self.experts))


def refuse_sharding(model: PreTrainedModel) -> None:
    """Raises SpqrError E508 where the model is to be cut over devices: outliers must not be cut as a dense tensor is."""
    distributed = getattr(model.config, "distributed_config", None)
    for name in ("tp_size", "pp_size", "ep_size", "fsdp_size"):
        size = getattr(distributed, name, None) or 1
        if size > 1:
            raise SpqrError("E508", "distributed_config", f"{name} = {size}; SpQR models cannot be sharded here yet")


def _apart(state: dict[str, Tensor], layers: dict[str, SpqrLinear]) -> dict[str, Tensor]:
    """The same memory, but a storage of its own for each joined tensor: transformers clones all that share one, at once."""
    own = {f"{name}.{leaf}" for name, layer in layers.items() if layer.is_joined() for leaf in layer.leaves}
    return {name: torch.from_dlpack(tensor) if name in own else tensor for name, tensor in state.items()}


def spqr_layers(model: nn.Module) -> dict[str, SpqrLinear]:
    """The packed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpqrLinear)}


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in a module's place, under the hook by which accelerate dispatches it."""
    old = model.get_submodule(name)
    new.train(old.training)
    model.set_submodule(name, new)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
