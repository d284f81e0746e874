"""A base model read into four bits: each weight is quantized as it is read from the file.

transformers reads a checkpoint tensor by tensor and asks a "quantizer" about each one; this file
has ours. So the peak memory is the quantized model plus one weight, and shards, renamed keys and
tied weights work as usual.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from minilora import LoRAConfig
from minilora.conventions import completed
from minilora.nf4.linear import NF4Linear
from minilora.nf4.model import select_linears
from minilora.targets import select

METHOD = "minilora_nf4"


@register_quantization_config(METHOD)
class FourBits(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=...)` takes.

    Args:
        apart: an adapter's configuration whose targets stay as they are, since LoftQ quantizes
            them itself.
    """

    def __init__(self, apart: LoRAConfig | None = None) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.apart = apart
        self.refused: list[str] = []
        """Why weights could not be quantized: infinity, NaN, or another shape."""


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """Chooses the linears before a value is read, and quantizes them one by one."""

    is_serializable = is_trainable = False  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        assert isinstance(config, FourBits)
        apart = set(select(model, completed(model, config.apart))) if config.apart else set()
        self.refused = config.refused
        self.weights = {f"{name}.weight" for name in select_linears(model) if name not in apart}

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return param_name in self.weights

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Remove the marks of a quantized model: it has NF4Linear layers, and that is all."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False


class _Quantize(ConversionOps):
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, Any]:
        """Replace the linear by an NF4Linear; transformers has nothing left to set."""
        model, name = kwargs["model"], kwargs["full_layer_name"]
        value = next(iter(input_dict.values()))
        weight: torch.Tensor = value[0] if isinstance(value, list) else value
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        if weight.shape != linear.weight.shape:  # transformers 5.15 and 5.17 do not report it
            sizes = f"{tuple(weight.shape)} in the weights, but {tuple(linear.weight.shape)}"
            self.quantizer.refused.append(f"{name} is {sizes} in config.json")
            self.quantizer.weights.discard(name)
            return input_dict
        try:
            quantized = NF4Linear(linear, weight=weight)
        except ValueError as error:
            self.quantizer.refused.append(f"{path}: {error}")
            return input_dict
        quantized._is_hf_initialized = True  # type: ignore[assignment]
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized)
        kwargs["missing_keys"].discard(name)
        return {}
