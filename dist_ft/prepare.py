"""One-time preparation before any process group exists: model conversion and download, tokenization, packing.

`python -m dist_ft.prepare RUN_YAML` prepares a plan. Every worker also calls `prepare` first, which then only reads the
cache.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from .checks.batch import samples_problems
from .config.plan import Plan, read_plan
from .config.run import RunConfig
from .data.read.folders import describe_left_out
from .data.read.sets import ALONE, SPLITS, SplitName, key_of, name_in_mixture, sets_of
from .data.read.sources import survey
from .data.render.labels import describe_alike, find_labels
from .data.render.tokenizer import NewTokens, check_tokenizers, find_new_tokens
from .data.store.encode import Encoder
from .data.store.identity import split_folder
from .data.store.ledger import describe_files
from .data.store.opened import Split
from .data.store.repeats import describe_shared
from .data.store.split import LEDGER, build_split
from .errors import DistFtError, Problem, RequestError
from .pretrained.fetch import prepare_model
from .pretrained.folder import decoder_start, vocabulary_size
from .state import Facts, Say
from .storage.published import is_whole, publish
from .task.table import TASKS


@dataclass(frozen=True)
class Prepared:
    """Prepared model, tokenizer and splits, in folders on this machine."""

    model_dir: str
    tokenizer_dir: str
    train: Split
    validation: Split | None
    test: Split | None
    new_tokens: NewTokens = field(default_factory=NewTokens)

    @property
    def facts(self) -> Facts:
        """Facts for the task: those cached with the training split, completed with those of the model and tokenizer."""
        kept = Facts.of(self.train.ledger["facts"])
        start = decoder_start(Path(self.model_dir))
        return replace(kept, decoder_start_id=start, tokenizer_dir=self.tokenizer_dir, **asdict(self.new_tokens))

    def describe_shared(self, *names: SplitName) -> Iterator[str]:
        """Yield a warning for each evaluation split, of `names` or of all, with rows that are also in data.train."""
        training = self.train.digests()
        for name in names or SPLITS:
            split: Split | None = getattr(self, name) if name != "train" else None
            if split is not None and (line := describe_shared(name, split.digests(), training)):
                yield line


def describe_data(config: RunConfig, prepared: Prepared, *names: SplitName) -> Iterator[str]:
    """Yield what a user should know of the data of each split, of `names` or of all.

    These are the files that are read of a folder or glob and those beside them that are not, labels that are almost
    the same, and rows that are in several splits.
    """
    for name in names or SPLITS:
        for part, alone in sets_of(config, name).items():
            split: Split | None = getattr(prepared, name)
            own = split.parts.get(part, split) if split is not None else None
            if own is None or alone.data.source_split(name) != name:
                continue
            left_out = survey(alone.data.sources(name) or [], name).left_out
            files = own.ledger.get("files", {})
            if left_out or len(files) > 1:
                line = f"{key_of(part, name)}: {len(files):,} file{'s' * (len(files) != 1)}: {describe_files(files)}"
                yield line + (f"; left out: {describe_left_out(left_out)}" if left_out else "")
    if (alike := describe_alike(prepared.facts.labels)) is not None:
        yield alike
    yield from prepared.describe_shared(*names)


def prepare(config: RunConfig, say: Say = lambda line: None) -> Prepared:
    """Download, convert, tokenize and pack everything that is not in the cache yet.

    Args:
        config: Configuration of the run.
        say: Callback for progress messages.

    Raises:
        RequestError: The model, tokenizer or data is invalid; the error lists all problems of one kind.
        MachineError: A package is missing, or the cache cannot be written.
    """
    model_dir, tokenizer_dir = prepare_model(config, say)
    check_tokenizers(config, model_dir, tokenizer_dir)
    new = find_new_tokens(config, model_dir, tokenizer_dir)
    encoder = Encoder(config, tokenizer_dir)
    found = cache(lambda: find_facts(config, encoder))  # lazy: only computed if a split is not in the cache
    splits: dict[SplitName, Split] = {"train": _prepare_split(config, "train", found, encoder, say)}
    facts = Prepared(model_dir, tokenizer_dir, splits["train"], None, None, new).facts
    for name in SPLITS[1:]:
        if config.data.has(name):
            splits[name] = _prepare_split(config, name, lambda: facts, encoder, say)
    rows = new.resized_vocabulary or vocabulary_size(Path(model_dir))
    if problems := [p for name, split in splits.items() for p in _split_problems(name, split, rows)]:
        raise RequestError(*problems)
    return Prepared(model_dir, tokenizer_dir, splits["train"], splits.get("validation"), splits.get("test"), new)


def prepare_plan(plan: Plan, say: Say = lambda line: None) -> Prepared:
    """Prepare the configuration of a plan, and check that there are enough samples to train with it.

    Raises:
        RequestError: As `prepare`, or the training data has fewer samples than a global batch.
        MachineError: As `prepare`.
    """
    prepared = prepare(plan.config, say)
    ledger = prepared.train.ledger
    kind = "rows" if ledger["layout"] == "rows" else "packed rows (blocks)"
    if problems := samples_problems(plan, ledger["samples"], kind):
        raise RequestError(*problems)
    return prepared


def find_facts(config: RunConfig, encoder: Encoder) -> Facts:
    """Return what the task needs to know about the data and the tokenizer beyond the rows.

    Args:
        config: Configuration of the run.
        encoder: Encoder of the run.

    Raises:
        RequestError: The labels are invalid.
    """
    task = TASKS[config.task.name]
    if not task.uses_facts:
        return Facts()
    labels, counts, rows = find_labels(config, task.labels_of) if hasattr(config.task, "labels") else ((), (), 0)
    tokenizer = encoder().tokenizer
    around = tokenizer("a", return_special_tokens_mask=True)
    inner = [place for place, special in enumerate(around["special_tokens_mask"]) if not special] or [
        len(around["input_ids"])
    ]
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Facts(
        labels=labels,
        label_counts=counts,
        rows=rows,
        pad_id=next(token for token in ends if token is not None),
        mask_id=tokenizer.mask_token_id,
        special_ids=tuple(tokenizer.all_special_ids),
        prefix_ids=tuple(around["input_ids"][: inner[0]]),
        suffix_ids=tuple(around["input_ids"][inner[-1] + 1 :]),
        has_token_types="token_type_ids" in tokenizer.model_input_names,
        vocabulary=len(tokenizer),
    )


def _prepare_split(config: RunConfig, name: SplitName, facts: Callable[[], Facts], encoder: Encoder, say: Say) -> Split:
    """Prepare a split; the datasets of a mixture are prepared separately, so that other mixtures can reuse them."""
    parts: dict[str, Split] = {}
    problems: list[Problem] = []
    for part, alone in sets_of(config, name).items():
        try:
            parts[part] = _prepare_set(config, part, alone, name, facts, encoder, say)
        except RequestError as error:
            if part == ALONE:
                raise
            problems += [replace(p, where=name_in_mixture(p.where, part)) for p in error.problems]
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    return parts[ALONE] if ALONE in parts else Split.of_parts(parts)


def _prepare_set(
    config: RunConfig,
    part: str,
    alone: RunConfig,
    name: SplitName,
    facts: Callable[[], Facts],
    encoder: Encoder,
    say: Say,
) -> Split:
    folder = split_folder(config, name, part)

    def build(out: Path) -> None:
        task = TASKS[config.task.name](config.task, facts(), padding_free=True)
        build_split(alone, name, task, facts(), encoder, out, say)

    if not is_whole(folder):
        publish(folder, build)
    ledger = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    return Split(str(folder), str(folder), ledger)


def _split_problems(name: str, split: Split, size: int | None) -> list[Problem]:
    """Return the problems of a valid split with a model of `size` embeddings."""
    if size is None or split.ledger["max_token_id"] < size:
        return []
    rule = f"token id {split.ledger['max_token_id']} is out of range for a model with {size} embeddings"
    return [Problem(f"data.{name}", rule, "set model.tokenizer to the model's own tokenizer")]


def main(arguments: list[str]) -> int:
    """Prepare the plan whose path is the only argument and return the exit code."""
    try:
        if len(arguments) != 1:
            raise RequestError.of("RUN_YAML", "is missing", "run python -m dist_ft.prepare runs/NAME/run.yaml")
        prepare_plan(read_plan(arguments[0]), lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    except DistFtError as error:
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # the command that started this process reports it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
