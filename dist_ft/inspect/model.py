"""What a plan would train: the exact model without its weights, what learns in it, memory a rank, the data's ledger.

`python -m dist_ft.inspection PLAN_YAML` is the slow half of `dist-ft plan`.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..config.plan import Plan, read_plan
from ..config.run import RunConfig
from ..families import architecture_of, build_method, model_factory
from ..model.anatomy import find_blocks, find_routers
from ..model.load import attention_of
from ..model.quantization.packed import find_packed
from ..prepare import prepare
from ..privacy.rules import takes_rows_together
from ..process.command import run_command, split_run
from ..state import Facts
from .ledger import ledger_tables
from .memory import Sizes, estimate_memory, estimate_rows

COMPONENTS = ("embeddings", "attention", "mlp", "experts", "router", "norms", "head", "other", "adapters")
_COPIES = re.compile(r"\.modules_to_save\.|\.ln_tuning_layers\.")  # of the base's own modules
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer|\.default\b|\.original_module|\.modules_to_save")


@dataclass
class Share:
    """Parameters of one component."""

    parameters: int = 0
    trainable: int = 0
    bytes_by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def build_meta(config: RunConfig, model_dir: str, facts: Facts) -> nn.Module:
    """The run's model, method applied, on torch's meta device: everything but the numbers."""
    architecture = architecture_of(config, facts)
    attention = attention_of(config.model, model_dir, torch.device("cpu"), architecture)
    build_model = model_factory(config, model_dir, attention, architecture, build_method(config))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the run itself says them again
        return build_model(False)


def count_components(model: nn.Module, *, whole: bool = True) -> dict[str, Share]:
    """Parameters by component, found from the model's structure; a tied head counts with the embeddings.

    Args:
        model: with the method applied.
        whole: the method trains the model's own weights; else what learns was added to it, and counts as adapters.
    """
    shares: dict[str, Share] = {}
    kinds = _component_of_modules(model)
    packed = find_packed(model)
    for name, parameter in model.named_parameters():
        parent = name.rpartition(".")[0]
        added = parameter.requires_grad and not whole and not _COPIES.search(name)
        kind = "adapters" if added else _nearest(parent, kinds)
        share = shares.setdefault(kind, Share())
        entry = packed.get(name)
        share.parameters += math.prod(entry.shape) if entry else parameter.numel()
        share.trainable += parameter.numel() if parameter.requires_grad else 0
        share.bytes_by_dtype[entry.scheme if entry else _dtype(parameter)] += (
            parameter.numel() * parameter.element_size()
        )
    return {kind: shares[kind] for kind in COMPONENTS if kind in shares}


def count_trainable(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """Trainable parameters by name with layer numbers as `*` → tensors, shape of one, parameters of all."""
    groups: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = re.sub(r"\.\d+\.", ".*.", _WRAPPERS.sub("", name))
            groups[plain, tuple(parameter.shape)] += 1
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for (name, shape), count in groups.items():
        key = name if name not in found else f"{name} {list(shape)}"
        found[key] = (count, shape, count * torch.Size(shape).numel())
    return found


def measure_sizes(model: nn.Module, config: RunConfig) -> Sizes:
    """What memory depends on."""
    compute_bytes = getattr(torch, config.model.dtype).itemsize
    blocks = [sum(p.numel() for p in block.parameters()) for block in find_blocks(model)]
    parameters = list(model.parameters())
    return Sizes(
        frozen_bytes=sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        compute_bytes=compute_bytes,
        largest_block=max(blocks, default=sum(p.numel() for p in parameters)),
    )


def render(plan: Plan, model: nn.Module) -> Iterator[Table]:
    """The tables of the model."""
    shares = count_components(model, whole=plan.config.method.whole)
    dtypes = sorted({dtype for share in shares.values() for dtype in share.bytes_by_dtype})
    total = sum(share.parameters for share in shares.values())
    table = _table("model", "parameters", "trainable", *dtypes)
    for kind, share in shares.items():
        sizes = (_mib(share.bytes_by_dtype[d]) if share.bytes_by_dtype.get(d) else "" for d in dtypes)
        table.add_row(kind, f"{share.parameters:,}", f"{share.trainable:,}" if share.trainable else "", *sizes)
    sums = [_mib(sum(share.bytes_by_dtype.get(d, 0) for share in shares.values())) for d in dtypes]
    trained = sum(share.trainable for share in shares.values())
    table.add_row("all", f"{total:,}", f"{trained:,}", *sums, style="bold")
    yield table

    table = _table("trainable", "tensors", "shape", "parameters", "share of all")
    for name, (count, shape, parameters) in count_trainable(model).items():
        table.add_row(name, str(count), " × ".join(map(str, shape)), f"{parameters:,}", f"{parameters / total:.3%}")
    table.add_row("all", "", "", f"{trained:,}", f"{trained / total:.3%}", style="bold")
    yield table

    engine = plan.config.engine
    parts = estimate_memory(engine, plan.world_size, measure_sizes(model, plan.config))
    if plan.config.privacy.is_on:
        learn = [p.numel() for p in model.parameters() if p.requires_grad]
        rows = plan.config.train.per_device_train_batch_size if takes_rows_together(plan.config) else 0
        parts.append(estimate_rows(engine, rows, sum(learn), max(learn)))
    table = _table(f"memory of a rank ({engine.name}, {plan.world_size} workers), estimated", "device", "host", "")
    for part in parts:
        table.add_row(
            part.name, _mib(part.device) if part.device else "", _mib(part.host) if part.host else "", part.why
        )
    device, host = sum(p.device for p in parts), sum(p.host for p in parts)
    table.add_row("all", _mib(device), _mib(host) if host else "", "without activations and buffers", style="bold")
    yield table


def main(arguments: list[str]) -> None:
    """Print the tables of the plan named first."""
    run_file, _ = split_run(arguments, "inspection")
    plan = read_plan(run_file)
    prepared = prepare(plan.config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    model = build_meta(plan.config, prepared.model_dir, prepared.facts)
    tables: Iterable[Table] = render(plan, model)
    splits = (("train", prepared.train), ("validation", prepared.validation), ("test", prepared.test))
    ledgers = (
        table for name, split in splits if split is not None for table in ledger_tables(plan.config, split, name)
    )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for shown in (*tables, *ledgers):
        console.print(shown)
        console.print()
    for line in prepared.describe_shared():
        console.print(line, soft_wrap=True)


def _component_of_modules(model: nn.Module) -> dict[str, str]:
    """Component by module name, of modules that say what they are; their children belong to them."""
    inner: Any = model
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    routers = {id(module) for module in find_routers(_plain(model))}
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    kinds: dict[str, str] = {"": "other"}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2].lower()
        if module is embeddings or isinstance(module, nn.Embedding):
            kinds[name] = "embeddings"
        elif module is head:
            kinds[name] = "head"
        elif id(module) in routers or last in ("router", "gate") and not isinstance(module, nn.ModuleList):
            kinds[name] = "router"
        elif "norm" in type(module).__name__.lower():
            kinds[name] = "norms"
        elif last == "experts":
            kinds[name] = "experts"
        elif id(module) in inside and ("attn" in last or "attention" in last):
            kinds[name] = "attention"
        elif id(module) in inside and any(word in last for word in ("mlp", "feed_forward", "ffn", "moe")):
            kinds[name] = "mlp"
    return kinds


def _plain(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft one; its configuration tells how many experts there are."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else model


def _nearest(name: str, kinds: dict[str, str]) -> str:
    while name not in kinds:
        name = name.rpartition(".")[0]
    return kinds[name]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if not column and i == len(columns) - 1 else "right")
    return table


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _mib(count: int | float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(run_command(main))
