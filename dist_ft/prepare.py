"""Everything that is done once, before any process group exists: conversion of packaged models, tokenising, packing.

`python -m dist_ft.prepare RUN_YAML` does it for a plan; every worker calls `prepare` first, which then finds it done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .data.cache import (
    cache_root,
    find_model,
    find_snapshot,
    is_whole,
    model_folder,
    publish,
    require_room,
    split_folder,
)
from .data.labels import find_labels
from .data.opened import Split
from .data.repeats import describe_shared
from .data.sets import ALONE, name_in_mixture, sets_of
from .data.split import LEDGER, Say, build_split
from .data.splits import SPLITS, SplitName
from .data.template import ChatTokenizer, load_tokenizer
from .errors import DistFtError, Problem, RequestError
from .plan import read_plan
from .schema import RunConfig
from .state import Facts
from .task.causal_lm import CausalLM
from .task.instruction import Instruction
from .task.masked_lm import MaskedLM
from .task.preference import Preference
from .task.question_answering import QuestionAnswering
from .task.reward import Reward
from .task.seq2seq import Seq2Seq
from .task.sequence_classification import SequenceClassification
from .task.token_classification import TokenClassification

TASKS: dict[str, Any] = {
    "causal_lm": CausalLM,
    "instruction": Instruction,
    "masked_lm": MaskedLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "seq2seq": Seq2Seq,
    "question_answering": QuestionAnswering,
    "preference": Preference,
    "reward": Reward,
}

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_CODE = "*.py"


@dataclass(frozen=True)
class NewTokens:
    """The tokens of `model.add_tokens`; see the fields of these names in state.Facts."""

    new_tokens: tuple[str, ...] = ()
    new_token_ids: tuple[int, ...] = ()
    resized_vocabulary: int = 0


@dataclass(frozen=True)
class Prepared:
    """What workers read: folders on this machine."""

    model_dir: str
    tokenizer_dir: str
    train: Split
    validation: Split | None
    test: Split | None
    new_tokens: NewTokens = NewTokens()

    @property
    def facts(self) -> Facts:
        """What the task knows of the data; what is of model and tokenizer is not cached with the data."""
        kept = Facts.of(self.train.ledger["facts"])
        start = _decoder_start(Path(self.model_dir))
        return replace(kept, decoder_start_id=start, tokenizer_dir=self.tokenizer_dir, **asdict(self.new_tokens))

    def describe_shared(self, *names: SplitName) -> Iterator[str]:
        """A line for each split, of `names` or of all, whose scores tell little as its rows stand in data.train too."""
        training = self.train.digests()
        for name in names or SPLITS[1:]:
            split: Split | None = getattr(self, name)
            if split is not None and (line := describe_shared(name, split.digests(), training)):
                yield line


def prepare(config: RunConfig, say: Say = lambda line: None) -> Prepared:
    """Convert, download, tokenise and pack what is not yet in the cache.

    Args:
        config: of the run.
        say: called with a line now and then while it takes long.

    Raises:
        RequestError: model, tokenizer or data are wrong; every problem of a kind at once.
        MachineError: a package is missing, or the cache cannot be written.
    """
    model_dir, tokenizer_dir = prepare_model(config, say)
    _check_tokenizers(config, model_dir, tokenizer_dir)
    new = find_new_tokens(config, model_dir, tokenizer_dir)

    @cache
    def encoder() -> ChatTokenizer:
        return ChatTokenizer(load_tokenizer(config, tokenizer_dir))

    found = cache(lambda: find_facts(config, encoder))  # of all sets; not looked for where everything is prepared
    splits: dict[SplitName, Split] = {"train": _prepare_split(config, "train", found, encoder, say)}
    facts = Prepared(model_dir, tokenizer_dir, splits["train"], None, None, new).facts
    for name in SPLITS[1:]:
        if config.data.has(name):
            splits[name] = _prepare_split(config, name, lambda: facts, encoder, say)
    rows = new.resized_vocabulary or _vocabulary_size(Path(model_dir))
    if problems := [p for name, split in splits.items() for p in _split_problems(config, name, split, rows)]:
        raise RequestError(*problems)
    return Prepared(model_dir, tokenizer_dir, splits["train"], splits.get("validation"), splits.get("test"), new)


def prepare_model(config: RunConfig, say: Say = lambda line: None) -> tuple[str, str]:
    """The folders of the model and of its tokenizer, converted or downloaded if need be.

    Raises:
        RequestError: there is no such model, or the hub does not give it.
        MachineError: a package is missing, or the cache cannot be written.
    """
    model_dir = _local_folder(config, config.model.name_or_path, "model.name_or_path", say)
    if config.model.tokenizer is None:
        return model_dir, model_dir
    return model_dir, _local_folder(config, config.model.tokenizer, "model.tokenizer", say)


def _local_folder(config: RunConfig, name: str, key: str, say: Say) -> str:
    source = find_model(name, key)
    if source.kind == "folder":
        return str(source.path)
    if source.kind == "hub":
        return _download(config, name, key)
    gguf = source.path
    assert gguf is not None
    folder = model_folder(config, source)
    if not is_whole(folder):
        from .model import gguf as gguf_model

        def build(out: Path) -> None:
            require_room(out, gguf.stat().st_size * gguf_model.FLOAT32_OF_GGUF)
            say(f"{key}: converting {gguf.name} to safetensors, once")
            gguf_model.convert(gguf, out)

        publish(folder, build)
    return str(folder)


def _download(config: RunConfig, name: str, key: str) -> str:
    """A hub model's folder, fetched by one process of the node while the others wait."""
    from filelock import FileLock
    from huggingface_hub import snapshot_download

    revision = config.model.revision if key == "model.name_or_path" else None
    root = cache_root(config)
    root.mkdir(parents=True, exist_ok=True)
    patterns = [*_HUB_FILES, _HUB_CODE] if config.model.trust_remote_code else list(_HUB_FILES)
    try:
        with FileLock(root / "download.lock"):
            return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors derive from these
        if (known := find_snapshot(name, revision)) is not None:
            return known
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "see the id, the network and HF_TOKEN, or name a folder that is here"
        raise RequestError.of(key, f"the hub does not give {name} ({reason})", way_out) from error


