"""The trained model as a Hugging Face folder that is loaded again, and gives the same logits, before it is called done.

A run writes its own at its end by `export_run`; of a run that was, merge.py writes one.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..config.method import MethodChoice
from ..config.model import ModelConfig
from ..errors import MachineError, TrainingError
from ..state import CAUSAL_LM, Architecture, Method, ModelFactory, Weights
from .account import Account
from .opened import is_adapter, name_base, open_export, set_adapter_base
from .probe import TOLERANCE, Deviation, Probe, compare, probe_model

ROOM_FACTOR = 1.05


def export_run(
    *,
    method: Method,
    model_config: ModelConfig,
    model_dir: str,
    architecture: Architecture = CAUSAL_LM,
    build_model: ModelFactory,
    tokenizer: Any,
    end_token_id: int | None,
    weights: Weights,
    out: Path,
    card: str,
    probe: Probe,
    is_main: bool = True,
    tell: Callable[[str], None] = print,
) -> Deviation | None:
    """Write the trained model into `out`, whole and verified or not at all. Every rank calls it; rank 0 writes.

    Gives how far the loaded model's logits are from `probe`'s; None on other ranks.

    Args:
        method: writes the weights in its form.
        model_config: the run's.
        model_dir: the base model's folder.
        architecture: of the task.
        build_model: the run's factory, for names and configuration.
        tokenizer: with the chat template of the training.
        end_token_id: what ends an answer; None leaves the base's own.
        weights: of an adapter method the trained ones, else all; a collective stream by name.
        out: the folder; one that is there is replaced.
        card: the text of README.md.
        probe: the trained model's logits.
        is_main: rank 0; other ranks only take part in the stream.
        tell: shows a line to the user.

    Raises:
        TrainingError: the folder does not give the trained model.
        MachineError: there is no room.
    """
    if not is_main:
        collections.deque(weights, maxlen=0)
        return None
    adapter = not method.config.whole
    model = build_bare(build_model, None if adapter else getattr(torch, model_config.dtype))
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapter}
    account = Account(stored_dtypes(method.config, model_config))

    def fill(folder: Path) -> None:
        method.export(model, account.record(weights), folder)
        account.check_names(wanted)
        if adapter:
            set_adapter_base(folder, name_base(model_config, model_dir), model_config.revision)
        add_companions(folder, model, model_dir, tokenizer, end_token_id, card)

    def check(folder: Path) -> Deviation:
        found = verify(folder, account, model, model_config, model_dir, architecture, probe, exact=method.config.exact)
        tell_both_bases(folder, model_config, model_dir, architecture, probe, found, tell)
        return found

    return publish(out, fill, check, needed_bytes=size_of(wanted.values()))


def size_of(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def build_bare(build_model: ModelFactory, dtype: torch.dtype | None = None) -> Any:
    """The run's modules without memory behind them: names, shapes and what learns; all in `dtype` if it is given."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's, said when the run was built
        model: Any = build_model(False)
    model.config.use_cache = True
    return model if dtype is None else model.to(dtype)


def stored_dtypes(method: MethodChoice, model: ModelConfig) -> Callable[[str], torch.dtype | None]:
    """In what a parameter, given by name, is exported: an adapter's own stay in float32, as they were trained.

    A whole model, and a module's copy that stands in its place, have the dtype that the model was asked for in.
    """
    dtype: torch.dtype = getattr(torch, model.dtype)
    copies = (".modules_to_save.", ".ln_tuning_layers.")
    return lambda name: dtype if method.whole or any(part in name for part in copies) else None


