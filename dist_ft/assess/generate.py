"""Answers of a run's model, its base model or both to one prompt, several prompts or a chat.

Predictions of tasks that do not generate free text (labels, tags, spans) are implemented in predict.py.

`python -m dist_ft.assess.generate RUN_YAML [prompt="…"] [prompts=FILE|validation:3] [model=export|base|both]
[max_new_tokens=128] [temperature=0] [top_p=0.9] [system="…"] [chat=true]`. Without a prompt, prompts are read from
standard input as a chat.
"""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from ..config.plan import read_plan
from ..config.run import RunConfig
from ..data.read.sets import SPLITS, SplitName
from ..data.render.special_text import SpecialText
from ..data.render.template import find_end_token
from ..data.render.tokenizer import open_tokenizer
from ..errors import Problem, RequestError
from ..export.opened import find_export, find_trained_run
from ..prepare import Prepared, prepare
from ..process.command import run_command, split_run
from ..process.options import GenerateOptions, read_words
from ..process.place import Place, find_device
from .chat import chat_loop, read_lines
from .predict import PREDICTORS, open_predictors
from .predictor import Asked, Predictor
from .scoring import open_model
from .speaker import STYLES, Speaker
from .turns import Question, read_questions, speaks_chat

Kind = TypeVar("Kind", Question, Asked)


def show_answers(question: Question | Asked, answers: Sequence[tuple[str, str]], console: Console) -> None:
    """Print the prompt and the named answers, wrapped to the width of the console."""
    named = [("prompt", question.text), *answers]
    if question.answer is not None:
        named.append(("data", str(question.answer).strip()))
    width = max(len(name) for name, _ in named) + 2
    for name, text in named:
        lines = [
            line
            for part in (text or "(nothing)").splitlines()
            for line in textwrap.wrap(part, max(20, console.width - width), drop_whitespace=True) or [""]
        ]
        for i, line in enumerate(lines):
            console.print(
                Text(f"{name if i == 0 else '':<{width}}", style="bold") + Text(line, style=STYLES.get(name, ""))
            )
    console.print()


def find_questions(
    options: GenerateOptions, of_text: Callable[[str], Kind], of_split: Callable[[SplitName, int], Iterable[Kind]]
) -> list[Kind]:
    """Return the prompts given by the options; an empty list if they are to be read from standard input.

    Args:
        options: options of the command.
        of_text: converts a prompt to a question.
        of_split: reads the first rows of a split as questions.

    Raises:
        RequestError: If both `prompt` and `prompts` are set, or the file or split does not exist.
    """
    if options.prompt is not None and options.prompts is not None:
        raise RequestError.of("prompts", "cannot be combined with prompt", "set only one of prompt and prompts")
    if options.prompt is not None:
        return [of_text(options.prompt)]
    if options.prompts is None:
        return []
    split, _, count = options.prompts.partition(":")
    if split in SPLITS:
        if count and not (count.isdigit() and int(count) > 0):
            raise RequestError.of(
                f"prompts={options.prompts}", f"{count!r} is not a number of rows", "set e.g. prompts=validation:3"
            )
        return list(of_split(split, int(count or 3)))
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        way_out = "set prompts to a text file with one prompt per line, or to a split such as validation:3"
        raise RequestError.of(f"prompts={options.prompts}", f"cannot be read ({error})", way_out) from error
    return [of_text(line) for line in lines if line.strip()]


