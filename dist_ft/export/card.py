"""Model card (README.md) of an export: data, metrics, settings, versions and the code that loads the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.files import read_progress
from ..checkpoint.fingerprints import versions
from ..config.model import ModelConfig
from ..config.plan import CHECKPOINTS, METRICS_FILE, Plan
from ..data.order.order import PoissonOrder, total_steps
from ..data.order.proportions import describe_mixture
from ..data.read.sets import sets_of
from ..data.store.opened import Split
from ..families import architecture_of
from ..model.load import rename_base
from ..prepare import Prepared
from ..pretrained.folder import stored_scheme
from ..pretrained.source import is_hub_id
from ..privacy.mechanism import find_privacy
from ..state import CAUSAL_LM, Architecture
from ..track.jsonl import read_evaluations, read_metrics
from ..track.trackers import read_tracking
from .opened import name_base

PIPELINES = {  # task → `pipeline_tag` of the Hugging Face Hub
    "causal_lm": "text-generation",
    "instruction": "text-generation",
    "masked_lm": "fill-mask",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "seq2seq": "text2text-generation",
    "question_answering": "question-answering",
    "preference": "text-generation",
    "reward": "text-classification",
}
SPLITS = ("train", "validation", "test")
PROMISE = (
    "The weights are differentially private with respect to the rows of the training split (DP-SGD with the AdamW\n"
    "update): adding or removing one row changes the distribution of the weights by at most (epsilon, delta). Exact\n"
    "numbers on this card, such as the numbers of rows and tokens, are not covered."
)
DATA_COLUMNS = ("split", "source", "rows", "tokens", "supervised", "fingerprint")


def card_of_run(
    plan: Plan, prepared: Prepared, run_dir: Path, *, merged: bool = False, checkpoint: str | None = None
) -> str:
    """Render the model card of a run with the metrics from its folder.

    Args:
        plan: plan of the run.
        prepared: prepared data of the run.
        run_dir: folder of the run, which contains metrics.jsonl.
        merged: whether the adapter was merged into its base model.
        checkpoint: checkpoint that the weights come from; None means the end of training.
    """
    before, after = read_evaluations(run_dir / METRICS_FILE)
    steps = max((line["step"] for line in read_metrics(run_dir / METRICS_FILE)), default=None)
    if checkpoint:
        after = {}  # the last evaluation belongs to the weights at the end of training
        steps = int((run_dir / CHECKPOINTS / checkpoint).resolve().name.removeprefix("step-"))
    changes: tuple[str, ...] = ()
    with contextlib.suppress(OSError):
        changes = read_progress(run_dir / CHECKPOINTS / (checkpoint or "latest")).accepted
    url = read_tracking(run_dir).get("wandb", {}).get("url")
    return render_card(
        plan, prepared, before, after, merged=merged, checkpoint=checkpoint, taken=steps, changes=changes, url=url
    )


def render_card(
    plan: Plan,
    prepared: Prepared,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    merged: bool = False,
    checkpoint: str | None = None,
    taken: int | None = None,
    changes: Sequence[str] = (),
    url: str | None = None,
) -> str:
    """Render the model card as Markdown with the YAML front matter of the Hugging Face Hub.

    Args:
        plan: plan of the run.
        prepared: prepared data of the run.
        before: metrics of the first evaluation (`step` and `eval/…`); empty if there is none.
        after: metrics of the last evaluation; empty if there is none.
        merged: whether the adapter was merged into its base model.
        checkpoint: checkpoint that the weights come from; None means the end of training.
        taken: number of optimizer steps behind the weights; defaults to the planned number.
        changes: what changed while the run was stopped and was accepted.
        url: page of the run in W&B.
    """
    config = plan.config
    base = name_base(config.model, prepared.model_dir)
    architecture = architecture_of(config, prepared.facts)
    if renamed := rename_base(config.model, prepared.model_dir, architecture):
        architecture = replace(architecture, overrides={**architecture.overrides, "key_mapping": renamed})
    is_adapter = not config.method.whole and not merged
    library = config.method.library if is_adapter else "transformers"
    is_quantised = is_adapter and config.model.quantization not in (None, "none")
    kind = "adapter" if is_adapter else "merged adapter" if merged else "model"
    source = "scratch with the configuration of " if config.model.from_scratch else ""
    origin = f"{_indefinite(config.method.name)} {kind}, trained from {source}`{config.model.name_or_path}`"
    origin += f" on the task `{config.task.name}`" + (f", checkpoint `{checkpoint}`" if checkpoint else "")
    sections = [
        _front_matter(plan, library),
        f"# {config.run_name}\n\n{origin}.",
        "## Load\n\n"
        + (
            _load_quantised(config.model, base, architecture)
            if is_quantised
            else _python(load_lines(base, library, architecture))
        )
        + (_stored_note(Path(prepared.model_dir)) if is_adapter else ""),
        "## Data\n\n"
        + _table(DATA_COLUMNS, _data_rows(plan, prepared))
        + "".join(f"\n\n{line}." for line in (*describe_mixture(config, prepared.train), *changes)),
    ]
    if before or after:
        sections.append("## Evaluation\n\n" + _evaluations(before, after))
    if config.privacy.is_on:
        sections.append(f"## Privacy\n\n{PROMISE}\n\n" + _table(("", ""), list(_privacy_rows(plan, prepared, taken))))
    sections += [
        "## Training\n\n" + _curves(url) + _table(("setting", "value"), _setting_rows(plan)),
        "## Versions\n\n" + _table(("", ""), _version_rows(plan)),
    ]
    return "\n\n".join(sections) + "\n"


def load_lines(base: str, library: str, architecture: Architecture = CAUSAL_LM) -> str:
    """Return Python code that loads the model; run it in the folder of the export or replace "." by its path."""
    kind, arguments = architecture.auto_class, _arguments(architecture)
    if library == "transformers":
        return (
            f"from transformers import {kind}, AutoTokenizer\n"
            f'model = {kind}.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    if library == "dist_ft":
        return (
            "import dist_ft.method.adapter, transformers\n"
            f"base = transformers.{kind}.from_pretrained({base!r}{arguments})\n"
            'model = dist_ft.method.adapter.load_adapter(base, ".")'
        )
    if architecture.vocabulary:
        return (
            "import peft, transformers\n"
            f"base = transformers.{kind}.from_pretrained({base!r}{arguments})\n"
            f"{_resize(architecture)}"
            'model = peft.PeftModel.from_pretrained(base, ".")\n'
            'tokenizer = transformers.AutoTokenizer.from_pretrained(".")'
        )
    return (
        "import peft, transformers\n"
        f'model = peft.PeftModel.from_pretrained(transformers.{kind}.from_pretrained({base!r}{arguments}), ".")\n'
        'tokenizer = transformers.AutoTokenizer.from_pretrained(".")'
    )


def load_lines_bitsandbytes(base: str, scheme: str, dtype: str, architecture: Architecture = CAUSAL_LM) -> str:
    """Return Python code that loads an adapter on its `nf4` or `int8` base model with bitsandbytes and PEFT."""
    settings = (
        "load_in_8bit=True"
        if scheme == "int8"
        else 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
        f"    bnb_4bit_compute_dtype=torch.{dtype}"
    )
    return (
        "import peft, torch, transformers\n"
        f"quantization = transformers.BitsAndBytesConfig(\n    {settings},\n)\n"
        f"base = transformers.{architecture.auto_class}.from_pretrained(\n"
        f"    {base!r}, dtype=torch.{dtype}, quantization_config=quantization{_arguments(architecture)}\n)\n"
        f"{_resize(architecture)}"
        'model = peft.PeftModel.from_pretrained(base, ".")\n'
        'tokenizer = transformers.AutoTokenizer.from_pretrained(".")'
    )


def load_lines_as_trained(base: str, scheme: str, dtype: str, architecture: Architecture = CAUSAL_LM) -> str:
    """Return Python code that quantizes the base model with this package to exactly the weights used in training."""
    options = f"dtype=torch.{dtype}{_arguments(architecture)}"
    return (
        "import peft, torch, transformers\n"
        "from dist_ft.model.quantize import quantize\n"
        f"base = transformers.{architecture.auto_class}.from_pretrained({base!r}, {options})\n"
        f"{_resize(architecture)}"
        f"quantize(base, {scheme!r}, torch.{dtype}, weights=True)\n"
        'model = peft.PeftModel.from_pretrained(base, ".")\n'
        'tokenizer = transformers.AutoTokenizer.from_pretrained(".")'
    )


def _load_quantised(model: ModelConfig, base: str, architecture: Architecture) -> str:
    """Describe how to load an adapter that was trained on a quantized base model."""
    scheme, dtype = str(model.quantization), model.dtype
    bits = 8 if scheme == "int8" else 4
    other = [
        "bitsandbytes also quantizes the inputs of the layers to 8 bits, which training did not."
        if bits == 8
        else "The quantized weights of linear layers are identical; on a CPU, bitsandbytes computes in bfloat16.",
        "It does not quantize the fused experts of a mixture-of-experts model, which were quantized in training.",
    ]
    as_trained = load_lines_as_trained(base, scheme, dtype, architecture)
    return (
        f"The base model was quantized to {bits} bits ({scheme}) in training. With bitsandbytes:\n\n"
        f"{_python(load_lines_bitsandbytes(base, scheme, dtype, architecture))}\n\n{' '.join(other)}\n"
        f"Exactly as in training, if dist_ft is installed:\n\n{_python(as_trained)}"
    )


def _stored_note(folder: Path) -> str:
    """Return how to dequantize a base model whose files are quantized, as training did; empty for other models."""
    scheme = stored_scheme(folder)
    if scheme is None:
        return ""
    loads = {
        "fp8": "with `quantization_config=transformers.FineGrainedFP8Config(dequantize=True)`",
        "mxfp8": "with `quantization_config=transformers.FineGrainedFP8Config(dequantize=True)`",
        "mxfp4": "with `quantization_config=transformers.Mxfp4Config(dequantize=True)`",
    }
    how = loads.get(scheme, "and call its `dequantize()`")
    return (
        f"\n\nThe files of the base model are quantized ({scheme}), and training used the dequantized weights: load "
        f"the base model {how}, or merge the adapter with `dist-ft export merge=true`."
    )


def _resize(architecture: Architecture) -> str:
    """Return the line that resizes the base model's embeddings for added tokens, whose rows are in the adapter."""
    rows = architecture.vocabulary
    return f"base.resize_token_embeddings({rows}, mean_resizing=False)\n" if rows else ""