def find_facts(config: RunConfig, encoder: Callable[[], ChatTokenizer]) -> Facts:
    """What the task needs of the data beyond its rows.

    Raises:
        RequestError: the labels are wrong.
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


def _prepare_split(
    config: RunConfig, name: SplitName, facts: Callable[[], Facts], encoder: Callable[[], ChatTokenizer], say: Say
) -> Split:
    """A split; of a mixture, each of its sets, which are prepared apart and so need not be again in another one."""
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
    encoder: Callable[[], ChatTokenizer],
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


def _split_problems(config: RunConfig, name: str, split: Split, size: int | None) -> list[Problem]:
    """What can be wrong with a sound split for a model of `size` embeddings and this batch size."""
    problems = []
    ledger = split.ledger
    if size is not None and ledger["max_token_id"] >= size:
        rule = (
            f"token id {ledger['max_token_id']} is beyond the model's {size} embeddings: the tokens are another model's"
        )
        problems.append(Problem(f"data.{name}", rule, "use the model's own tokenizer (model.tokenizer)"))
    batch = config.train.global_batch_size
    if name == "train" and ledger["samples"] < batch:
        kind = "rows" if ledger["layout"] == "rows" else "packed rows (blocks)"
        key = "data.mixture" if split.parts else "data.train"
        rule = f"one global batch takes {batch} {kind}, {key} has {ledger['samples']}"
        problems.append(Problem("train.global_batch_size", rule, f"set it to at most {ledger['samples']}"))
    return problems


def find_new_tokens(config: RunConfig, model_dir: str, tokenizer_dir: str) -> NewTokens:
    """What `model.add_tokens` comes to for this model and tokenizer.

    Raises:
        RequestError: the tokenizer has one already, or more tokens than the model even without them.
    """
    if not config.model.add_tokens:
        return NewTokens()
    ids = tuple(load_tokenizer(config, tokenizer_dir).convert_tokens_to_ids(config.model.add_tokens))
    size = _vocabulary_size(Path(model_dir))
    if size is None:
        rule = "config.json does not tell how many embeddings the model has"
        raise RequestError.of("model.add_tokens", rule, "leave it out, or name another model")
    if min(ids) > size:
        rule = f"the tokenizer has {min(ids)} tokens without them, and the model {size} embeddings"
        raise RequestError.of("model.add_tokens", rule, "use the model's own tokenizer (model.tokenizer)")
    return NewTokens(tuple(config.model.add_tokens), ids, max(ids) + 1 if max(ids) >= size else 0)


def _check_tokenizers(config: RunConfig, model_dir: str, tokenizer_dir: str) -> None:
    """A tokenizer given beside the model's own may add tokens, but must agree on those that both have."""
    own, given = (_vocabulary(Path(folder)) for folder in (model_dir, tokenizer_dir))
    if model_dir == tokenizer_dir or not own or not given:
        return
    same = sum(given.get(token) == number for token, number in own.items())
    if same < 0.9 * len(own):
        rule = f"{tokenizer_dir} has the same id for only {same} of the {len(own)} tokens of the model's own tokenizer"
        raise RequestError.of("model.tokenizer", rule, "leave model.tokenizer out, or name the one it was trained with")


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError):
        return {}
    if isinstance(vocabulary, list):  # unigram models list (token, score)
        return {token: number for number, (token, *_) in enumerate(vocabulary)}
    return dict(vocabulary)


def _decoder_start(folder: Path) -> int:
    """Of encoder-decoders; 0, which nothing reads, of other models."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    found = (config.get(name) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((number for number in found if isinstance(number, int)), 0)


def _vocabulary_size(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def main(arguments: list[str]) -> int:
    """Prepare the plan named first; returns the exit code."""
    try:
        if len(arguments) != 1:
            raise RequestError.of("RUN_YAML", "is missing", "python -m dist_ft.prepare runs/NAME/run.yaml")
        prepare(read_plan(arguments[0]).config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    except DistFtError as error:
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
