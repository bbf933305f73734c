"""Which part of a mixture of experts learns: the routers' policy, and experts that one rank's tokens do not reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...config.method import MethodConfig
from ...config.moe import MoeConfig
from ...errors import Problem, RequestError
from ...process import comm
from ..anatomy import find_buffers, find_mixtures, unwrap

Policy = Literal["frozen", "train", "adapt"]


def check_keys(config: MoeConfig, set_keys: Iterable[str], model: nn.Module) -> None:
    """Refuse `moe.*` keys that were set for a model without experts: nothing would read them.

    Raises:
        RequestError: naming each.
    """
    if find_mixtures(model):
        return
    given = {f"moe.{key}": value for key, value in config if value is not None}
    changed = {f"moe.{key}" for key, field in MoeConfig.model_fields.items() if getattr(config, key) != field.default}
    wanted = sorted(changed | (given.keys() & set(set_keys)))
    rule = "nothing reads it: the model has no mixture of experts"
    if wanted:
        raise RequestError(*(Problem(key, rule, "remove it, or name another model") for key in wanted))


def resolve_policy(config: MoeConfig, method: MethodConfig) -> Policy:
    """What `moe.router` becomes: what the method makes of any weight of the model, frozen beside adapters."""
    return config.router or ("train" if method.whole else "frozen")


def resolve_aux_loss_coef(config: MoeConfig, method: MethodConfig, model: nn.Module) -> float:
    """What `moe.aux_loss_coef` becomes: the model's own where routers learn, else 0."""
    if config.aux_loss_coef is not None:
        return config.aux_loss_coef
    if resolve_policy(config, method) == "frozen":
        return 0.0
    own = getattr(getattr(model, "config", None), "router_aux_loss_coef", None)
    return float(own or 0.0)


def route_method(method: MethodConfig, config: MoeConfig, model: nn.Module) -> MethodConfig:
    """The method's configuration with the routers in it as the policy says; as it is for a dense model.

    Raises:
        RequestError: the method cannot do that to a router.
    """
    mixtures, policy = find_mixtures(model), resolve_policy(config, method)
    if not mixtures or policy == "frozen" or (method.whole and policy == "train"):
        return method
    field = "modules_to_save" if policy == "train" else "target_parameters"
    if field not in type(method).model_fields:
        rule = f"{policy} is not possible with method={method.name}"
        raise RequestError.of("moe.router", rule, "set moe.router=frozen, or method=lora")
    if policy == "train":
        if held := [m.router_name for m in mixtures if list(unwrap(m.router).buffers())]:
            rule = f"{held[0]} has buffers beside its weights, which peft does not save with an adapter"
            raise RequestError.of("moe.router", rule, "set moe.router=adapt, or method=full")
        names = [mixture.router_name for mixture in mixtures]
    else:
        names = [f"{mixture.router_name}.weight" for mixture in mixtures]
    return method.model_copy(update={field: [*getattr(method, field), *names]})


def apply_policy(config: MoeConfig, method: MethodConfig, model: nn.Module) -> None:
    """After the method: no router learns that should not, and every expert that learns has a gradient.

    Raises:
        RequestError: an adapter method's targets name a router that is to stay frozen.
    """
    if resolve_policy(config, method) == "frozen":
        for mixture in find_mixtures(model):
            if method.name != "full" and any(p.requires_grad for p in mixture.router.parameters()):
                rule = f"is frozen, and the method's targets name {mixture.router_name}"
                raise RequestError.of("moe.router", rule, "set moe.router=adapt or train, or leave it out there")
            mixture.router.requires_grad_(False)
    keep_in_graph(model)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers that rank 0 has read: engines send parameters, and some send nothing else.

    Without it the routers of DeepSeek-V3 would choose by their correction bias on rank 0 and without it elsewhere.
    """
    buffers = find_buffers(model)
    if comm.from_main(bool(buffers)):
        for name, tensor in comm.from_main({name: buffer.cpu() for name, buffer in buffers.items()}).items():
            buffers[name].copy_(tensor)


def keep_in_graph(model: nn.Module) -> None:
    """Give experts that no token of a rank chose a zero gradient instead of none.

    Experts that are modules of their own are called only where a token chose them. DDP would wait for their gradients
    for ever, FSDP2 would reduce other sizes than its neighbours, and AdamW would skip them on one rank only.
    """
    for mixture in find_mixtures(model):
        if not mixture.fused:
            mixture.module.register_forward_hook(_touch)


def _touch(module: nn.Module, inputs: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    trained = [p for p in module.parameters() if p.requires_grad]
    if isinstance(output, tuple):
        return (_add_nothing(output[0], trained), *output[1:])
    return _add_nothing(output, trained)


def _add_nothing(output: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    for parameter in parameters:
        output = output + 0.0 * parameter.flatten()[0].to(output.dtype)
    return output
