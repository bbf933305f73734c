"""Parameters, trainable parameters, estimated memory per rank and data ledgers of a plan, without loading weights.

`python -m dist_ft.inspect.model PLAN_YAML` is run by `dist-ft plan` in a separate process, because it is slow.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..config.plan import Plan, read_plan
from ..config.run import RunConfig
from ..families import ModelRecipe, architecture_of, build_method, choose_attention
from ..model.quantization.packed import find_packed
from ..prepare import Prepared, describe_data, prepare_plan
from ..privacy.rules import takes_rows_together
from ..process.command import run_command, split_run
from ..state import BuiltModel, Facts
from .activations import estimate_activations
from .ledger import ledger_tables
from .memory import Part, Sizes, estimate_memory, estimate_rows

COMPONENTS = ("embeddings", "attention", "mlp", "experts", "router", "norms", "head", "other", "adapters")
_COPIES = re.compile(r"\.modules_to_save\.|\.ln_tuning_layers\.")  # trained copies of base modules
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer|\.default\b|\.original_module|\.modules_to_save")


@dataclass
class Share:
    """Number and bytes of the parameters of one component."""

    parameters: int = 0
    trainable: int = 0
    bytes_by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def build_meta(config: RunConfig, model_dir: str, facts: Facts) -> BuiltModel:
    """Build the run's model with the method applied on the meta device, that is without weights."""
    architecture = architecture_of(config, facts)
    attention = choose_attention(config, model_dir, torch.device("cpu"), architecture, "auto")
    return ModelRecipe(config, model_dir, attention, architecture, build_method(config)).build_meta()


def count_components(built: BuiltModel, *, whole: bool = True) -> dict[str, Share]:
    """Count parameters by component of the model; a tied head is counted with the embeddings.

    Args:
        built: model with the method applied.
        whole: whether the method trains the model's own weights; otherwise, added trainable parameters are counted as
            adapters.
    """
    shares: dict[str, Share] = {}
    kinds = _component_of_modules(built)
    packed = find_packed(built.model)
    for name, parameter in built.model.named_parameters():
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
    """Group trainable parameters by name with `*` for layer numbers → (tensors, shape of each, total parameters)."""
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


def measure_sizes(built: BuiltModel, dtype: torch.dtype) -> Sizes:
    """Measure the sizes that determine the memory of a model whose forward runs in `dtype`."""
    model, anatomy = built
    blocks = [sum(p.numel() for p in block.parameters()) for block in anatomy.parts(anatomy.blocks)]
    modules = dict(anatomy.model.named_modules())
    idle = sum(p.numel() for name in anatomy.idle if name in modules for p in modules[name].parameters())
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    return Sizes(
        frozen_bytes=sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        compute_bytes=dtype.itemsize,
        largest_block=max(blocks, default=count),
        blocks=sum(blocks),
        outside=count - sum(blocks) - idle,
    )


def render(plan: Plan, prepared: Prepared, built: BuiltModel) -> Iterator[Table]:
    """Yield the tables of components, trainable parameters and estimated memory."""
    shares = count_components(built, whole=plan.config.method.whole)
    yield component_table(shares)
    yield trainable_table(built.model, sum(share.parameters for share in shares.values()))
    yield memory_table(plan, [*estimate_parts(plan, built), estimate_activations(plan.config, prepared)])


def component_table(shares: Mapping[str, Share]) -> Table:
    """Build the table of parameters and bytes by component."""
    dtypes = sorted({dtype for share in shares.values() for dtype in share.bytes_by_dtype})
    table = _table("model", "parameters", "trainable", *dtypes)
    for kind, share in shares.items():
        sizes = (_mib(share.bytes_by_dtype[d]) if share.bytes_by_dtype.get(d) else "" for d in dtypes)
        table.add_row(kind, f"{share.parameters:,}", f"{share.trainable:,}" if share.trainable else "", *sizes)
    total, trained = (sum(getattr(share, key) for share in shares.values()) for key in ("parameters", "trainable"))
    sums = [_mib(sum(share.bytes_by_dtype.get(d, 0) for share in shares.values())) for d in dtypes]
    table.add_row("all", f"{total:,}", f"{trained:,}", *sums, style="bold")
    return table


def trainable_table(model: nn.Module, total: int) -> Table:
    """Build the table of trainable parameters; `total` is the number of all parameters."""
    table = _table("trainable", "tensors", "shape", "parameters", "share of all")
    trained = 0
    for name, (count, shape, parameters) in count_trainable(model).items():
        table.add_row(name, str(count), " × ".join(map(str, shape)), f"{parameters:,}", f"{parameters / total:.3%}")
        trained += parameters
    table.add_row("all", "", "", f"{trained:,}", f"{trained / total:.3%}", style="bold")
    return table


def estimate_parts(plan: Plan, built: BuiltModel) -> list[Part]:
    """Estimate the parts of the memory of one rank."""
    engine = plan.config.engine
    sizes = measure_sizes(built, getattr(torch, plan.config.model.dtype))
    parts = estimate_memory(engine, plan.world_size, sizes, async_save=plan.config.train.async_save)
    if plan.config.privacy.is_on:
        learn = [p.numel() for p in built.model.parameters() if p.requires_grad]
        rows = plan.config.train.per_device_train_batch_size if takes_rows_together(plan.config) else 0
        parts.append(estimate_rows(engine, rows, sum(learn), max(learn)))
    return parts


def memory_table(plan: Plan, parts: Sequence[Part]) -> Table:
    """Build the table of the estimated memory of one rank."""
    title = f"estimated memory per rank ({plan.config.engine.name}, {plan.world_size} workers)"
    table = _table(title, "device", "host", "")
    for part in parts:
        table.add_row(
            part.name, _mib(part.device) if part.device else "", _mib(part.host) if part.host else "", part.why
        )
    device, host = sum(p.device for p in parts), sum(p.host for p in parts)
    table.add_row("all", _mib(device), _mib(host) if host else "", "without buffers of communication", style="bold")
    return table


def main(arguments: list[str]) -> None:
    """Print the tables of the plan given as the first argument."""
    run_file, _ = split_run(arguments, "inspect.model")
    plan = read_plan(run_file)
    prepared = prepare_plan(plan, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    tables = render(plan, prepared, build_meta(plan.config, prepared.model_dir, prepared.facts))
    splits = (("train", prepared.train), ("validation", prepared.validation), ("test", prepared.test))
    ledgers = (
        table for name, split in splits if split is not None for table in ledger_tables(plan.config, split, name)
    )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for shown in (*tables, *ledgers):
        console.print(shown)
        console.print()
    for line in describe_data(plan.config, prepared):
        console.print(line, soft_wrap=True)


def _component_of_modules(built: BuiltModel) -> dict[str, str]:
    """Return the component by module name for recognized modules; their submodules belong to the same component."""
    model, anatomy = built
    inner: Any = model
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    routers = {id(part) for mixture in anatomy.mixtures for part in anatomy.part(mixture.router).modules()}
    inside = {id(module) for block in anatomy.parts(anatomy.blocks) for module in block.modules()}
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