def _arguments(architecture: Architecture) -> str:
    """Return the `from_pretrained` arguments that the base model needs for an adapter with a head."""
    return "".join(f", {key}={value!r}" for key, value in architecture.overrides.items() if key != "problem_type")


def _python(lines: str) -> str:
    return f"```python\n{lines}\n```"


def _front_matter(plan: Plan, library: str) -> str:
    config = plan.config
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": PIPELINES[config.task.name]}
    if is_hub_id(config.model.name_or_path) and not config.model.from_scratch:
        values["base_model"] = config.model.name_or_path
    values["tags"] = ["dist-ft", config.task.name, config.method.name]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _data_rows(plan: Plan, prepared: Prepared) -> Iterator[tuple[str, ...]]:
    for name in SPLITS:
        split: Split | None = getattr(prepared, name)
        if split is None:
            continue
        for part, alone in sets_of(plan.config, name).items():
            own = split.parts.get(part, split)
            sources, ledger = alone.data.sources(name) or [], own.ledger
            yield (
                f"{name} ({part})" if part else name,
                ", ".join(f"`{source}`" for source in ([sources] if isinstance(sources, str) else sources)),
                _rows_told(ledger),
                f"{ledger['tokens']:,}",
                f"{ledger['supervised_tokens']:,}",
                f"`{Path(own.table).name}`",
            )


