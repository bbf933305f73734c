"""Folders whose weights are stored quantized: they are dequantized to the compute dtype on every machine.

On a machine with a GPU, transformers would keep such weights quantized. Rank 0 would then have different modules from
ranks that build them from the configuration, and adapters would be added to layers whose kernels only support
inference. Therefore, weights are dequantized while they are read. A run that needs a small base model quantizes it
again (`method=qlora`), in a format that all engines support.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import FineGrainedFP8Config, PreTrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ...errors import RequestError
from ...pretrained.folder import BITSANDBYTES, stored_problem

EXACT_FP8 = "dist_ft_fp8"  # the name by which transformers finds `ExactFp8Quantizer`
FP8 = ("fp8", "mxfp8")


def read_dequantized(settings: PreTrainedConfig) -> dict[str, Any]:
    """Configure `from_pretrained` to dequantize the weights of a model with this configuration.

    Args:
        settings: Configuration read from the folder; modified in place.

    Returns:
        Further arguments of `from_pretrained`; empty for a folder with unquantized weights.

    Raises:
        RequestError: Weights of this format cannot be dequantized.
    """
    holder = _holder_of(settings)
    if holder is None:
        return {}
    stored = dict(holder.quantization_config)
    if problem := stored_problem(stored):
        raise RequestError(problem)
    stored["dequantize"] = True  # bitsandbytes ignores this key, see `settle_dequantized`
    if stored.get("quant_method") in FP8:
        stored["quant_method"] = EXACT_FP8
    forget_stored(settings)
    settings.quantization_config = stored
    return {"device_map": {"": "cpu"}}  # otherwise, bitsandbytes would use the first GPU


def settle_dequantized(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Remove all traces of quantization from a model read with `read_dequantized`, so that it is saved as unquantized.

    Args:
        model: Model returned by `from_pretrained`.
        dtypes: Required dtype of each entry of its state dict.

    Raises:
        RequestError: Some weights are still quantized.
    """
    if getattr(model, "quantization_method", None) == BITSANDBYTES:
        model.dequantize(torch.float32)
    forget_stored(model.config)
    model._weight_conversions = None  # otherwise, saving would quantize again
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_float = tensor.is_floating_point()
        if name not in dtypes or is_float != dtypes[name].is_floating_point or (is_float and tensor.element_size() < 2):
            rule = f"{name} is still stored as {tensor.dtype} after it was read: its scales were not found"
            raise RequestError.of("model.name_or_path", rule, "use the 16-bit model that it was made from")
        # transformers loads unquantized tensors of such a folder in the dtype of the file.
        tensor.data = tensor.data.to(dtypes[name])


def forget_stored(settings: PreTrainedConfig) -> None:
    """Remove the quantization from a configuration, for a model that is built without reading the files."""
    while (holder := _holder_of(settings)) is not None:
        del holder.quantization_config


def _holder_of(settings: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the configuration with the quantization settings: that of the model or of its language model."""
    for holder in (settings, settings.get_text_config(decoder=True)):
        if getattr(holder, "quantization_config", None) is not None:
            return holder
    return None


class ExactBlocks(Fp8Dequantize):
    """FP8 dequantization as in transformers, but also correct if the last block of a weight is incomplete.

    Fp8Dequantize divides a weight evenly by its number of scales: 192 rows with two scales become two blocks of 96
    rows, although the file has blocks of 128 and 64, and 576 rows with five scales fail (DeepSeek-V3's kv_a_proj).
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        """Dequantize codes `[..., rows, columns]` with scales `[..., blocks, blocks]`."""
        size = self.hf_quantizer.quantization_config.weight_block_size
        whole = quantized.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)  # one code per byte, not two
        if size is None or scales.ndim < 2 or not whole:
            return super()._dequantize_one(quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        missing = [-rows % size[0], -columns % size[1]]
        blocks = ((rows + missing[0]) // size[0], (columns + missing[1]) // size[1])
        if not any(missing) or tuple(scales.shape[-2:]) != blocks:
            return super()._dequantize_one(quantized, scales, output_dtype)
        padded = functional.pad(quantized.view(torch.uint8), (0, missing[1], 0, missing[0])).view(quantized.dtype)
        weight: Tensor = super()._dequantize_one(padded, scales, output_dtype)
        return weight[..., :rows, :columns].contiguous()


@register_quantization_config(EXACT_FP8)
class ExactFp8Config(FineGrainedFP8Config):
    """FP8 settings of transformers, for `ExactFp8Quantizer`."""


@register_quantizer(EXACT_FP8)
class ExactFp8Quantizer(FineGrainedFP8HfQuantizer):
    """FP8 quantizer of transformers that dequantizes with `ExactBlocks`."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation that is applied to weights when they are read."""
        return {"dequantize": ExactBlocks}
