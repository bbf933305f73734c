"""From text and messages to token ids and labels: loss where the model writes, its end token included, once.

A BOS stands once at the front where the tokenizer adds one to text (a template brings its own). Labels are the ids
where there is loss and -100 elsewhere, unshifted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ...config.task import TaskConfig
from ...errors import RequestError
from ..read.faults import EMPTY_TEXT, RowFault
from ..read.formats import IGNORED_LABEL
from .spans import OWN_TEMPLATE, Closers, Message, Span, find_spans

CONVERSING = ("instruction", "preference", "reward")  # tasks whose rows may be conversations


def find_end_token(tokenizer: Any, task: TaskConfig) -> int | None:
    """The token that training ends an answer with: the template's end of turn, else EOS."""
    if tokenizer is None:
        return None
    if task.name in CONVERSING and tokenizer.chat_template:
        try:
            answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            labels = ChatTokenizer(tokenizer).encode_messages(answered)["labels"]
            return [label for label in labels if label != IGNORED_LABEL][-1]
        except RowFault:  # a template that only takes other conversations
            pass
    end: int | None = tokenizer.eos_token_id
    return end


Encoded = dict[str, list[int]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)


class ChatTokenizer:
    """A tokenizer that knows which tokens are the model's own words.

    Args:
        tokenizer: of transformers; its `chat_template` is used for messages.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = {*added, *tokenizer.all_special_tokens} - {None}
        self.closers = Closers(tuple(sorted(name for name in names if name.strip())), tokenizer.eos_token)
        self.closer_ids = {number for name, number in added.items() if name.strip()} | {self.eos_id} - {None}

    def encode_text(self, text: str) -> Encoded:
        """A document: BOS if the tokenizer adds one, its tokens, EOS if there is one; loss on all of it.

        Raises:
            RowFault: nothing but white space is in it.
        """
        if not text.strip():
            raise RowFault(EMPTY_TEXT, "leave such rows out")
        ids = self._end(self._begin(self._ids(text)))
        return {"input_ids": ids, "labels": list(ids)}

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """Prompt and completion joined without any template; loss on the completion and its EOS.

        The prompt's tokens come first exactly as they are when the model is asked.

        Raises:
            RowFault: the completion is empty, or the tokenizer has no EOS.
        """
        if not completion.strip():
            raise RowFault("the completion is empty", "see where its answer went, or set task.unsupervised=drop")
        if self.eos_id is None:
            raise RowFault("the tokenizer has no EOS token, so where to stop cannot be learned", "give it an eos_token")
        context, both = self._ids(prompt), self._ids(prompt + completion)
        # Tokenised in one piece where that leaves the prompt as it is, in two where a token would span the border.
        answer = both[len(context) :] if both[: len(context)] == context else self._ids(completion)
        context, answer = self._begin(context), self._end(answer)
        return {"input_ids": context + answer, "labels": [IGNORED_LABEL] * len(context) + answer}

    def encode_messages(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, context: int = 0
    ) -> Encoded:
        """A conversation through the chat template; loss on assistant turns with the token that ends each.

        Where the template lets the last turn end without such a token, EOS is appended.

        Args:
            messages: see messages.py.
            tools: descriptions that the template shows to the model.
            context: the first so many messages carry no loss.

        Raises:
            RowFault: there is no assistant turn, or the template cannot show it.
            RequestError: there is no template.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
        if not turns:
            raise RowFault("there is no assistant turn", "see data.format and the roles, or set task.unsupervised=drop")
        if not any(messages[i]["content"].strip() or messages[i].get("tool_calls") for i in turns):
            raise RowFault("the assistant's turns are empty", "see where its words went, or set task.unsupervised=drop")
        render = _Render(self.tokenizer, tools)
        text = render(messages)
        if tools and not all(_tool_name(tool) in text for tool in tools):
            way_out = "set task.chat_template to one that renders tools, such as chatml"
            raise RowFault("the chat template does not show the row's tools", way_out)
        encoded = self._by_marks(render, messages, turns) if context == 0 else None
        if encoded is None:
            encoded = self._by_spans(text, find_spans(render, messages, turns, self.closers))
        return self._once(self._closed(encoded, is_last=turns[-1] == len(messages) - 1))

    def _by_spans(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Tokens of the rendered text, with labels for those that lie in a span."""
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, spans)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        if sum(first == last for first, last in offsets) * 2 > len(ids):  # some converted tokenizers lose them
            return self._by_prefixes(text, spans)
        labels = [IGNORED_LABEL] * len(ids)
        remaining = iter(spans)
        start, stop = next(remaining)
        for i, (first, last) in enumerate(offsets):
            while first >= stop:
                start, stop = next(remaining, (len(text) + 1, len(text) + 1))
            if last > start and (first < last or first > start):
                if text[first : max(first, start)].strip() or text[min(stop, last) : last].strip():
                    raise RowFault("a token spans the border of an assistant turn", OWN_TEMPLATE)
                labels[i] = ids[i]
        return {"input_ids": ids, "labels": labels}

    def _by_prefixes(self, text: str, spans: Sequence[Span]) -> Encoded:
        """The same for a tokenizer that does not say where its tokens stand: those of prefixes must agree."""
        ids = self._ids(text)
        labels = [IGNORED_LABEL] * len(ids)
        for span in spans:
            heads = [self._ids(text[:border]) for border in span]
            if any(ids[: len(head)] != head for head in heads):
                raise RowFault("a token spans the border of an assistant turn", OWN_TEMPLATE)
            first, last = map(len, heads)
            labels[first:last] = ids[first:last]
        return {"input_ids": ids, "labels": labels}

    def _by_marks(self, render: _Render, messages: Sequence[Message], turns: Sequence[int]) -> Encoded | None:
        """Labels by the template's own generation marks; None where it has none that work.

        Marks that leave out a turn's end token are completed with it where prefix difference finds it.
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
                labels[i] = IGNORED_LABEL  # white space behind the end token is the template's
        return {"input_ids": ids, "labels": labels}

    def _closed(self, encoded: Encoded, *, is_last: bool) -> Encoded:
        """See that the last turn ends with a supervised end token; append EOS where the template has none."""
        ids, labels = encoded["input_ids"], encoded["labels"]
        end = max(i for i, label in enumerate(labels) if label != IGNORED_LABEL) + 1
        if ids[end - 1] in self.closer_ids:
            return encoded
        if not is_last or self.eos_id is None:
            why = "and the tokenizer has no EOS" if is_last else "and more messages follow"
            raise RowFault(f"the chat template ends an assistant turn without an end token, {why}", OWN_TEMPLATE)
        while end > 1 and labels[end - 2] != IGNORED_LABEL and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1  # white space before EOS is the template's
        return {"input_ids": [*ids[:end], self.eos_id], "labels": [*labels[:end], self.eos_id]}

    def _once(self, encoded: Encoded) -> Encoded:
        """Without a second BOS at the front, and without EOS behind EOS where there is loss on both."""
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
    """The tokenizer's chat template for rows with certain tools."""

    def __init__(self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.tokenizer = tokenizer
        self.tools = list(tools) if tools else None
        try:
            self.template: str = tokenizer.get_chat_template(None, self.tools)
        except ValueError as error:
            raise RequestError.of(
                "task.chat_template",
                "the tokenizer has no chat template, and the data has messages",
                "set task.chat_template=chatml or a Jinja file, or give prompt and completion as text",
            ) from error

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=generation))

    def with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids and the template's own mask of assistant tokens."""
        if not self.tokenizer.is_fast:
            return [], []
        result = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(result["input_ids"]), list(result["assistant_masks"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, **options)
        except _RENDER_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            way_out = "mend the rows, or set task.chat_template to one that takes them"
            raise RowFault(f"the chat template refuses the row: {reason}", way_out) from error


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
