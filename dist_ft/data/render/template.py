"""Tokenization of text, pairs and conversations; only what the model generates, with one end token, is supervised.

A single BOS token comes first if the tokenizer adds one to text (a chat template renders its own). Labels equal the
token ids at supervised positions and are -100 elsewhere. They are not shifted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from ...config.task import TaskConfig
from ...errors import RequestError
from ..read.faults import EMPTY_TEXT, RowFault
from ..read.formats import IGNORED_LABEL
from .spans import OWN_TEMPLATE, Closers, Message, Span, find_spans

CONVERSING = ("instruction", "preference", "reward")  # tasks that support conversations


def find_end_token(tokenizer: Any, task: TaskConfig) -> int | None:
    """Return the id of the token that ends a training answer: the template's end-of-turn token, or else EOS."""
    if tokenizer is None:
        return None
    if task.name in CONVERSING and tokenizer.chat_template:
        try:
            answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            labels = ChatTokenizer(tokenizer).encode_messages(answered)["labels"]
            return [label for label in labels if label != IGNORED_LABEL][-1]
        except RowFault:  # the template does not support this conversation
            pass
    end: int | None = tokenizer.eos_token_id
    return end


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
    """Return the token ids of messages rendered with the chat template, up to the start of the answer."""
    rendered = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) if tools else None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return list(rendered["input_ids"])


Encoded = dict[str, list[int]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)


