"""Fingerprints of what a run learns from, kept in its checkpoints: whoever goes on with something else is told.

The fingerprint of the data is that of the tokenized rows and their packing, so that a file may be moved or reformatted.
The weights of the base model are hashed in full, because a sample of their bytes would miss a changed one. That is one
pass over the files that rank 0 is about to load, made by several threads; the digests of large files are remembered in
the cache (`storage/cache.py`), so that only the first start on a machine pays for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..config.plan import Plan
from ..data.read.sets import key_of
from ..data.render.template_file import read_template
from ..data.store.identity import TOKENIZER_FILES
from ..data.store.opened import Split
from ..data.store.repeats import DIGESTS
from ..errors import Problem, RequestError
from ..prepare import Prepared
from ..pretrained.folder import read_json, weight_files
from ..state import Beat, Progress, unwatched
from ..storage.cache import cache_root, hash_of, remembering_digest

LIBRARIES = ("dist-ft", "torch", "transformers", "peft", "deepspeed", "datasets")
CODE = "code"  # differences are told only
KEYS = {"data": "data.train", "base": "model.name_or_path", "tokenizer": "model.tokenizer", "template": "chat template"}
THREADS = 8
ABSENT = "nothing"
SHOWN = 3  # differences of one kind that a message lists
DIGITS = 16
TEMPLATE_FILES = ("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TEMPLATE_KEY = "chat_template"

Fingerprints = Mapping[str, Mapping[str, str]]  # kind → name of a part → its digest, or another text to compare


def take_fingerprints(plan: Plan, prepared: Prepared, tick: Beat = unwatched) -> Fingerprints:
    """Return the fingerprints of a run's training data, base model, tokenizer, chat template and code.

    Args:
        plan: Plan of the run.
        prepared: Its prepared data and models.
        tick: Called for each piece of a file hashed.
    """
    config = plan.config
    digest = remembering_digest(cache_root(config), tick)
    model, tokenizer = Path(prepared.model_dir), Path(prepared.tokenizer_dir)
    base = [model / "config.json", *([] if config.model.from_scratch else weight_files(model))]
    if config.model.trust_remote_code:
        base += sorted(model.glob("*.py"))
    return {
        "data": dict(_of_data(prepared.train, digest)),
        "base": _of_files(base, digest),
        "tokenizer": dict(_of_tokenizer(tokenizer, digest)),
        "template": dict(_of_template(tokenizer, read_template(config.task), digest)),
        CODE: {**versions(), **({"git": plan.git_sha} if plan.git_sha else {})},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def accept_changes(before: Progress, now: Fingerprints, accepted: Collection[str]) -> tuple[Progress, list[str]]:
    """Compare the fingerprints in a checkpoint with those of this start.

    Args:
        before: Progress in the checkpoint.
        now: Fingerprints of this start.
        accepted: Kinds of changes that `train.accept_changes` accepts.

    Returns:
        The progress with the fingerprints of this start and the accepted changes, and a line for the user for each
        difference.

    Raises:
        RequestError: There are changes that are not accepted; the error lists all of them.
    """
    held = before.fingerprints
    found = {kind: text for kind in now if kind in held and (text := _describe(held[kind], now[kind]))}
    code = found.pop(CODE, None)
    problems = [_problem(kind, text, before.step) for kind, text in found.items() if kind not in accepted]
    if problems:
        raise RequestError(*problems)
    changes = tuple(f"{KEYS[kind]} changed after step {before.step}: {text}" for kind, text in found.items())
    told = [f"{change} (accepted by train.accept_changes)" for change in changes]
    if code:
        told.append(f"other versions than at step {before.step}: {code}")
    if not held:
        told.append(f"the checkpoint of step {before.step} has no fingerprints, so changed data would not be noticed")
    return before.with_fingerprints(now, changes), told


def _problem(kind: str, text: str, step: int) -> Problem:
    rule = f"is not what the run was trained with until step {step}: {text}"
    way_out = f"restore it, set run_name to a new name, or set train.accept_changes=[{kind}] to go on with it"
    return Problem(KEYS[kind], rule, way_out)


def _describe(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return which parts differ and how; None if none does."""
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    texts = [f"{name}: {before.get(name, ABSENT)} → {now.get(name, ABSENT)}" for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(texts) + more if names else None


def _of_data(split: Split, digest: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    for name, part in split.parts.items() or {"": split}.items():
        folders = {Path(part.table), Path(part.samples)}
        files = sorted(file for folder in folders for file in folder.glob("*.npy") if file.name != DIGESTS)
        content = hash_of({file.name: digest(file) for file in files})[:DIGITS]
        yield key_of(name, "train"), f"{part.ledger['rows_kept']:,} rows, {part.ledger['tokens']:,} tokens, {content}"


def _of_files(files: list[Path], digest: Callable[[Path], str]) -> dict[str, str]:
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(digest, files)
        return {file.name: value[:DIGITS] for file, value in zip(files, digests, strict=True)}


def _of_tokenizer(folder: Path, digest: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}):
        if any(file.match(pattern) for pattern in TEMPLATE_FILES):
            continue
        settings = read_json(file)[0] if file.name == "tokenizer_config.json" else {}
        if TEMPLATE_KEY in settings:
            yield file.name, hash_of({key: settings[key] for key in settings if key != TEMPLATE_KEY})[:DIGITS]
        else:
            yield file.name, digest(file)[:DIGITS]


def _of_template(folder: Path, given: str | None, digest: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    if given is not None:
        yield "task.chat_template", hashlib.sha256(given.encode()).hexdigest()[:DIGITS]
        return
    for file in sorted({file for pattern in TEMPLATE_FILES for file in folder.glob(pattern)}):
        yield str(file.relative_to(folder)), digest(file)[:DIGITS]
    settings = read_json(folder / "tokenizer_config.json")[0]
    if TEMPLATE_KEY in settings:
        template = json.dumps(settings[TEMPLATE_KEY], sort_keys=True)
        yield "tokenizer_config.json", hashlib.sha256(template.encode()).hexdigest()[:DIGITS]