def publish(
    out: Path, fill: Callable[[Path], None], check: Callable[[Path], Deviation], *, needed_bytes: int
) -> Deviation:
    """Fill and check a folder beside `out`, then put it in `out`'s place.

    Raises:
        MachineError: there is no room.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < ROOM_FACTOR * needed_bytes:
        rule = f"the export needs {needed_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise MachineError.of(str(out.parent), rule, "make room and run again: it goes on from the last checkpoint")
    staging, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    for rest in (staging, old):
        shutil.rmtree(rest, ignore_errors=True)
    staging.mkdir()
    try:
        fill(staging)
        deviation = check(staging)
        for file in staging.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if out.exists():
            out.rename(old)
        staging.rename(out)
    finally:
        for rest in (staging, old):
            shutil.rmtree(rest, ignore_errors=True)
    return deviation


def verify(
    folder: Path,
    account: Account,
    trained: nn.Module,
    config: ModelConfig,
    model_dir: str,
    architecture: Architecture,
    probe: Probe,
    *,
    exact: bool = True,
) -> Deviation:
    """Load the folder as a user would and compare tensors, ties and logits with the trained model's.

    Args:
        folder: of the export.
        account: of the tensors that went in.
        trained: the trained model's modules, of which names and ties are looked at, not weights.
        config: of the base.
        model_dir: of the base.
        architecture: what the task needs of a model.
        probe: the trained model's logits.
        exact: false where the method stores what its tensors were turned into; then the logits alone tell.

    Raises:
        TrainingError: something is not as it was.
    """
    account.check_files(folder, exact=exact and is_adapter(folder))
    loaded = open_export(folder, config, model_dir, architecture)
    if exact:
        account.check_loaded(loaded)
    if ties_embeddings(trained) and not ties_embeddings(loaded):
        rule = "input and output embeddings are one tensor in training and two after loading"
        raise TrainingError.of(str(folder), rule, "set tie_word_embeddings in the base's config.json")
    return check_logits(folder, probe, loaded, config.dtype)


def check_logits(folder: Path, probe: Probe, loaded: nn.Module, dtype: str) -> Deviation:
    """The deviation of `loaded` from the probe.

    Raises:
        TrainingError: it is more than rounding explains.
    """
    deviation = compare(probe, probe_model(loaded, probe.inputs))
    if not deviation.relative <= TOLERANCE[dtype]:
        rule = f"gives other logits after loading than in training ({deviation}; {TOLERANCE[dtype]:.0e} is rounding)"
        way_out = "all tensors are alike: see config.json, and the versions that `dist-ft doctor` shows"
        raise TrainingError.of(str(folder), rule, way_out)
    return deviation


def tell_both_bases(
    folder: Path,
    config: ModelConfig,
    model_dir: str,
    architecture: Architecture,
    probe: Probe,
    quantised: Deviation,
    tell: Callable[[str], None] = print,
) -> None:
    """Of an adapter for a quantised base: what it costs to put it on the base as it was; told, and kept in the card.

    Args:
        folder: the export, with its card.
        config: the run's.
        model_dir: the base model's folder.
        architecture: of the task.
        probe: the trained model's logits.
        quantised: the deviation from it over the base in the bits of training.
        tell: shows a line to the user.
    """
    scheme = config.quantization or "none"
    if scheme == "none":
        return
    whole = open_export(folder, config.model_copy(update={"quantization": "none"}), model_dir, architecture)
    deviation = compare(probe, probe_model(whole, probe.inputs))
    tell(f"adapter over the {scheme} base that was trained on: logits differ by {quantised}")
    tell(f"adapter over the base in {config.dtype}: logits differ by {deviation}")
    text = (
        "\n## Deviation from the model in training\n\n"
        f"Of the logits on {len(probe.logits)} places: over the base in {scheme} {quantised}; "
        f"over the base in {config.dtype}, which was not trained on, {deviation}.\n"
    )
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write(text)


def ties_embeddings(model: nn.Module) -> bool:
    """Whether input and output embeddings are one parameter."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and embeddings is not None and inner_layer(head).weight is inner_layer(embeddings).weight


def inner_layer(module: Any) -> Any:
    """The layer that an adapter, or a copy that is trained, stands around."""
    while hasattr(module, "base_layer") or hasattr(module, "original_module"):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return module


def add_companions(
    folder: Path, model: nn.Module, model_dir: str, tokenizer: Any, end_token_id: int | None, card: str
) -> None:
    """Tokenizer with chat template, generation settings that stop where answers end, and the model card."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(model_dir)
    except OSError:
        generation = GenerationConfig.from_model_config(model.config)
    if not model.can_generate():  # type: ignore[operator]
        (folder / "README.md").write_text(card, encoding="utf-8")
        return
    settings = generation.to_diff_dict()
    ends = settings.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end_token_id is not None and end_token_id not in known:
        settings["eos_token_id"] = [end_token_id, *known] if known else end_token_id
    # Written as it is: transformers refuses to save settings that it loads with a warning.
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
