"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00052).

A narrow two-layer network with a skip connection follows a sublayer's last linear layer, before the sublayer's output
is added to the residual stream. Houlsby adds one after attention and one after the MLP of every block, Pfeiffer one
after the MLP. The model's own modules keep their names and weights: an adapter is a child of the linear layer whose
output it changes.

Load a saved adapter with:

    from dist_ft.method.adapter import load_adapter
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    model = load_adapter(base, FOLDER)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ..config.method import AdapterConfig
from ..errors import RequestError
from ..model.anatomy import find_anatomy
from ..model.sublayers import find_sublayer_ends
from ..state import Anatomy, Weights
from .full import train_head

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KIND = "bottleneck"
STANDARD_DEVIATION = 1e-2  # of the down-projection (Houlsby et al., section 3.6)
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """Compute `h + up(f(down(h)))`; the identity at initialization, because `up` is zero.

    Args:
        width: Size of the last dimension of h.
        inner: Size of the bottleneck.
        non_linearity: Name of f.
    """

    def __init__(self, width: int, inner: int, non_linearity: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        self.non_linearity = NON_LINEARITIES[non_linearity]
        nn.init.normal_(self.down.weight, std=STANDARD_DEVIATION)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute in the bottleneck's dtype and return the result, `[..., width]`, in that of `hidden`."""
        given = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(self.down.weight.dtype)
        return hidden + self.up(self.non_linearity(self.down(given))).to(hidden.dtype)


class Adapter:
    """The method `adapter`: the model is frozen and bottlenecks are trained."""

    config: AdapterConfig

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and insert trainable bottlenecks.

        Raises:
            RequestError: A sublayer of a block does not end in a linear layer, such as a mixture of experts.
        """
        model = anatomy.model.requires_grad_(False)
        insert(anatomy, self.config)
        train_head(anatomy)
        return model

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json for `load_adapter`."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        save_file(state, out / WEIGHTS, metadata={"format": "pt"})
        settings = {"adapter_type": KIND, **self.config.model_dump(exclude={"name"})}
        (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_bottleneck(folder: Path) -> bool:
    """Return whether the folder holds an adapter of this module, and not one of peft."""
    settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return settings.get("adapter_type") == KIND


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Insert a saved adapter into its base model in place, frozen.

    Args:
        base: A transformers model with the architecture that the adapter was trained on.
        folder: The export.

    Raises:
        RequestError: The folder holds another kind of adapter, or one of another model.
    """
    folder = Path(folder)
    if not is_bottleneck(folder):
        raise RequestError.of(
            str(folder), "does not hold a bottleneck adapter", "load it with peft.PeftModel.from_pretrained"
        )
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = {key: settings[key] for key in AdapterConfig.model_fields if key in settings}
    insert(find_anatomy(base), AdapterConfig(name="adapter", **known))
    given = load_file(folder / WEIGHTS)
    wanted = {name: p for name, p in base.named_parameters() if ".adapter." in name or name in given}
    shapes = {name: tuple(p.shape) for name, p in wanted.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
        different = sorted(n for n in {*shapes, *given} if n not in given or shapes.get(n) != tuple(given[n].shape))
        rule = f"has other tensors than this model needs: {', '.join(different[:3])} ({len(different)} in total)"
        raise RequestError.of(str(folder), rule, "use the base model that adapter_config.json names")
    for name, parameter in wanted.items():
        parameter.data.copy_(given[name])
        parameter.requires_grad_(False)
    return base


def insert(anatomy: Anatomy, config: AdapterConfig) -> None:
    """Insert a float32 bottleneck into every sublayer that the configuration selects, on the sublayer's device.

    Raises:
        RequestError: A sublayer does not end in a linear layer.
    """
    ends = find_sublayer_ends(anatomy)
    if not ends:
        rule = f"{type(anatomy.model).__name__} has no blocks whose attention and MLP both end in a linear layer"
        raise RequestError.of("method", rule, "set method=lora; mixtures of experts do not support bottleneck adapters")
    for end in ends:
        if config.configuration == "pfeiffer" and end.is_attention:
            continue
        inner = max(1, round(end.width / config.reduction_factor))
        layer = end.layer
        layer.adapter = Bottleneck(end.width, inner, config.non_linearity).to(layer.weight.device)
        layer.register_forward_hook(_pass_through)


def _pass_through(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    adapted: Tensor = layer.adapter(output)  # type: ignore[operator]
    return adapted
