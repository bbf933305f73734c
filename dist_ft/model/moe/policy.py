"""Which parts of a mixture of experts are trained: the router policy, and zero gradients for experts without tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...config.method import MethodConfig
from ...config.moe import MoeConfig
from ...errors import Problem, RequestError
from ...state import Anatomy

Policy = Literal["frozen", "train", "adapt"]


def check_keys(config: MoeConfig, set_keys: Iterable[str], anatomy: Anatomy) -> None:
    """Check that the `moe.*` keys that are set have an effect: the model has experts, and its routing can be measured.

    Raises:
        RequestError: With a problem for each other key.
    """
    unmeasured = [mixture for mixture in anatomy.mixtures if mixture.form is None]
    if unmeasured:
        rule = f"the routing of {unmeasured[0].router} cannot be measured: {unmeasured[0].why_unmeasured}"
        keys = [key for key in ("aux_loss_coef", "aux_loss_per_layer", "z_loss_coef") if getattr(config, key)]
        if keys:
            raise RequestError(*(Problem(f"moe.{key}", rule, "remove it") for key in keys))
    if anatomy.mixtures:
        return
    given = {f"moe.{key}": value for key, value in config if value is not None}
    changed = {f"moe.{key}" for key, field in MoeConfig.model_fields.items() if getattr(config, key) != field.default}
    wanted = sorted(changed | (given.keys() & set(set_keys)))
    rule = "has no effect: the model has no mixture of experts"
    if wanted:
        raise RequestError(*(Problem(key, rule, "remove it, or use another model") for key in wanted))


def resolve_policy(config: MoeConfig, method: MethodConfig) -> Policy:
    """Return `moe.router`; by default, routers are trained if the method trains the whole model, and else frozen."""
    return config.router or ("train" if method.whole else "frozen")


def resolve_aux_loss_coef(config: MoeConfig, method: MethodConfig, anatomy: Anatomy) -> float:
    """Return `moe.aux_loss_coef`, or by default the model's own coefficient if all routers are trained and measured."""
    if config.aux_loss_coef is not None:
        return config.aux_loss_coef
    if resolve_policy(config, method) == "frozen" or any(mixture.form is None for mixture in anatomy.mixtures):
        return 0.0
    own = getattr(getattr(anatomy.model, "config", None), "router_aux_loss_coef", None)
    return float(own or 0.0)


def route_method(method: MethodConfig, config: MoeConfig, anatomy: Anatomy) -> MethodConfig:
    """Return the method's configuration with the routers added according to the policy; unchanged for a dense model.

    Raises:
        RequestError: The method cannot apply the policy to a router.
    """
    mixtures, policy = anatomy.mixtures, resolve_policy(config, method)
    if not mixtures or policy == "frozen" or (method.whole and policy == "train"):
        return method
    field = "modules_to_save" if policy == "train" else "target_parameters"
    if field not in type(method).model_fields:
        rule = f"{policy} is not supported with method={method.name}"
        raise RequestError.of("moe.router", rule, "set moe.router=frozen, or method=lora")
    if policy == "train":
        if held := [m.router for m in mixtures if list(anatomy.part(m.router).buffers())]:
            rule = f"{held[0]} has buffers, which peft does not save with an adapter"
            raise RequestError.of("moe.router", rule, "set moe.router=adapt, or method=full")
        names = [mixture.router for mixture in mixtures]
    else:
        names = [
            f"{mixture.router}.{name}"
            for mixture in mixtures
            for name, parameter in anatomy.part(mixture.router).named_parameters()
            if parameter.ndim == 2
        ]
    return method.model_copy(update={field: [*getattr(method, field), *names]})


def apply_policy(config: MoeConfig, method: MethodConfig, anatomy: Anatomy) -> None:
    """Freeze routers according to the policy, and give every trained expert a gradient; called after the method.

    Raises:
        RequestError: An adapter method targets a router that the policy freezes, or could target one that was not
            found.
    """
    if resolve_policy(config, method) == "frozen":
        if anatomy.lost_experts and getattr(method, "target_modules", None) == "all-linear":
            rule = f"all-linear could adapt routers: {anatomy.lost_experts} in the configuration, but none was found"
            raise RequestError.of("method.target_modules", rule, "name modules, such as [q_proj,v_proj]")
        for mixture in anatomy.mixtures:
            router = anatomy.part(mixture.router)
            if method.name != "full" and any(p.requires_grad for p in router.parameters()):
                rule = f"is frozen, but the method's targets include {mixture.router}"
                raise RequestError.of(
                    "moe.router", rule, "set moe.router=adapt or train, or remove it from the targets"
                )
            router.requires_grad_(False)
    keep_in_graph(anatomy)


def describe_unmeasured(anatomy: Anatomy) -> Iterator[str]:
    """Yield a line about routers that have no balance loss and no metrics, and about experts without a known router."""
    unmeasured = [mixture for mixture in anatomy.mixtures if mixture.form is None]
    if unmeasured:
        yield (
            f"no balance loss and no moe/* metrics of {len(unmeasured)} routers: {unmeasured[0].router} cannot be "
            f"measured, because {unmeasured[0].why_unmeasured}"
        )
    if anatomy.lost_experts:
        yield f"no router was found, although the configuration has {anatomy.lost_experts}: trained as a dense model"


def keep_in_graph(anatomy: Anatomy) -> None:
    """Give experts that no token of a rank has chosen a zero gradient instead of None.

    Experts that are separate modules are called only if a token has chosen them. Without a gradient, DDP would wait for
    it forever, FSDP2 would reduce tensors of different sizes on each rank, and AdamW would skip it on one rank only.
    """
    for mixture in anatomy.mixtures:
        if not mixture.fused:
            anatomy.part(mixture.name).register_forward_hook(_touch)


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
