"""Which part of a mixture of experts learns: the routers' policy, and experts that one rank's tokens do not reach."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import comm
from ..errors import Problem, RequestError
from ..schema import MethodConfig, MoeConfig
from .structure import Mixture, find_buffers, find_mixtures, unwrap

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


@dataclass(frozen=True)
class RouterForm:
    """What a router's forward gives: found by calling a copy of it, so that nothing is taken for what it is not."""

    logits_at: int | None  # index of the raw logits in its outputs; None: they are its only output
    indices_at: int | None  # index of the chosen experts; None: the top_k of the logits
    top_k: int
    sigmoid: bool  # scores are sigmoids and not a softmax (DeepSeek-V3)


def find_form(mixture: Mixture, model: nn.Module) -> RouterForm:
    """Call a copy of the router on random tokens and see which output is `x @ weight.T + bias`.

    Several models return probabilities where logits are expected (transformers #45120), and a balance loss over them
    takes the softmax twice. Raw logits are recognised here by their values, never by their place.

    Raises:
        RequestError: none of the outputs are raw logits.
    """
    dice = torch.Generator().manual_seed(0)
    router = copy.deepcopy(unwrap(mixture.router)).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice, device="cpu"))
        for buffer in router.buffers():
            buffer.zero_()
        weight, bias = getattr(router, "weight"), getattr(router, "bias", None)  # noqa: B009  # typed as any module's
        x = torch.randn(5, weight.shape[1], generator=dice, device="cpu")
        expected = functional.linear(x, weight, bias)
        outputs = router(x)
    if isinstance(outputs, Tensor):
        logits_at, indices_at = (None if _is(outputs, expected) else -1), None
        outputs = (outputs,)
    else:
        logits_at = next((i for i, output in enumerate(outputs) if _is(output, expected)), -1)
        indices_at = next((i for i, output in enumerate(outputs) if output.dtype == torch.int64), None)
    if logits_at == -1:
        rule = f"{mixture.router_name} does not give the logits that it chooses experts by"
        raise RequestError.of("model.name_or_path", rule, "its routing cannot be seen; use a model of transformers")
    if indices_at is None:
        top_k = int(getattr(getattr(model, "config", None), "num_experts_per_tok", 0) or 1)
        return RouterForm(logits_at, None, top_k, False)
    chosen = outputs[indices_at]
    others = [o for i, o in enumerate(outputs) if i not in (logits_at, indices_at) and o.shape == chosen.shape]
    return RouterForm(logits_at, indices_at, chosen.shape[-1], bool(others) and _sigmoid(others[0], expected, chosen))


def _is(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and torch.allclose(output.float(), expected, rtol=1e-4, atol=1e-5)


def _sigmoid(weights: Tensor, logits: Tensor, chosen: Tensor) -> bool:
    """Whether the weights of the chosen experts stand to each other as sigmoids of their logits do."""
    scores = logits.sigmoid().gather(1, chosen)
    return torch.allclose(weights / weights.sum(-1, keepdim=True), scores / scores.sum(-1, keepdim=True), rtol=1e-3)
