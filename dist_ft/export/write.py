"""Export of the trained model to a Hugging Face folder, which is reloaded and must reproduce the trained logits.

A run exports its model at the end with `export_run`; merge.py exports the model of a finished run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..config.method import MethodChoice
from ..config.model import ModelConfig
from ..errors import MachineError, TrainingError
from ..model.anatomy import unwrap
from ..model.ticking import ticking
from ..protocols import Method
from ..state import CAUSAL_LM, Architecture, Beat, Weights, unwatched
from ..storage.files import is_disk_full
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
    bare: Any,
    tokenizer: Any,
    end_token_id: int | None,
    weights: Weights,
    out: Path,
    card: str,
    probe: Probe,
    tell: Callable[[str], None] = print,
    tick: Beat = unwatched,
) -> Deviation:
    """Write the trained model to `out` atomically and only if it passes verification; on rank 0.

    Args:
        method: method of the run, which writes the weights.
        model_config: model configuration of the run.
        model_dir: folder of the base model.
        architecture: architecture that the task requires.
        bare: the run's modules on the meta device, for names and configuration.
        tokenizer: with the chat template used in training, or None.
        end_token_id: id of the token that ends an answer; None keeps the setting of the base model.
        weights: names and tensors of the trainable parameters if the method trains an adapter, else of all parameters.
        out: output folder; an existing one is replaced.
        card: text of README.md.
        probe: logits of the trained model.
        tell: shows a line to the user.
        tick: called for each tensor gathered, written, loaded and checked.

    Returns:
        The deviation of the reloaded model's logits from `probe`.

    Raises:
        TrainingError: If the exported folder does not reproduce the trained model.
        MachineError: If there is not enough disk space.
    """
    adapter = not method.config.whole
    wanted = exported_parameters(bare, model_config, adapter=adapter)
    account = Account(stored_dtypes(method.config, model_config), tick)

    def fill(folder: Path) -> None:
        method.export(bare, account.record(weights), folder)
        account.check_names(wanted)
        if adapter:
            set_adapter_base(folder, name_base(model_config, model_dir), model_config.revision)
        add_companions(folder, bare, model_dir, tokenizer, end_token_id, card)

    def check(folder: Path) -> Deviation:
        found = verify(folder, account, bare, model_config, model_dir, architecture, probe, exact=method.config.exact)
        tell_both_bases(folder, model_config, model_dir, architecture, probe, found, tell, tick)
        return found

    with ticking(tick):
        return publish(out, fill, check, needed_bytes=size_of(wanted.values()), tick=tick)


def exported_parameters(bare: Any, model_config: ModelConfig, *, adapter: bool) -> dict[str, Tensor]:
    """Set dtype and cache use of the modules as they are exported; return the parameters that the export has."""
    bare.config.use_cache = True
    if not adapter:
        bare.to(getattr(torch, model_config.dtype))
    return {name: p for name, p in bare.named_parameters() if p.requires_grad or not adapter}


def size_of(parameters: Iterable[Tensor]) -> int:
    """Return the size of the parameters in bytes."""
    return sum(p.numel() * p.element_size() for p in parameters)


def stored_dtypes(method: MethodChoice, model: ModelConfig) -> Callable[[str], torch.dtype | None]:
    """Return a function that maps a parameter name to its export dtype, or to None to keep the dtype.

    Full models and trained copies of base modules are exported in `model.dtype`; adapter parameters stay in float32.
    """
    dtype: torch.dtype = getattr(torch, model.dtype)
    copies = (".modules_to_save.", ".ln_tuning_layers.")
    return lambda name: dtype if method.whole or any(part in name for part in copies) else None


def publish(
    out: Path,
    fill: Callable[[Path], None],
    check: Callable[[Path], Deviation],
    *,
    needed_bytes: int,
    tick: Beat = unwatched,
) -> Deviation:
    """Fill and check a staging folder next to `out`, then move it to `out`.

    Raises:
        MachineError: If there is not enough disk space, also if it is used up meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < ROOM_FACTOR * needed_bytes:
        rule = f"the export needs {needed_bytes / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are free"
        raise MachineError.of(str(out.parent), rule, "free disk space and run again to resume from the last checkpoint")
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
            tick(f"syncing {file}")
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except Exception as error:
        if not is_disk_full(error):
            raise
        rule = f"no space is left for the export, which needs {needed_bytes / 2**30:.2f} GiB: {error}"
        raise MachineError.of(str(out.parent), rule, "free disk space and run again to export") from error
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
    """Load the export as a user would and compare tensors, tied embeddings and logits with the trained model.

    Args:
        folder: folder of the export.
        account: record of the exported tensors.
        trained: modules of the trained model, used for tied embeddings only; the weights are not read.
        config: configuration of the base model.
        model_dir: folder of the base model.
        architecture: architecture that the task requires.
        probe: logits of the trained model.
        exact: whether tensors are stored unchanged; if the method converts them, only the logits are compared.

    Raises:
        TrainingError: If the loaded model differs from the trained model.
    """
    account.check_files(folder, exact=exact and is_adapter(folder))
    loaded = open_export(folder, config, model_dir, architecture)
    if exact:
        account.check_loaded(loaded)
    if ties_embeddings(trained) and not ties_embeddings(loaded):
        rule = "input and output embeddings are tied in training but not after loading"
        raise TrainingError.of(str(folder), rule, "set tie_word_embeddings in config.json of the base model")
    return check_logits(folder, probe, loaded, config.dtype, account.tick)