def main(arguments: list[str]) -> None:
    """Run `dist-ft generate`: print the answers to the given prompts, or start a chat."""
    run_file, words = split_run(arguments, "assess.generate")
    options = read_words(GenerateOptions, words)
    plan = read_plan(run_file)
    config, run_dir = plan.config, find_trained_run(plan, run_file)
    wanted = ["base", "export"] if options.model == "both" else [options.model]
    folder = find_export(run_dir) if "export" in wanted else None
    prepared = prepare(config)
    tokenizer = open_tokenizer_of(folder, config, prepared)
    chat = speaks_chat(config, tokenizer, prepared.train.ledger["formats"]) if options.chat is None else options.chat
    if chat and not tokenizer.chat_template:
        raise RequestError.of("chat=true", "the tokenizer has no chat template", "set chat=false")
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if config.task.name in PREDICTORS:
        check_options(options, config.task.name)
        most = options.max_new_tokens if "max_new_tokens" in options.model_fields_set else None
        names = {NAMES[which]: which for which in wanted}
        predictors = open_predictors(names, config, prepared, run_dir, tokenizer, chat=chat, max_new_tokens=most)
        first = predictors[0]
        asked = find_questions(options, first.ask, functools.partial(first.read, config))
        for row in asked or map(first.ask, read_lines()):
            show_one(row, predictors, console, alone=options.prompts is None)
        return
    check_sampling(options, chat=chat)
    device, end = find_device(Place()), find_end_token(tokenizer, config.task)
    plain = SpecialText.of(config, tokenizer)
    of_text = functools.partial(Question.of_text, chat=chat, system=options.system)
    questions = find_questions(options, of_text, functools.partial(read_questions, config))
    models = [open_model(which, config, prepared, run_dir, device, padded=True)[0] for which in wanted]
    speakers = [
        Speaker(NAMES[which], model, tokenizer, end, options, plain)
        for which, model in zip(wanted, models, strict=True)
    ]
    if not questions:
        chat_loop(speakers, chat=chat, system=options.system, console=console)
    for question in questions:
        show_one(question, speakers, console, alone=options.prompts is None)


def show_one(question: Any, speakers: Sequence[Speaker | Predictor], console: Console, *, alone: bool) -> None:
    """Print the answers to a question; a single answer to an `alone` question is printed without names."""
    answers = [(speaker.name, speaker.answer(question)) for speaker in speakers]
    if alone and len(answers) == 1:
        print(answers[0][1])
    else:
        show_answers(question, answers, console)


def check_sampling(options: GenerateOptions, *, chat: bool) -> None:
    """Check that `top_p` and `system` have an effect.

    Raises:
        RequestError: If greedy decoding, plain text prompts or rows of the data make them meaningless.
    """
    problems = []
    if options.top_p is not None and not options.temperature:
        problems.append(Problem("top_p", "has no effect with temperature=0", "set temperature=1, or remove it"))
    if options.system is not None and not chat:
        problems.append(Problem("system", "needs the chat template, which is not used", "set chat=true, or remove it"))
    if options.system is not None and (options.prompts or "").partition(":")[0] in SPLITS:
        problems.append(Problem("system", "rows of the data have their own", "remove it, or set prompts=FILE"))
    if problems:
        raise RequestError(*problems)


def check_options(options: GenerateOptions, task: str) -> None:
    """Check that the options are supported by a task that does not generate free text.

    Raises:
        RequestError: If an option has no effect on the task.
    """
    meaningless = {"temperature", "top_p", "system", "seed", "max_new_tokens", "chat"} - MEANINGFUL.get(task, set())
    rule, way_out = f"is not supported with task={task}, which predicts as in an evaluation", "remove it"
    if problems := [Problem(key, rule, way_out) for key in sorted(meaningless & options.model_fields_set)]:
        raise RequestError(*problems)


MEANINGFUL = {"seq2seq": {"max_new_tokens"}, "reward": {"chat"}}
NAMES = {"base": "base", "export": "tuned"}


def open_tokenizer_of(folder: Path | None, config: RunConfig, prepared: Prepared) -> Any:
    """Load the tokenizer from the export in `folder`, which includes the chat template, or else that of the run.

    Raises:
        RequestError: If the run has no tokenizer.
    """
    if folder is not None and (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    if tokenizer is None:
        raise RequestError.of("model.tokenizer", "the run has no tokenizer", "set model.tokenizer")
    return tokenizer


if __name__ == "__main__":
    sys.exit(run_command(main))
