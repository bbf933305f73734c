"""Tables of methods and engines by name, and the recipe by which every rank builds the same model."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config.method import LoraKeys, MethodConfig
from .config.plan import START_FILE, Plan
from .config.run import RunConfig
from .errors import RequestError
from .model.attention.choice import AttentionChoice
from .model.head import OutputHead, attach_head
from .model.load import attention_of, load_model
from .model.moe.policy import apply_policy, route_method
from .model.noise import add_embedding_noise
from .optim.adamw import build_adamw
from .privacy.mechanism import Privacy
from .process.place import Worker
from .protocols import Begins, Engine, HasHead, Method, OptimFactory, Task
from .state import Anatomy, Architecture, Beat, BuiltModel, Facts, unwatched
from .task.table import TASKS

# Method → module in `method`, and class. Modules are imported when they are needed: peft takes seconds to import.
METHODS = {
    "full": ("full", "Full"),
    "freeze": ("freeze", "Freeze"),
    "bitfit": ("bitfit", "Bitfit"),
    "ln_tuning": ("ln_tuning", "LnTuning"),
    "ia3": ("ia3", "Ia3"),
    "prompt": ("prompt", "Prompt"),
    "prefix": ("prefix", "Prefix"),
    "p_tuning": ("p_tuning", "PTuning"),
    "adapter": ("adapter", "Adapter"),
    "lora": ("lora", "Lora"),
    "qlora": ("lora", "Lora"),
}


def architecture_of(config: RunConfig, facts: Facts) -> Architecture:
    """Return the model architecture that the task needs."""
    found: Architecture = TASKS[config.task.name].architecture(config.task, facts)
    return replace(found, vocabulary=facts.resized_vocabulary, new_token_ids=facts.new_token_ids)


def build_task(config: RunConfig, facts: Facts, attention: AttentionChoice) -> Task:
    """Build the task.

    Args:
        config: Configuration of the run.
        facts: Facts about its data.
        attention: Attention of its model.

    Raises:
        RequestError: The rows of a micro-batch, or packed documents, would change each other's loss.
    """
    kind = TASKS[config.task.name]
    seed = {"seed": config.train.seed} if getattr(kind, "uses_seed", False) else {}
    task: Task = kind(config.task, facts, padding_free=attention.padding_free, **seed)
    if task.layout.packs and not attention.padding_free:
        raise RequestError.of("task.packing", f"{attention.why_padded}", "set task.packing=false")
    if attention.padding_free or not attention.why_single:
        return task
    if task.layout.sequences > 1:
        rule = f"{attention.why_single}, and task={config.task.name} compares rows of one micro-batch"
        raise RequestError.of("model.name_or_path", rule, "choose another model")
    sizes = ("train.per_device_train_batch_size", "train.per_device_eval_batch_size")
    if max(config.train.per_device_train_batch_size, config.train.per_device_eval_batch_size) > 1:
        raise RequestError.of(sizes[0], attention.why_single, "set " + " ".join(f"{key}=1" for key in sizes))
    return task


def settle_head(config: RunConfig, task: Task, model: Any) -> str | None:
    """Let the head of the model compute the losses of the task in chunks, if `train.chunked_loss` asks for it.

    Args:
        config: Configuration of the run.
        task: Task, which is given the head.
        model: Model of transformers after its method was applied, inside the wrappers of methods.

    Returns:
        What was decided and why, in words; None for a task that does not predict tokens.

    Raises:
        RequestError: `train.chunked_loss=true` is not possible with this model.
    """
    if not isinstance(task, HasHead):
        return None
    if config.train.chunked_loss is False:
        return "loss from all logits at once (train.chunked_loss=false)"
    if config.privacy.is_on:
        return "loss from all logits at once: each row of a private run has a gradient of its own"
    found: tuple[OutputHead | None, str]
    if config.engine.name == "zero3" and any(True for _ in model.get_output_embeddings().children()):
        found = None, "zero3 gathers the parts of an adapted head one by one"
    else:
        found = attach_head(model, always=config.train.chunked_loss is True)
    task.head, reason = found
    if task.head is None and config.train.chunked_loss is True:
        raise RequestError.of("train.chunked_loss", reason, "set train.chunked_loss=auto")
    return f"loss in chunks: {reason}" if task.head else f"loss from all logits at once: {reason}"


def build_method(config: RunConfig, run_dir: Path | None = None) -> Method:
    """Build the method of a run."""
    return method_of(config.method, run_dir)


def method_of(choice: MethodConfig, run_dir: Path | None = None) -> Method:
    """Build the method of a choice of the group `method`; lora stores files that a resumed run needs in `run_dir`."""
    module, name = METHODS[choice.name]
    build = getattr(importlib.import_module(f".method.{module}", __package__), name)
    stored = (run_dir / START_FILE,) if run_dir is not None and isinstance(choice, LoraKeys) else ()
    method: Method = build(choice, *stored)
    return method


def choose_attention(
    config: RunConfig, folder: str, device: torch.device, architecture: Architecture, requested: str | None = None
) -> AttentionChoice:
    """Choose the attention implementation, and whether micro-batches are free of padding.

    Rows are padded with virtual tokens, and in private runs, which need a separate gradient for each row. `requested`
    replaces `model.attn_implementation` where the run does not compute.
    """
    attention = attention_of(config.model, folder, device, architecture, requested)
    if config.method.virtual_tokens:
        return attention.padded(f"method={config.method.name} puts virtual tokens before each row")
    if config.privacy.is_on:
        return attention.padded("each row of a private run has a gradient of its own")
    return attention


def build_engine(plan: Plan, worker: Worker, privacy: Privacy | None = None) -> Engine:
    """Build the engine, with the mechanism of a private run if given; DeepSpeed is imported only for its engines."""
    config = plan.config
    options: dict[str, Any] = {
        "device": worker.device,
        "place": worker.place,
        "dtype": getattr(torch, config.model.dtype),
        "max_grad_norm": config.optim.max_grad_norm,
        "tick": worker.tick,
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


@dataclass(frozen=True)
class ModelRecipe:
    """Recipe by which every rank builds the same modules: load, method, router policy, float32 masters.

    Args:
        config: Configuration of the run.
        folder: Folder of the base model.
        attention: Attention implementation.
        architecture: Architecture that the task requires.
        method: Method, which selects the trained weights.
    """

    config: RunConfig
    folder: str
    attention: AttentionChoice
    architecture: Architecture
    method: Method

    def build(self, *, weights: bool, tick: Beat = unwatched) -> BuiltModel:
        """Build the model on the CPU; without weights, the modules are the same and parameters are undefined."""
        config = self.config
        torch.manual_seed(config.train.seed)  # a new head is initialized identically in every run
        anatomy = load_model(config.model, self.folder, self.attention, self.architecture, weights=weights)
        torch.manual_seed(config.train.seed)  # and so are the weights that the method adds
        model = self._routed_method(anatomy).apply(anatomy)
        if weights and isinstance(self.method, Begins):
            self.method.begin(model, getattr(torch, config.model.dtype), tick)
        if config.train.neftune_noise_alpha:
            assert anatomy.embeddings is not None, "transformers' models have input embeddings"
            add_embedding_noise(model, anatomy.part(anatomy.embeddings), config.train.neftune_noise_alpha)
        apply_policy(config.moe, config.method, anatomy)
        keep_masters(model, weights=weights, tick=tick)
        return BuiltModel(model, anatomy)

    def build_meta(self, dtype: torch.dtype | None = None) -> BuiltModel:
        """Build the same modules on the meta device: names, shapes and what is trained; in `dtype` if given."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the run itself shows peft's warnings
            built = self.build(weights=False)
        if dtype is not None:
            built.model.to(dtype)
        return built

    def _routed_method(self, anatomy: Anatomy) -> Method:
        """Build the method with the routers among its targets if `moe.router` requires it."""
        routed = route_method(self.config.method, self.config.moe, anatomy)
        return self.method if routed is self.config.method else method_of(routed)


def keep_masters(model: nn.Module, *, weights: bool, tick: Beat = unwatched) -> None:
    """Store trained parameters in float32; engines compute in `model.dtype`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            # Without weights, memory is allocated but never written.
            master = parameter.data.float() if weights else torch.empty_like(parameter.data, dtype=torch.float32)
            parameter.data = master
            tick(f"float32 copy of {name}")


def optim_factory(config: RunConfig, device: torch.device) -> OptimFactory:
    """Return the factory with which an engine builds the optimizer over its own parameters."""
    fused = device.type in ("cpu", "cuda")
    return partial(build_adamw, config.optim, lr_scale=config.method.lr_scale, fused=fused)