def check_logits(folder: Path, probe: Probe, loaded: nn.Module, dtype: str, tick: Beat = unwatched) -> Deviation:
    """Return the deviation of the logits of `loaded` from the probe.

    Raises:
        TrainingError: If the deviation is larger than rounding in `dtype` explains.
    """
    deviation = compare(probe, probe_model(loaded, probe.inputs, tick))
    if not deviation.relative <= TOLERANCE[dtype]:
        rule = f"the logits after loading differ from training ({deviation}; relative tolerance {TOLERANCE[dtype]:.0e})"
        way_out = "the tensors are identical: check config.json and the library versions that `dist-ft doctor` shows"
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
    tick: Beat = unwatched,
) -> None:
    """Report the deviation of an adapter on the unquantized base model, and append it to the model card.

    Does nothing unless the adapter was trained on a quantized base model.

    Args:
        folder: folder of the export with its model card.
        config: model configuration of the run.
        model_dir: folder of the base model.
        architecture: architecture that the task requires.
        probe: logits of the trained model.
        quantised: deviation from `probe` on the base model quantized as in training.
        tell: shows a line to the user.
        tick: called for each module that the probe passes.
    """
    scheme = config.quantization or "none"
    if scheme == "none":
        return
    whole = open_export(folder, config.model_copy(update={"quantization": "none"}), model_dir, architecture)
    deviation = compare(probe, probe_model(whole, probe.inputs, tick))
    tell(f"adapter on the {scheme} base model used in training: logits differ by {quantised}")
    tell(f"adapter on the unquantized base model in {config.dtype}: logits differ by {deviation}")
    text = (
        "\n## Deviation from the model in training\n\n"
        f"Deviation of the logits at {len(probe.logits)} positions: on the {scheme} base model, {quantised}; "
        f"on the base model in {config.dtype}, which was not used in training, {deviation}.\n"
    )
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write(text)


def ties_embeddings(model: nn.Module) -> bool:
    """Return whether input and output embeddings are the same parameter."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and embeddings is not None and unwrap(head).weight is unwrap(embeddings).weight


def add_companions(
    folder: Path, model: nn.Module, model_dir: str, tokenizer: Any, end_token_id: int | None, card: str
) -> None:
    """Write the tokenizer with its chat template, generation_config.json with the end token, and the model card."""
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
    # Written directly, because transformers refuses to save settings for which it only warns on loading.
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
