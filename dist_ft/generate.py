"""Answers of a run's model, of its base, or of both side by side: one prompt, several, or a chat.

`python -m dist_ft.generate RUN_YAML [prompt="…"] [prompts=FILE|validation:3] [model=export|base|both]
[max_new_tokens=128] [temperature=0] [chat=true]`. Without a prompt it reads them from standard input, and remembers.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import AutoTokenizer

from .comm import Place, find_device
from .errors import RequestError
from .evaluate import open_model
from .exported import find_export, find_trained_run
from .plan import read_plan
from .prepare import Prepared, prepare
from .schema import RunConfig, Strict
from .turns import Question, find_end_token, open_tokenizer, read_questions, speaks_chat
from .words import read_words, run_command, split_run

SPLITS = ("train", "validation", "test")
ANSWERING = ("causal_lm", "instruction", "preference")


class GenerateOptions(Strict):
    """What `dist-ft generate` takes."""

    prompt: str | None = Field(None, description="one prompt; none begins a chat")
    prompts: str | None = Field(None, description="a file with a prompt a line, or SPLIT:N for rows of the run's data")
    model: Literal["export", "base", "both"] = Field("export", description="whose answers")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="most tokens of an answer")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 takes the most probable token")
    chat: bool | None = Field(None, description="through the chat template; as in training if not given")
    seed: int = Field(0, description="of sampling")


class Speaker:
    """A model that answers.

    Args:
        name: shown beside its answers.
        model: of transformers or peft.
        tokenizer: of the run.
        end_token_id: what it was taught to end an answer with.
        options: of generation.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, end_token_id: int | None, options: GenerateOptions
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.ends = sorted({token for token in (end_token_id, tokenizer.eos_token_id) if token is not None})
        self.options = options

    @torch.no_grad()
    def answer(self, question: Question) -> str:
        """The text of the answer.

        Raises:
            RequestError: prompt and answer are longer than the model can take.
        """
        ids = question.encode(self.tokenizer)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self.options.max_new_tokens > limit:
            rule = f"{len(ids)} tokens and {self.options.max_new_tokens} new ones are more than the model's {limit}"
            raise RequestError.of("prompt", rule, "shorten it, or set max_new_tokens")
        device = next(self.model.parameters()).device
        given = torch.tensor([ids], device=device)
        heat = self.options.temperature
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        torch.manual_seed(self.options.seed)
        output = self.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0],
            use_cache=True,
            **({"do_sample": True, "temperature": heat} if heat else greedy),
        )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return text.strip()


def show_answers(question: Question, answers: Sequence[tuple[str, str]], console: Console) -> None:
    """The prompt, and each answer behind its name; all wrapped to the console's width."""
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


STYLES = {"prompt": "", "base": "dim", "export": "green", "tuned": "green", "data": "italic"}


def chat_loop(speakers: Sequence[Speaker], *, chat: bool, console: Console) -> None:
    """Answer lines of standard input until `exit` or its end. Each model remembers its own conversation."""
    histories: dict[str, list[dict[str, Any]]] = {speaker.name: [] for speaker in speakers}
    if sys.stdin.isatty():
        console.print("`exit` ends, `clear` forgets", style="dim")
    while (line := _read_line()) not in (None, "exit", "quit"):
        assert line is not None
        if line == "clear":
            histories = {name: [] for name in histories}
        if line in ("", "clear"):
            continue
        for speaker in speakers:
            history = histories[speaker.name]
            said = [*history, {"role": "user", "content": line}]
            text = speaker.answer(Question(said, line) if chat else Question(None, line))
            if chat:
                histories[speaker.name] = [*said, {"role": "assistant", "content": text}]
            console.print(Text(f"{speaker.name}: ", style="bold") + Text(text, style=STYLES.get(speaker.name, "")))


def find_questions(options: GenerateOptions, config: RunConfig, *, chat: bool) -> list[Question]:
    """The prompts that the options name; none where a chat is wanted.

    Raises:
        RequestError: both kinds are given, or the file or split is not there.
    """
    if options.prompt is not None and options.prompts is not None:
        raise RequestError.of("prompts", "is given beside prompt", "give one of them")
    if options.prompt is not None:
        return [Question.of_text(options.prompt, chat=chat)]
    if options.prompts is None:
        return []
    split, _, count = options.prompts.partition(":")
    if split in SPLITS:
        if count and not (count.isdigit() and int(count) > 0):
            raise RequestError.of(
                f"prompts={options.prompts}", f"{count!r} is no number of rows", "such as validation:3"
            )
        return list(read_questions(config, split, int(count or 3)))  # type: ignore[arg-type]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        way_out = "name a text file with a prompt a line, or a split as validation:3"
        raise RequestError.of(f"prompts={options.prompts}", f"cannot be read ({error})", way_out) from error
    return [Question.of_text(line, chat=chat) for line in lines if line.strip()]


def main(arguments: list[str]) -> None:
    """Answer what the words ask."""
    run_file, words = split_run(arguments, "generate")
    options = read_words(GenerateOptions, words)
    plan = read_plan(run_file)
    config, run_dir = plan.config, find_trained_run(plan, run_file)
    if config.task.name not in ANSWERING:
        way_out = "dist-ft eval run=… writes what the model says of every row"
        raise RequestError.of("run", f"task={config.task.name} gives no text", way_out)
    wanted = ["base", "export"] if options.model == "both" else [options.model]
    folder = find_export(run_dir) if "export" in wanted else None
    prepared = prepare(config)
    tokenizer = open_tokenizer_of(folder, config, prepared)
    chat = speaks_chat(config, tokenizer, prepared.train.ledger["formats"]) if options.chat is None else options.chat
    if chat and not tokenizer.chat_template:
        raise RequestError.of("chat=true", "the tokenizer has no chat template", "set chat=false")
    questions = find_questions(options, config, chat=chat)
    device = find_device(Place())
    end = find_end_token(tokenizer, config.task)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    speakers = []
    for which in wanted:
        model: nn.Module = open_model(which, config, prepared, run_dir, device)[0]
        name = "tuned" if which == "export" else which
        speakers.append(Speaker(name, model, tokenizer, end, options))
    if not questions:
        chat_loop(speakers, chat=chat, console=console)
    elif options.prompt is not None and len(speakers) == 1:
        print(speakers[0].answer(questions[0]))
    else:
        for question in questions:
            show_answers(question, [(speaker.name, speaker.answer(question)) for speaker in speakers], console)


def open_tokenizer_of(folder: Path | None, config: RunConfig, prepared: Prepared) -> Any:
    """The export's own tokenizer, for that is what its users get; it has the run's chat template in it.

    Raises:
        RequestError: the run has none.
    """
    if folder is not None and (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    if tokenizer is None:
        raise RequestError.of("model.tokenizer", "the run has no tokenizer", "set model.tokenizer")
    return tokenizer


def _read_line() -> str | None:
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


if __name__ == "__main__":
    sys.exit(run_command(main))
