"""Folders whose weights are quantized in the files: read as weights of the compute dtype, on every machine alike.

transformers keeps such weights quantized where a GPU is found and the kernels of their format are for inference, so
rank 0 would hold other modules than ranks that build them from the configuration, and adapters would be put on layers
that cannot be trained. Here they are dequantized while they are read. A run that wants a small base quantizes it again
(`method=qlora`), in a format that every engine moves.
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
    """Have `from_pretrained` dequantize what it reads for a model of this configuration.

    Args:
        settings: Read from the folder; changed in place.

    Returns:
        Further arguments of `from_pretrained`; none for a folder with plain weights.

    Raises:
        RequestError: Weights of this format cannot be dequantized.
    """
    holder = _holder_of(settings)
    if holder is None:
        return {}
    stored = dict(holder.quantization_config)
    if problem := stored_problem(stored):
        raise RequestError(problem)
    stored["dequantize"] = True  # bitsandbytes does not know the key, see `settle_dequantized`
    if stored.get("quant_method") in FP8:
        stored["quant_method"] = EXACT_FP8
    forget_stored(settings)
    settings.quantization_config = stored
    return {"device_map": {"": "cpu"}}  # bitsandbytes would take the first GPU


def settle_dequantized(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Make sure that a model read with `read_dequantized` is as one read from plain weights, also when it is saved.

    Args:
        model: As it was read.
        dtypes: Those that the entries of its state dict are to have.

    Raises:
        RequestError: Some weights are still quantized.
    """
    if getattr(model, "quantization_method", None) == BITSANDBYTES:
        model.dequantize(torch.float32)
    forget_stored(model.config)
    model._weight_conversions = None  # else saving would quantize again
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_float = tensor.is_floating_point()
        if name not in dtypes or is_float != dtypes[name].is_floating_point or (is_float and tensor.element_size() < 2):
            rule = f"{name} is still stored as {tensor.dtype} after it was read: its scales were not found"
            raise RequestError.of("model.name_or_path", rule, "use the 16-bit model that it was made from")
        # transformers leaves what is not quantized in such a folder in the dtype of the file.
        tensor.data = tensor.data.to(dtypes[name])


def forget_stored(settings: PreTrainedConfig) -> None:
    """Remove the quantization of the files from a configuration, for a model that is built without them."""
    while (holder := _holder_of(settings)) is not None:
        del holder.quantization_config


def _holder_of(settings: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration that says how the files are quantized: the model's, or that of its language model."""
    for holder in (settings, settings.get_text_config(decoder=True)):
        if getattr(holder, "quantization_config", None) is not None:
            return holder
    return None


class ExactBlocks(Fp8Dequantize):
    """transformers' operation, also where a weight's last blocks are cut off.

    Fp8Dequantize divides a weight by its number of scales: 192 rows under two scales become two blocks of 96 rows,
    where the file has one of 128 and one of 64, and 576 rows under five are an error (DeepSeek-V3's kv_a_proj).
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight `[..., rows, columns]` of its codes and the scales `[..., blocks, blocks]`."""
        size = self.hf_quantizer.quantization_config.weight_block_size
        whole = quantized.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)  # and not two codes in a byte
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
    """transformers' settings of FP8, for `ExactFp8Quantizer`."""


@register_quantizer(EXACT_FP8)
class ExactFp8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' FP8, dequantized by `ExactBlocks`."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation on weights that are read."""
        return {"dequantize": ExactBlocks}
