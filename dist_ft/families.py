"""The families by name: the only place that knows every task, method and engine, each by a literal table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config.plan import START_FILE, Plan
from .config.run import RunConfig
from .errors import RequestError
from .method.adapter import Adapter
from .method.bitfit import Bitfit
from .method.freeze import Freeze
from .method.full import Full
from .method.ia3 import Ia3
from .method.ln_tuning import LnTuning
from .method.lora import Lora
from .method.p_tuning import PTuning
from .method.prefix import Prefix
from .method.prompt import Prompt
from .model.attention import AttentionChoice
from .model.load import attention_of, load_model
from .model.moe.policy import apply_policy, route_method
from .model.noise import add_embedding_noise
from .optim.adamw import build_adamw
from .privacy.mechanism import Privacy
from .process.place import Place
from .state import Architecture, Engine, Facts, Method, ModelFactory, OptimFactory, Task
from .task.table import TASKS

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "freeze": Freeze,
    "bitfit": Bitfit,
    "ln_tuning": LnTuning,
    "ia3": Ia3,
    "prompt": Prompt,
    "prefix": Prefix,
    "p_tuning": PTuning,
    "adapter": Adapter,
    "lora": Lora,
    "qlora": Lora,
}


def architecture_of(config: RunConfig, facts: Facts) -> Architecture:
    """What the task needs of a model."""
    found: Architecture = TASKS[config.task.name].architecture(config.task, facts)
    return replace(found, vocabulary=facts.resized_vocabulary, new_token_ids=facts.new_token_ids)


def build_task(config: RunConfig, facts: Facts, *, padding_free: bool) -> Task:
    """The task, laying out micro-batches for a model that takes documents without padding, or not.

    Raises:
        RequestError: packing was asked for with a model whose attention cannot keep documents apart.
    """
    kind = TASKS[config.task.name]
    seed = {"seed": config.train.seed} if getattr(kind, "uses_seed", False) else {}  # of what it draws at random
    task: Task = kind(config.task, facts, padding_free=padding_free, **seed)
    if task.layout.packs and not padding_free:
        rule = f"{config.model.name_or_path}'s attention cannot keep packed documents apart"
        raise RequestError.of("task.packing", rule, "set task.packing=false")
    return task


def build_method(config: RunConfig, run_dir: Path | None = None) -> Method:
    """The method of the configuration; `run_dir` is where it keeps what a run that goes on must know."""
    method = METHODS[config.method.name](config.method)
    if isinstance(method, Lora) and run_dir is not None:
        method.start_file = run_dir / START_FILE
    return method


def choose_attention(
    config: RunConfig, folder: str, device: torch.device, architecture: Architecture
) -> AttentionChoice:
    """How the model attends, and whether documents are laid out without padding.

    Not behind virtual tokens, nor where each row has a gradient of its own.
    """
    attention = attention_of(config.model, folder, device, architecture)
    return attention.padded() if config.method.virtual_tokens or config.privacy.is_on else attention


def build_engine(plan: Plan, place: Place, device: torch.device, privacy: Privacy | None = None) -> Engine:
    """The engine of the configuration, keeping `privacy` where it is given; DeepSpeed is imported only for its own."""
    config = plan.config
    options: dict[str, Any] = {
        "device": device,
        "place": place,
        "dtype": getattr(torch, config.model.dtype),
        "max_grad_norm": config.optim.max_grad_norm,
    }
    if privacy is not None and config.engine.name == "fsdp":
        from .privacy.fsdp import PrivateFsdp

        return PrivateFsdp(privacy, config.engine, **options)
    if privacy is not None:
        from .privacy.ddp import Private

        return Private(privacy, **options)
    if config.engine.name == "ddp":
        from .engine.ddp import Ddp

        return Ddp(**options)
    if config.engine.name == "fsdp":
        from .engine.fsdp import Fsdp

        return Fsdp(config.engine, **options)
    from .engine.deepspeed import Zero

    options |= {
        "micro_batch_size": config.train.per_device_train_batch_size,
        "accumulation_steps": plan.accumulation_steps,
    }
    return Zero(config.engine, **options)


def model_factory(
    config: RunConfig, folder: str, attention: AttentionChoice, architecture: Architecture, method: Method
) -> ModelFactory:
    """How every rank builds the same modules; see state.ModelFactory."""

    def build_model(weights: bool) -> nn.Module:
        torch.manual_seed(config.train.seed)  # a new head, and what a method adds, start alike in every run
        model = load_model(config.model, folder, attention, architecture, weights=weights)
        embeddings = model.get_input_embeddings()
        routed = route_method(config.method, config.moe, model)
        torch.manual_seed(config.train.seed)
        model = (method if routed is config.method else METHODS[routed.name](routed)).apply(model)
        if weights and isinstance(method, Lora):
            method.begin(model, getattr(torch, config.model.dtype))
        if architecture.new_token_ids and not config.method.whole:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]  # now around the base's, uncalled
        if config.train.neftune_noise_alpha:
            add_embedding_noise(model, embeddings, config.train.neftune_noise_alpha)
        apply_policy(config.moe, config.method, model)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:  # engines compute in model.dtype
                # Without weights the memory is not even touched.
                master = parameter.data.float() if weights else torch.empty_like(parameter.data, dtype=torch.float32)
                parameter.data = master
        return model

    return build_model


def optim_factory(config: RunConfig, device: torch.device) -> OptimFactory:
    """How an engine makes the optimizer over the parameters as it holds them."""

    def build_optim(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        fused = device.type in ("cpu", "cuda")
        return build_adamw(config.optim, parameters, config.method.lr_scale, fused=fused)

    return build_optim
