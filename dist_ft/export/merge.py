"""Export a finished run again, from its export or from a checkpoint, optionally with the adapter merged.

`python -m dist_ft.export.merge RUN_YAML [merge=true] [checkpoint=step-N|latest|best] [out=DIR] [dtype=bfloat16]`
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ..checkpoint import store as checkpoint
from ..checkpoint.reader import SafeReader
from ..config.method import LoraKeys
from ..config.plan import CHECKPOINTS, START_FILE, read_plan
from ..config.run import RunConfig
from ..data.render.template import find_end_token
from ..data.render.tokenizer import open_tokenizer
from ..errors import RequestError
from ..families import ModelRecipe, architecture_of, build_method, choose_attention
from ..method.start import read_start
from ..model.anatomy import unwrap
from ..prepare import Prepared, prepare
from ..process.command import run_command, split_run
from ..process.options import ExportOptions, read_words
from ..task.table import TASKS
from .account import Account
from .card import card_of_run
from .opened import find_export, find_trained_run, is_adapter, name_base, open_export, set_adapter_base
from .probe import Deviation, Probe, compare, plain_inputs, probe_model, shorten
from .write import (
    add_companions,
    check_logits,
    publish,
    size_of,
    stored_dtypes,
    tell_both_bases,
    ties_embeddings,
    verify,
)


def main(arguments: Sequence[str]) -> None:
    """Run `dist-ft export`: write the model, verify it and print the deviation of its logits.

    Raises:
        RequestError: If the options are not supported by the run, there is nothing to export or `out` exists already.
        TrainingError: If the written model does not reproduce the trained model.
    """
    run_file, words = split_run(arguments, "export.merge")
    options = read_words(ExportOptions, words)
    plan = read_plan(run_file)
    config, run_dir = plan.config, find_trained_run(plan, run_file)
    if options.merge and not config.method.mergeable:
        kept = "has no adapter to merge" if config.method.whole else "does not support merging"
        raise RequestError.of("merge", f"method={config.method.name} {kept}", "remove merge=true")
    if options.dtype and not config.method.whole and not options.merge:
        raise RequestError.of("dtype", "is not supported for an unmerged adapter", "set merge=true or remove dtype")
    out = Path(options.out) if options.out else run_dir / _name(options)
    if out.exists():
        raise RequestError.of(str(out), "already exists", "set out=… to a new folder, or remove this one")
    prepared = prepare(config)
    dtype = options.dtype or config.model.dtype
    as_trained = config
    if options.merge:  # merge in float32, so that the weights are rounded only once, on writing
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    if options.merge and config.model.quantization != "none":
        # Open the model in its own dtype: weights in another dtype would be quantized to different values.
        trained = open_trained(as_trained, prepared, run_dir, options.checkpoint)
        config, model = _leave_quantization(trained, config, prepared, run_dir, options.checkpoint)
    else:
        model = open_trained(config, prepared, run_dir, options.checkpoint)
    probe = probe_model(model, _probe_inputs(config, prepared))
    card = card_of_run(plan, prepared, run_dir, merged=options.merge, checkpoint=options.checkpoint)
    deviation = (
        _export_merged(model, config, prepared, out, card, probe, dtype)
        if options.merge
        else _export_as_is(model, config, prepared, run_dir, out, card, probe, dtype)
    )
    print(f"{out}: {'merged' if options.merge else 'exported'} in {dtype} and reloaded; logits differ by {deviation}")


def _leave_quantization(
    trained: nn.Module, config: RunConfig, prepared: Prepared, run_dir: Path, name: str | None
) -> tuple[RunConfig, nn.Module]:
    """Open the adapter on the base model without quantization and print how much this changes the logits.

    The adapter was trained on the quantized base model and partly compensates its quantization error.
    """
    scheme = config.model.quantization
    config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
    model = open_trained(config, prepared, run_dir, name)
    inputs = _probe_inputs(config, prepared)
    deviation = compare(probe_model(trained, inputs), probe_model(model, inputs))
    print(f"adapter on the unquantized instead of the {scheme} base model: logits differ by {deviation}")
    return config, model


def open_trained(config: RunConfig, prepared: Prepared, run_dir: Path, name: str | None) -> nn.Module:
    """Open the trained model in this process, from the export of the run or from the checkpoint `name`.

    Raises:
        RequestError: If the export or checkpoint does not exist, or the checkpoint is damaged or does not match.
    """
    if name is None:
        return open_export(
            find_export(run_dir), config.model, prepared.model_dir, architecture_of(config, prepared.facts)
        )
    path = run_dir / CHECKPOINTS / name
    if not path.is_dir():
        found = ", ".join(sorted(p.name for p in (run_dir / CHECKPOINTS).glob("*"))) or "none"
        raise RequestError.of(f"checkpoint={name}", f"{path} does not exist", f"available checkpoints: {found}")
    if reason := checkpoint.verify(path.resolve()):
        raise RequestError.of(f"checkpoint={name}", f"{path}: {reason}", "choose another checkpoint")
    if isinstance(config.method, LoraKeys) and config.method.moves_base:
        read_start(run_dir / START_FILE)
    model = _recipe(config, prepared, run_dir).build(weights=True).model
    tensors = {f"model/{name}": p.data for name, p in model.named_parameters() if p.requires_grad}
    held = {n for n in SafeReader(path).read_metadata().state_dict_metadata if n.startswith("model/")}
    if held != set(tensors):
        rule = f"does not match the trainable parameters of the run ({len(held ^ set(tensors))} tensor names differ)"
        raise RequestError.of(str(path), rule, "use the run.yaml that the checkpoint was created with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns about loading in a single process
        dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    return model


def _recipe(config: RunConfig, prepared: Prepared, run_dir: Path) -> ModelRecipe:
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, torch.device("cpu"), architecture, "auto")
    return ModelRecipe(config, prepared.model_dir, attention, architecture, build_method(config, run_dir))


def _probe_inputs(config: RunConfig, prepared: Prepared) -> Mapping[str, torch.Tensor]:
    task = TASKS[config.task.name](config.task, prepared.facts, padding_free=False)
    return plain_inputs(task.collate([shorten(prepared.train.first_sample(), task)]))


def merge(model: nn.Module) -> nn.Module:
    """Merge the adapter into the base model and untie embeddings that differ after training."""
    assert isinstance(model, peft.PeftModel)
    tied = ties_embeddings(model.get_base_model())
    if tied:  # merging writes in place: an adapter on one of the tied layers must not change the other
        head: Any = unwrap(model.get_base_model().get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns about untied embeddings, which are handled below
        merged: Any = model.merge_and_unload(safe_merge=True)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        merged.config.tie_word_embeddings = True  # peft sets it to False for the untied copy
    elif tied:
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}  # otherwise `save_pretrained` does not store the head
    assert isinstance(merged, nn.Module)
    return merged


def _export_merged(
    model: nn.Module, config: RunConfig, prepared: Prepared, out: Path, card: str, probe: Probe, dtype: str
) -> Deviation:
    if not isinstance(model, peft.PeftModel):
        raise RequestError.of("merge", "the export of the run is not an adapter", "remove merge=true")
    merged = merge(model)
    in_memory = compare(probe, probe_model(merged, probe.inputs))
    print(f"merged in memory ({config.model.dtype}): logits differ by {in_memory}")
    return _write(merged, config, prepared, out, card, probe, dtype)


def _export_as_is(
    model: nn.Module,
    config: RunConfig,
    prepared: Prepared,
    run_dir: Path,
    out: Path,
    card: str,
    probe: Probe,
    dtype: str,
) -> Deviation:
    if config.method.whole:
        return _write(model, config, prepared, out, card, probe, dtype)
    account = Account(stored_dtypes(config.method, config.model))
    method = build_method(config, run_dir)
    # a loaded adapter is frozen, so it does not show which parameters were trained
    bare = _recipe(config, prepared, run_dir).build_meta().model
    learned = {name for name, p in bare.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in model.named_parameters() if name in learned}

    def fill(folder: Path) -> None:
        method.export(model, account.record((n, p.data) for n, p in wanted.items()), folder)
        set_adapter_base(folder, name_base(config.model, prepared.model_dir), config.model.revision)
        _accompany(folder, model, config, prepared, card)

    def check(folder: Path) -> Deviation:
        assert is_adapter(folder)
        architecture = architecture_of(config, prepared.facts)
        where = (prepared.model_dir, architecture)
        found = verify(folder, account, model, config.model, *where, probe, exact=config.method.exact)
        tell_both_bases(folder, config.model, *where, probe, found)
        return found

    return publish(out, fill, check, needed_bytes=size_of(wanted.values()))


def _write(
    model: Any, config: RunConfig, prepared: Prepared, out: Path, card: str, probe: Probe, dtype: str
) -> Deviation:
    """Write a full model with `save_pretrained` and verify it against the tensors in memory."""
    for parameter in model.parameters():  # not `model.to`, which would also round the rotary embedding's buffers
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.use_cache = True
    account = Account()
    for _ in account.record(model.named_parameters()):
        pass

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        _accompany(folder, model, config, prepared, card)

    rounded = probe_model(model, probe.inputs)

    def check(folder: Path) -> Deviation:
        loaded = open_export(folder, config.model, prepared.model_dir, architecture_of(config, prepared.facts))
        account.check_files(folder, exact=False)
        account.check_loaded(loaded)
        check_logits(folder, rounded, loaded, "float32")  # both have identical weights in the same dtype
        # The deviation caused by a requested dtype of lower precision is reported, but is not an error.
        is_coarser = dtype != config.model.dtype
        return compare(probe, rounded) if is_coarser else check_logits(folder, probe, loaded, dtype)

    return publish(out, fill, check, needed_bytes=size_of(model.parameters()))


def _accompany(folder: Path, model: nn.Module, config: RunConfig, prepared: Prepared, card: str) -> None:
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    add_companions(folder, model, prepared.model_dir, tokenizer, find_end_token(tokenizer, config.task), card)


def _name(options: ExportOptions) -> str:
    parts = ["model", options.checkpoint, "merged" if options.merge else None, options.dtype]
    return "-".join(part for part in parts if part) if any(parts[1:]) else "model-again"


if __name__ == "__main__":
    sys.exit(run_command(main))