def _rows_told(ledger: Mapping[str, Any]) -> str:
    added = ledger.get("augmented", 0)
    kept = f"{ledger['rows_kept'] - added:,} of {ledger['rows_read']:,}"
    return f"{kept} + {added:,} augmented" if added else kept


def _curves(url: str | None) -> str:
    return f"Curves: [W&B]({url}).\n\n" if url else ""


def _evaluations(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    steps = tuple(f"step {m['step']}" if m else "" for m in (before, after))
    return _table(("validation", *steps), _metric_rows(before, after))


def _metric_rows(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys([*before, *after]):
        if name != "step":
            yield name, *(f"{m[name]:.4f}" if m.get(name) is not None else "" for m in (before, after))


def _privacy_rows(plan: Plan, prepared: Prepared, taken: int | None) -> Iterator[tuple[str, ...]]:
    train, samples = plan.config.train, len(prepared.train.open_samples())
    steps, seen = total_steps(samples, train.global_batch_size, train.max_steps, train.num_train_epochs)
    order = PoissonOrder(samples, 0, train.global_batch_size, seen)  # the seed is irrelevant: no rows are sampled
    yield from find_privacy(plan.config.privacy, order, steps).tell(steps if taken is None else taken)


def _setting_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    config = plan.config
    groups = {"model": config.model, "task": config.task, "method": config.method, "optim": config.optim}
    shown = {"model": ("dtype", "quantization", "revision"), "optim": None, "task": None, "method": None}
    for group, values in groups.items():
        for key, value in values.model_dump(mode="json").items():
            wanted = shown[group]
            if value is not None and value != [] and (wanted is None or key in wanted):
                yield f"`{group}.{key}`", str(value)
    for key in ("max_steps", "num_train_epochs", "global_batch_size", "seed"):
        if (value := getattr(config.train, key)) is not None:
            yield f"`train.{key}`", str(value)
    yield "`engine.name`", f"{config.engine.name}, {plan.world_size} worker{'s' * (plan.world_size > 1)}"


def _version_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    yield from versions().items()
    yield "git", plan.git_sha or "not a git checkout"
    yield "planned", plan.created


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _indefinite(method: str) -> str:
    return {"lora": "A LoRA", "full": "A fully fine-tuned"}.get(method, f"A {method}")
