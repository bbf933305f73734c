"""Display of rows as the model sees them: all tokens with the supervised tokens marked, and the ledger of the split.

`python -m dist_ft.inspect.rows RUN_YAML [rows=3] [split=train] [width=N]`. On a terminal, supervised tokens are green
and other tokens dim; in other output, supervised tokens are enclosed in [[ ]].
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.text import Text

from ..config.plan import read_plan
from ..config.run import RunConfig
from ..data.read.augment import Augmenter
from ..data.read.chosen import read_numbered
from ..data.read.faults import RowFault
from ..data.read.formats import IGNORED_LABEL
from ..data.read.sets import ALONE, SplitName, sets_of
from ..data.render.tokenizer import load_tokenizer
from ..data.store.encode import Encoder, encode_row
from ..errors import DistFtError, RequestError
from ..prepare import describe_data, find_facts, prepare
from ..pretrained.fetch import prepare_model
from ..process.command import split_run
from ..process.options import RowsOptions, read_words
from ..protocols import Task
from ..state import Example, Facts, Row
from ..task.table import TASKS
from .ledger import ledger_tables

SUPERVISED, CONTEXT, NOTE = "bold green", "dim", "italic yellow"


def show_rows(config: RunConfig, split: SplitName, rows: int, console: Console) -> None:
    """Print the first `rows` rows of a split, or of each set of a mixture, as tokens.

    Raises:
        RequestError: If the split is not set or its rows cannot be read.
    """
    sets = sets_of(config, split)
    if not sets:
        raise RequestError.of(f"data.{split}", "is not set", f"set it, or choose a split other than {split}")
    tokenizer_dir = prepare_model(config)[1]
    encoder = Encoder(config, tokenizer_dir)
    facts = find_facts(config, encoder)
    task = TASKS[config.task.name](config.task, facts, padding_free=True)
    for set_name, alone in sets.items():
        if set_name != ALONE:
            console.print(Text(f"── {set_name} ──\n", style="bold"))
        augmenter, numbered = Augmenter.of(alone, split), read_numbered(alone, split)
        for number, place, row in islice(numbered, rows):
            try:
                name, canonical, sequences = encode_row(alone, task, encoder, row)
            except RowFault as fault:
                console.print(Text(f"── {place}: cannot be used: {fault}\n   → {fault.way_out}\n", style=NOTE))
                continue
            tokenizer = _tokenizer_of_tokens(config, tokenizer_dir) if name == "tokens" else encoder().tokenizer
            copies = augmenter.copies(canonical, number, place) if augmenter else iter(())
            changed = [sequence for copy in copies for sequence in _encode_copy(task, copy, encoder)]
            for at, sequence in enumerate([*sequences, *changed]):
                kind = name if at < len(sequences) else "augmented copy"
                title = f"── {place} ({kind}): {describe_sequence(sequence, facts)}"
                console.print(Text(title, style="bold"))
                targets = find_targets(sequence, list(task.layout.limits)[at % len(task.layout.limits)])
                ids = list(sequence["input_ids"])
                console.print(render_tokens(tokenizer, ids, targets, marked=not console.is_terminal), "")


def _encode_copy(task: Task, copy: Row | None, encoder: Encoder) -> Sequence[Example]:
    """Encode an augmented copy of a row; copies that are left out have no sequences."""
    with contextlib.suppress(RowFault):
        return task.encode(copy, encoder()) if copy is not None else ()
    return ()


def describe_sequence(sequence: Example, facts: Facts) -> str:
    """Describe the length and the targets of a sequence."""
    length = f"{len(sequence['input_ids'])} tokens"
    if "label" in sequence:
        return f"{length}, {', '.join(facts.labels[number] for number in sequence['label']) or 'no label'}"
    if "span" in sequence:
        first, last = sequence["span"]
        return f"{length}, " + (
            "no answer" if [first] == list(sequence["null"]) else f"answer in tokens {first} to {last}"
        )
    if "tags" in sequence:
        return f"{length}, {' '.join(facts.labels[number] for number in sequence['tags'])}"
    if "labels" not in sequence:
        return length
    supervised = sum(label != IGNORED_LABEL for label in sequence["labels"][1:])
    return f"{length}, {supervised} supervised"


def find_targets(sequence: Example, limit: str = "max_length") -> list[bool]:
    """Return whether each token of a sequence is a target.

    Args:
        sequence: Encoded sequence. With labels, the first token is never predicted; of an answer span without labels
            it may be one of its ends.
        limit: Key of the task that limits the sequence; a decoder predicts all tokens of a target.
    """
    size = len(sequence["input_ids"])
    if "labels" in sequence:
        return [i > 0 and label != IGNORED_LABEL for i, label in enumerate(sequence["labels"])]
    first, last = sequence.get("span", (0, -1))
    if [first] == list(sequence.get("null", ())):  # no answer
        last = first - 1
    return [limit == "max_target_length" or first <= i <= last for i in range(size)]


def render_tokens(tokenizer: Any, ids: list[int], targets: list[bool], *, marked: bool) -> Text:
    """Render tokens as text, including special tokens.

    Args:
        tokenizer: transformers tokenizer; None renders token ids.
        ids: token ids of a sequence.
        targets: whether each token is a target.
        marked: whether to enclose supervised text in [[ ]], for output without colors.
    """
    text = Text()
    for is_supervised, group in groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        piece = _decode(tokenizer, [token for token, _ in group])
        shown = f"[[{piece}]]" if marked and is_supervised else piece
        text.append(shown, style=SUPERVISED if is_supervised else CONTEXT)
    return text


def main(arguments: list[str]) -> int:
    """Run `dist-ft data` on the plan given as the first argument, and return the exit code."""
    try:
        run_file, words = split_run(arguments, "inspect.rows")
        options = read_words(RowsOptions, words)
        config = read_plan(run_file).config
        console = Console(width=options.width, soft_wrap=options.width is None, highlight=False)
        show_rows(config, options.split, options.rows, console)
        prepared = prepare(config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
        for table in ledger_tables(config, getattr(prepared, options.split), options.split):
            console.print(table)
        for line in describe_data(config, prepared, options.split):
            console.print(line, soft_wrap=True)
    except DistFtError as error:
        sys.stdout.flush()
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return error.exit_code
    return 0


def _tokenizer_of_tokens(config: RunConfig, folder: str) -> Any:
    """Load the tokenizer for rows of token ids; return None if there is none, because such rows do not need one."""
    try:
        return load_tokenizer(config, folder)
    except RequestError:
        return None


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
