"""An export of a run that was: from its exported adapter or a checkpoint, as it is or merged into a whole model.

`python -m dist_ft.merge RUN_YAML [merge=true] [checkpoint=step-N|latest|best] [out=DIR] [dtype=bfloat16]`
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import nn

from ..checkpoint import store as checkpoint
from ..checkpoint.reader import SafeReader
from ..config.method import LoraKeys
from ..config.plan import CHECKPOINTS, START_FILE, read_plan
from ..config.run import RunConfig
from ..config.strict import Strict
from ..data.render.template import find_end_token
from ..data.render.tokenizer import open_tokenizer
from ..errors import RequestError
from ..families import architecture_of, build_method, choose_attention, model_factory
from ..method.start import read_start
from ..prepare import Prepared, prepare
from ..process.command import read_words, run_command, split_run
from ..state import ModelFactory
from ..task.table import TASKS
from .account import Account
from .card import card_of_run
from .opened import find_export, find_trained_run, is_adapter, name_base, open_export, set_adapter_base
from .probe import Deviation, Probe, compare, plain_inputs, probe_model, shorten
from .write import (
    add_companions,
    build_bare,
    check_logits,
    inner_layer,
    publish,
    size_of,
    stored_dtypes,
    tell_both_bases,
    ties_embeddings,
    verify,
)


class ExportOptions(Strict):
    """What `dist-ft export` takes."""

    merge: bool = Field(False, description="true puts an adapter's weights into the base's: a whole model")
    checkpoint: str | None = Field(None, description="step-N, latest or best; the run's own export if not given")
    out: str | None = Field(None, description="a folder that is not there yet")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="of a merged or full model")


def main(arguments: Sequence[str]) -> None:
    """Do what `dist-ft export` was asked to, and say how exact the result is.

    Raises:
        RequestError: there is nothing to export, or no new folder to put it in.
        TrainingError: the result does not give the trained model.
    """
    run_file, words = split_run(arguments, "export")
    options = read_words(ExportOptions, words)
    plan = read_plan(run_file)
    config, run_dir = plan.config, find_trained_run(plan, run_file)
    if options.merge and not config.method.mergeable:
        kept = "has no adapter to merge" if config.method.whole else "cannot be put into the base's weights"
        raise RequestError.of("merge", f"method={config.method.name} {kept}", "leave merge out")
    if options.dtype and not config.method.whole and not options.merge:
        raise RequestError.of("dtype", "an adapter stays in the precision it was trained in", "add merge=true")
    out = Path(options.out) if options.out else run_dir / _name(options)
    if out.exists():
        raise RequestError.of(str(out), "is there already", "name a new folder by out=…, or remove it")
    prepared = prepare(config)
    dtype = options.dtype or config.model.dtype
    as_trained = config
    if options.merge:  # in float32, and rounded once, when it is written
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    if options.merge and config.model.quantization != "none":
        # Opened in its own dtype: weights of another would be packed into other bits.
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
    print(f"{out}: {'merged' if options.merge else 'exported'} in {dtype}, loaded again; logits differ by {deviation}")


def _leave_quantization(
    trained: nn.Module, config: RunConfig, prepared: Prepared, run_dir: Path, name: str | None
) -> tuple[RunConfig, nn.Module]:
    """The adapter on the base as it was before quantisation, and by how much that changes the trained model.

    It was trained to the quantised base's errors, which the whole base does not make.
    """
    scheme = config.model.quantization
    config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
    model = open_trained(config, prepared, run_dir, name)
    inputs = _probe_inputs(config, prepared)
    deviation = compare(probe_model(trained, inputs), probe_model(model, inputs))
    print(f"against the dequantised {scheme} base that was trained on: logits differ by {deviation}")
    return config, model


def open_trained(config: RunConfig, prepared: Prepared, run_dir: Path, name: str | None) -> nn.Module:
    """The trained model in this process: the run's export, or its modules with a checkpoint's weights.

    Raises:
        RequestError: there is no such export or checkpoint, or the checkpoint is torn.
    """
    if name is None:
        return open_export(
            find_export(run_dir), config.model, prepared.model_dir, architecture_of(config, prepared.facts)
        )
    path = run_dir / CHECKPOINTS / name
    if not path.is_dir():
        found = ", ".join(sorted(p.name for p in (run_dir / CHECKPOINTS).glob("*"))) or "none"
        raise RequestError.of(f"checkpoint={name}", f"{path} is not there", f"there are: {found}")
    if reason := checkpoint.verify(path.resolve()):
        raise RequestError.of(f"checkpoint={name}", f"{path}: {reason}", "name another checkpoint")
    if isinstance(config.method, LoraKeys) and config.method.moves_base:
        read_start(run_dir / START_FILE)
    model = _factory(config, prepared, run_dir)(True)
    tensors = {f"model/{name}": p.data for name, p in model.named_parameters() if p.requires_grad}
    held = {n for n in SafeReader(path).read_metadata().state_dict_metadata if n.startswith("model/")}
    if held != set(tensors):
        rule = f"holds other tensors than the run's configuration trains ({len(held ^ set(tensors))} differ)"
        raise RequestError.of(str(path), rule, "use the run.yaml that the checkpoint was made with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is a single process
        dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    return model


def _factory(config: RunConfig, prepared: Prepared, run_dir: Path) -> ModelFactory:
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, torch.device("cpu"), architecture)
    return model_factory(config, prepared.model_dir, attention, architecture, build_method(config, run_dir))


def _probe_inputs(config: RunConfig, prepared: Prepared) -> Mapping[str, torch.Tensor]:
    task = TASKS[config.task.name](config.task, prepared.facts, padding_free=False)
    return plain_inputs(task.collate([shorten(prepared.train.first_sample(), task)]))


def merge(model: nn.Module) -> nn.Module:
    """The base with the adapter's weights put into it; embeddings that training has parted are no longer tied."""
    assert isinstance(model, peft.PeftModel)
    tied = ties_embeddings(model.get_base_model())
    if tied:  # merging writes in place, and an adapter of one must not change the other
        head = inner_layer(model.get_base_model().get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are no longer tied, which is seen to below
        merged: Any = model.merge_and_unload(safe_merge=True)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        merged.config.tie_word_embeddings = True  # peft has seen them apart
    elif tied:
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}  # else the head is left out of the files
    assert isinstance(merged, nn.Module)
    return merged


def _export_merged(
    model: nn.Module, config: RunConfig, prepared: Prepared, out: Path, card: str, probe: Probe, dtype: str
) -> Deviation:
    if not isinstance(model, peft.PeftModel):
        raise RequestError.of("merge", "the run's export is no adapter", "leave merge out")
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
    bare = build_bare(
        _factory(config, prepared, run_dir)
    )  # a loaded adapter is frozen and does not tell what was trained
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
    """A whole model by transformers; the account is of the very tensors that are saved."""
    for parameter in model.parameters():  # not `model.to`: it would round the rotary embedding's buffers as well
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
        check_logits(folder, rounded, loaded, "float32")  # the same tensors, the same precision
        # What a coarser dtype costs is told, not judged: it was asked for.
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
