"""Which kernels run on this machine with this model: what is installed, what they lack, and a trial on the device.

Limits of kernels (widths of heads, compute capabilities, shared memory) differ between versions and GPUs. Therefore,
no table of them is kept here: a kernel is called once with the model's widths, and its results are compared.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls, restore_flash_attention_impl
from transformers import PreTrainedConfig

from . import kernels
from .boundaries import Boundaries
from .documents import BIAS, DOCUMENTS, KERNELS, SINKS, SOFTCAP

DROPOUT = "attention dropout"
LACKS = {
    "varlen": {SOFTCAP, SINKS, BIAS, DROPOUT},
    "flash_attention_4": {SOFTCAP, SINKS, BIAS, DROPOUT},
    "flash_attention_3": {SOFTCAP, SINKS, BIAS, DROPOUT},
    "flash_attention_2": {SINKS, BIAS},
    "flex_attention": {BIAS, DROPOUT},
}
ACTIVATED = {"flash_attention_4": "FA4", "flash_attention_3": "FA3"}  # names in torch
PACKAGES = {
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4", "pip install flash-attn-4"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn 3", "from hopper/ of its repository"),
    "flash_attention_2": ("flash_attn", "flash-attn", "pip install flash-attn --no-build-isolation"),
    "flex_attention": ("triton", "triton", "pip install triton"),
}
NEEDED = ("scale", "window_size", "enable_gqa")  # parameters of varlen_attn that its first versions lack
LENGTHS, WINDOW = (3, 130, 61), 64  # of the trial
TOLERANCE = 2e-2  # of a norm; rounding to bfloat16 gives some 4e-3, another mask or scale at least 1e-1


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention.

    Attributes:
        groups: Query heads for each head of keys and values.
        widths: Features of a query and of a value; several if layers differ.
        asks: What attention does besides a softmax over scaled scores: soft caps, sinks, position biases or dropout.
    """

    groups: int
    widths: tuple[tuple[int, int], ...]
    asks: frozenset[str]


def heads_of(settings: PreTrainedConfig, asks: frozenset[str]) -> Heads:
    """Return the heads of a causal language model.

    Args:
        settings: Configuration of the model.
        asks: What a miniature of the model asked for.
    """
    values = settings.get_text_config().to_dict()
    heads = _largest(values, "num_attention_heads", "n_head", "n_heads") or 1
    groups = max(1, heads // (_largest(values, "num_key_value_heads") or heads))
    if "qk_rope_head_dim" in values and values.get("qk_nope_head_dim"):  # multi-head latent attention
        query = values["qk_rope_head_dim"] + values["qk_nope_head_dim"]
        widths = {(query, values.get("v_head_dim") or query)}
    else:
        hidden = _largest(values, "hidden_size", "n_embd", "d_model") or heads
        named = [values.get(name) for name in ("head_dim", "global_head_dim", "swa_head_dim")]
        found = [width for width in named if isinstance(width, int) and width] or [hidden // heads]
        widths = {(width, values.get("v_head_dim") or width) for width in found}
    rates = [rate for key, rate in values.items() if re.search(r"att.*drop", key) and isinstance(rate, float)]
    return Heads(groups, tuple(sorted(widths)), asks | ({DROPOUT} if any(rates) else set()))


def why_missing(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what this machine lacks for a kernel that computes all documents in one call; None if nothing."""
    if device.type != "cuda":
        return "needs a GPU"
    if kernel in PACKAGES:
        module, package, source = PACKAGES[kernel]
        if not _is_there(module):
            return f"needs the {package} package ({source})"
    if kernel in ACTIVATED and ACTIVATED[kernel] not in list_flash_attention_impls():
        return f"is not known to torch {torch.__version__}"
    if DOCUMENTS[kernel] == "documents_varlen":
        from torch.nn.attention.varlen import varlen_attn

        lacks = [name for name in NEEDED if name not in inspect.signature(varlen_attn).parameters]
        if lacks:
            return f"needs a later torch: varlen_attn of {torch.__version__} has no {', '.join(lacks)}"
    if dtype not in kernels.HALF and kernel != "flex_attention":
        return "needs model.dtype=bfloat16"
    return None


def why_not(kernel: str, heads: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a kernel cannot compute this model's attention on this machine; None if it can.

    A kernel that torch has to activate is active after this call if it can be used, and no other one is.
    """
    if missing := why_missing(kernel, device, dtype):
        return missing
    if lacks := sorted(LACKS[kernel] & heads.asks):
        return f"has no {' and no '.join(lacks)}"
    restore_flash_attention_impl(_raise_warn=False)
    try:
        if kernel in ACTIVATED:
            activate_flash_attention_impl(ACTIVATED[kernel])
        wrong = _try(KERNELS[DOCUMENTS[kernel]], heads, device, dtype)
    except Exception as error:  # a kernel can fail in any way on a GPU that it was not built for
        wrong = f"failed on this GPU ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    if wrong and kernel in ACTIVATED:
        restore_flash_attention_impl(_raise_warn=False)
    return wrong


def _try(kernel: kernels.Kernel, heads: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare outputs and gradients of a kernel with the plain formula; return what differs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    boundaries, tokens = Boundaries(LENGTHS, device), sum(LENGTHS)
    for query, value in heads.widths:
        given = [draw(tokens, heads.groups, query), draw(tokens, 1, query), draw(tokens, 1, value)]
        along = draw(tokens, heads.groups, value)
        form = kernels.Form(
            softcap=2.0 if SOFTCAP in heads.asks else None,
            sinks=draw(heads.groups).float() if SINKS in heads.asks else None,
        )
        for window in (None, WINDOW):
            one = kernels.Form(form.scale, window, form.softcap, form.sinks)
            found, expected = (_with_gradients(f, given, along, boundaries, one) for f in (kernel, kernels.reference))
            for name, a, b in zip(("outputs", "gradients", "gradients", "gradients"), found, expected, strict=True):
                if not float((a.float() - b.float()).norm()) <= TOLERANCE * float(b.float().norm()):  # also NaN
                    return f"computes wrong {name} on this GPU"
    return None


def _with_gradients(
    kernel: kernels.Kernel, given: list[Tensor], along: Tensor, boundaries: Boundaries, form: kernels.Form
) -> list[Tensor]:
    with torch.enable_grad():
        inputs = [tensor.detach().clone().requires_grad_() for tensor in given]
        output = kernel(inputs[0], inputs[1], inputs[2], boundaries, form)
        return [output.detach(), *torch.autograd.grad(output, inputs, along)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would contain it
        return False


def _largest(values: dict[str, object], *names: str) -> int:
    """Return the largest of these integers, which may be given for each layer; 0 if there is none."""
    found = [values.get(name) for name in names]
    flat = [n for value in found for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
    return max(flat, default=0)