class ChatTokenizer:
    """Tokenizer wrapper that encodes rows with labels for the supervised tokens.

    Args:
        tokenizer: A transformers tokenizer, whose `chat_template` is used for messages.
        special_text: Encoder of the conversations that write out special tokens, see special_text.py.
    """

    def __init__(self, tokenizer: Any, special_text: Callable[..., Encoded | None] | None = None) -> None:
        self.tokenizer = tokenizer
        self.special_text = special_text
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = {*added, *tokenizer.all_special_tokens} - {None}
        self.closers = Closers(tuple(sorted(name for name in names if name.strip())), tokenizer.eos_token)
        self.closer_ids = {number for name, number in added.items() if name.strip()} | {self.eos_id} - {None}

    def encode_text(self, text: str) -> Encoded:
        """Encode a document as BOS (if the tokenizer adds one), its tokens and EOS (if any), with loss on all tokens.

        Raises:
            RowFault: The text is empty or only whitespace.
        """
        if not text.strip():
            raise RowFault(EMPTY_TEXT, "remove these rows")
        ids = self._end(self._begin(self._ids(text)))
        return {"input_ids": ids, "labels": list(ids)}

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """Encode a prompt and its completion without a chat template, with loss on the completion and EOS.

        The prompt has the same tokens as in inference.

        Raises:
            RowFault: The completion is empty, or the tokenizer has no EOS token.
        """
        if not completion.strip():
            raise RowFault("the completion is empty", "correct the completion, or set task.unsupervised=drop")
        if self.eos_id is None:
            raise RowFault("the tokenizer has no EOS token, so the model cannot learn to stop", "set its eos_token")
        context, both = self._ids(prompt), self._ids(prompt + completion)
        # Tokenized jointly, unless a token spans the boundary; then separately, to keep the tokens of the prompt.
        answer = both[len(context) :] if both[: len(context)] == context else self._ids(completion)
        context, answer = self._begin(context), self._end(answer)
        return {"input_ids": context + answer, "labels": [IGNORED_LABEL] * len(context) + answer}

    def encode_messages(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, context: int = 0
    ) -> Encoded:
        """Encode a conversation with the chat template, with loss on the assistant turns including their end tokens.

        If the template renders no end token after the last turn, EOS is appended.

        Args:
            messages: Chat messages (see messages.py).
            tools: Tool descriptions for the chat template.
            context: Number of messages at the start that are not supervised.

        Raises:
            RowFault: There is no supervised assistant turn, or the chat template cannot render the conversation.
            RequestError: The tokenizer has no chat template.
        """
        if self.special_text is not None and (encoded := self.special_text(messages, tools, context)) is not None:
            return encoded
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
        if not turns:
            raise RowFault(
                "there is no assistant turn", "correct data.format or the roles, or set task.unsupervised=drop"
            )
        if not any(messages[i]["content"].strip() or messages[i].get("tool_calls") for i in turns):
            raise RowFault("the assistant turns are empty", "correct their content, or set task.unsupervised=drop")
        render = _Render(self.tokenizer, tools)
        text = render(messages)
        if tools and not all(_tool_name(tool) in text for tool in tools):
            way_out = "set task.chat_template to a template that renders tools, such as chatml"
            raise RowFault("the chat template does not render the row's tools", way_out)
        labelled = self._by_marks(render, messages, turns) if context == 0 else None
        if labelled is None:
            labelled = self._by_spans(text, find_spans(render, messages, turns, self.closers))
        return self._once(self._closed(labelled, is_last=turns[-1] == len(messages) - 1))

    def _by_spans(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Tokenize the rendered text and label the tokens inside the spans."""
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, spans)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        if sum(first == last for first, last in offsets) * 2 > len(ids):  # some converted tokenizers have no offsets
            return self._by_prefixes(text, spans)
        labels = [IGNORED_LABEL] * len(ids)
        remaining = iter(spans)
        start, stop = next(remaining)
        for i, (first, last) in enumerate(offsets):
            while first >= stop:
                start, stop = next(remaining, (len(text) + 1, len(text) + 1))
            if last > start and (first < last or first > start):
                if text[first : max(first, start)].strip() or text[min(stop, last) : last].strip():
                    raise RowFault("a token spans the boundary of an assistant turn", OWN_TEMPLATE)
                labels[i] = ids[i]
        return {"input_ids": ids, "labels": labels}

    def _by_prefixes(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Do the same for a tokenizer without offsets, by tokenizing the prefixes that end at the span boundaries."""
        ids = self._ids(text)
        labels = [IGNORED_LABEL] * len(ids)
        for span in spans:
            heads = [self._ids(text[:border]) for border in span]
            if any(ids[: len(head)] != head for head in heads):
                raise RowFault("a token spans the boundary of an assistant turn", OWN_TEMPLATE)
            first, last = map(len, heads)
            labels[first:last] = ids[first:last]
        return {"input_ids": ids, "labels": labels}

    def _by_marks(self, render: _Render, messages: Sequence[Message], turns: Sequence[int]) -> Encoded | None:
        """Label tokens by the template's `{% generation %}` blocks; return None if it has none or they yield no tokens.

        If a block excludes the end token of a turn, the label is added where the prefix difference finds it.
        """
        if not _MARKS.search(render.template):
            return None
        ids, mask = render.with_mask(messages)
        if not any(mask):
            return None
        try:
            ends = self._by_spans(render(messages), find_spans(render, messages, turns, self.closers))["labels"]
        except RowFault:
            ends = [token if token == self.eos_id else IGNORED_LABEL for token in ids]
        labels = [token if marked else IGNORED_LABEL for token, marked in zip(ids, mask, strict=True)]
        for i in range(1, len(ids)):
            is_end = ids[i] in self.closer_ids
            if labels[i] == IGNORED_LABEL:
                left_out = is_end and labels[i - 1] != IGNORED_LABEL and ids[i - 1] not in self.closer_ids
                labels[i] = ends[i] if left_out and len(ends) == len(ids) else IGNORED_LABEL
            elif ids[i - 1] in self.closer_ids and not is_end and not self.tokenizer.decode([ids[i]]).strip():
                labels[i] = IGNORED_LABEL  # whitespace after the end token belongs to the template
        return {"input_ids": ids, "labels": labels}

    def _closed(self, encoded: Encoded, *, is_last: bool) -> Encoded:
        """Ensure that the last supervised turn ends with an end token; append EOS if the template renders none."""
        ids, labels = encoded["input_ids"], encoded["labels"]
        end = max(i for i, label in enumerate(labels) if label != IGNORED_LABEL) + 1
        if ids[end - 1] in self.closer_ids:
            return encoded
        if not is_last or self.eos_id is None:
            why = "and the tokenizer has no EOS token" if is_last else "and more messages follow"
            raise RowFault(f"the chat template renders no end token after an assistant turn, {why}", OWN_TEMPLATE)
        while end > 1 and labels[end - 2] != IGNORED_LABEL and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1  # whitespace before EOS belongs to the template
        return {"input_ids": [*ids[:end], self.eos_id], "labels": [*labels[:end], self.eos_id]}

    def _once(self, encoded: Encoded) -> Encoded:
        """Remove duplicate BOS tokens at the start, and EOS tokens that follow another EOS if both are supervised."""
        ids, labels = encoded["input_ids"], encoded["labels"]
        front = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        kept = [
            i
            for i in range(max(0, front - 1), len(ids))
            if not (i > 0 and ids[i - 1] == ids[i] == self.eos_id == labels[i] == labels[i - 1])
        ]
        return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _end(self, ids: list[int]) -> list[int]:
        return [*ids, self.eos_id] if self.eos_id is not None and ids[-1:] != [self.eos_id] else ids


class _Render:
    """Renderer that applies the tokenizer's chat template with given tools."""

    def __init__(self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.tokenizer = tokenizer
        self.tools = list(tools) if tools else None
        try:
            self.template: str = tokenizer.get_chat_template(None, self.tools)
        except ValueError as error:
            raise RequestError.of(
                "task.chat_template",
                "the tokenizer has no chat template, but the data contains messages",
                "set task.chat_template=chatml or a Jinja file, or use prompt and completion as strings",
            ) from error

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=generation))

    def with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the token ids and the template's own mask of assistant tokens."""
        if not self.tokenizer.is_fast:
            return [], []
        result = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(result["input_ids"]), list(result["assistant_masks"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, **options)
        except _RENDER_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            way_out = "correct the rows, or set task.chat_template to a template that supports them"
            raise RowFault(f"the chat template cannot render the row: {reason}", way_out) from error


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
