"""Tokenization of text, pairs and conversations; only what the model generates, with one end token, is supervised.

A single BOS token comes first if the tokenizer adds one to text (a chat template renders its own). Labels equal the
token ids at supervised positions and are -100 elsewhere. They are not shifted.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ...config.task import TaskConfig
from ..read.faults import EMPTY_TEXT, RowFault
from ..read.formats import IGNORED_LABEL
from .around import PromptFault
from .forms import row_forms, with_text_arguments
from .places import LostReasoning
from .renderer import OWN_TEMPLATE, Message, Renderer, RenderFault, Span
from .spans import Closers
from .supervised import PLAIN, ends_plain_turns, supervised_spans
from .tokens import PlacedTokens, tokenize
from .turns import Supervision, flag_of, without_flags

CONVERSING = ("instruction", "preference", "reward")  # tasks that support conversations


def find_end_token(tokenizer: Any, task: TaskConfig) -> int | None:
    """Return the id of the token that ends a training answer: the template's end-of-turn token, or else EOS."""
    if tokenizer is None:
        return None
    if task.name in CONVERSING and tokenizer.chat_template:
        try:
            labels = ChatTokenizer(tokenizer).encode_messages(PLAIN)["labels"]
            return [label for label in labels if label != IGNORED_LABEL][-1]
        except RowFault:  # the template does not support this conversation
            pass
    end: int | None = tokenizer.eos_token_id
    return end


Encoded = dict[str, list[int]]
Tools = Sequence[Mapping[str, Any]] | None
Tokens = TypeVar("Tokens")


class TextEncoder(Protocol):
    """Encoder of messages in which a user or a tool writes out special tokens (special_text.py)."""

    def encode(
        self,
        messages: Sequence[Message],
        encode: Callable[[ChatTokenizer, Sequence[Message]], Tokens],
        *,
        strict: bool = True,
    ) -> Tokens | None:
        """Return the messages as `encode` encodes them, with special tokens as text; None if there are none."""


class ChatTokenizer:
    """Tokenizer wrapper that encodes rows with labels for the supervised tokens.

    Args:
        tokenizer: A transformers tokenizer, whose `chat_template` is used for messages.
        supervision: What is supervised of conversations.
        special_text: Encoder of messages that write out special tokens, see special_text.py.
    """

    def __init__(
        self, tokenizer: Any, supervision: Supervision | None = None, special_text: TextEncoder | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.supervision = supervision or Supervision()
        self.special_text = special_text
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = {*added, *tokenizer.all_special_tokens} - {None}
        self.closers = Closers(tuple(sorted(name for name in names if name.strip())), tokenizer.eos_token)
        self.end_ids = {number for name, number in added.items() if name in self.closers.ends} | {self.eos_id} - {None}

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

    def encode_turns(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        context: int = 0,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Encoded]:
        """Encode each supervised message as a conversation of its own, which ends with it; see `encode_messages`."""
        if self.special_text is not None:
            rows = self.special_text.encode(messages, lambda chat, m: chat.encode_turns(m, tools, context, variables))
            if rows is not None:
                return rows
        turns, render = self.supervision.choose(messages, context), Renderer(self.tokenizer, tools, variables)
        return [self._encode(render, [*messages[: turn + 1]], [turn]) for turn in turns]

    def encode_messages(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        context: int = 0,
        variables: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Encode a conversation with the chat template, with loss on the assistant turns including their end tokens.

        If the template renders no end token after the last turn, EOS is appended. Which turns and end tokens are
        supervised is set by `supervision` and by the flags of the messages (turns.py).

        Args:
            messages: Chat messages (see messages.py).
            tools: Tool descriptions for the chat template.
            context: Number of messages at the start that are not supervised.
            variables: Variables of the chat template for this row.

        Raises:
            RowFault: There is no supervised assistant turn, or the chat template cannot render the conversation.
            RequestError: The tokenizer has no chat template.
        """
        if self.special_text is not None:
            row = self.special_text.encode(messages, lambda chat, m: chat.encode_messages(m, tools, context, variables))
            if row is not None:
                return row
        turns = self.supervision.choose(messages, context)
        return self._encode(Renderer(self.tokenizer, tools, variables), messages, turns)

    def encode_prompt(
        self, messages: Sequence[Message], tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation with the generation prompt.

        Raises:
            RowFault: The chat template cannot render the conversation.
        """
        if self.special_text is not None:
            encode = self.special_text.encode
            prompt = encode(messages, lambda chat, m: chat.encode_prompt(m, tools, variables), strict=False)
            if prompt is not None:
                return prompt
        render, given = Renderer(self.tokenizer, tools, variables), without_flags(messages)
        try:
            return self._ids(render(given, generation=True))
        except RenderFault:
            if (written := with_text_arguments(given)) is None:
                raise
            return self._ids(render(written, generation=True))

    def variables_of(
        self, messages: Sequence[Message], tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any] | None:
        """Return the variables with which the last message is rendered as an answer: those of its training prompt."""
        try:
            return self._rendered(Renderer(self.tokenizer, tools, variables), messages, [len(messages) - 1])[
                0
            ].variables
        except RowFault:
            return variables

    def _encode(self, render: Renderer, messages: Sequence[Message], turns: Sequence[int]) -> Encoded:
        """Encode a conversation with loss on the messages `turns`, in the first form that is rendered completely."""
        renders, text, spans = self._rendered(render, messages, turns)
        encoded = self._by_spans(text, spans)
        if self.supervision.train_on_eos != "none" and messages[turns[-1]]["role"] == "assistant":
            encoded = self._closed(encoded, renders, is_last=turns[-1] == len(messages) - 1)
        return self._once(encoded)

    def _rendered(
        self, render: Renderer, messages: Sequence[Message], turns: Sequence[int]
    ) -> tuple[Renderer, str, list[Span]]:
        """Return the renderer and the rendering of the first complete form, with its supervised spans."""
        muted = [i for i, message in enumerate(messages) if flag_of(message) is False]
        first: RowFault | None = None
        for renders, form, reasoned in row_forms(render, messages, turns, self.supervision.reasoning):
            try:
                found = supervised_spans(renders, form, turns, muted, reasoned, self.closers, self.supervision)
            except (LostReasoning, PromptFault, RenderFault) as fault:
                first = first or fault
            else:
                return renders, *found
        assert first is not None, "the first form is the row as given"
        raise first

    def _by_spans(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Tokenize the rendered text and label the tokens inside the spans.

        Where a token of the prompt takes the white space behind it (`rstrip`), an answer that starts with white space
        is tokenized on its own, as it is generated.
        """
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, spans)
        tokens = tokenize(self.tokenizer, text)
        if not _has_places(tokens):  # some converted tokenizers have none
            return self._by_prefixes(text, spans)
        ids, starts, stops = tokens.ids, tokens.starts, tokens.stops
        if taken := [start for start in sorted({start for start, _ in spans}) if _is_taken(text, tokens, start)]:
            edges = [0, *taken, len(text)]
            pieces = [
                self._by_spans(text[left:right], [(a - left, b - left) for a, b in spans if left <= a < right])
                for left, right in itertools.pairwise(edges)
            ]
            return {name: [token for piece in pieces for token in piece[name]] for name in ("input_ids", "labels")}
        labels = [IGNORED_LABEL] * len(ids)
        end = 0
        for start, stop in spans:
            last = bisect.bisect_left(starts, stop)
            first = bisect.bisect_right(stops, start, min(bisect.bisect_left(starts, end), last), last)
            before = range(first, bisect.bisect_left(starts, start, first, last))
            behind = range(bisect.bisect_right(stops, stop, first, last), last)
            outside = (*(text[starts[i] : start] for i in before), *(text[stop : stops[i]] for i in behind))
            if any(part.strip() for part in outside):
                raise RowFault("a token spans the boundary of an assistant turn", OWN_TEMPLATE)
            labels[first:last] = ids[first:last]
            end = max(end, stop)
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

    def _closed(self, encoded: Encoded, render: Renderer, *, is_last: bool) -> Encoded:
        """Ensure that the last supervised turn ends with an end token; append EOS if the template renders none."""
        ids, labels = encoded["input_ids"], encoded["labels"]
        end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED_LABEL), 0)
        if end == 0:
            raise RowFault("the rendering has no supervised token", OWN_TEMPLATE)
        if ids[end - 1] == self.eos_id or (ids[end - 1] in self.end_ids and ends_plain_turns(render, self.closers)):
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
        if front <= 1 and not any(ids[i - 1 : i] == [self.eos_id] for i in _places(ids, self.eos_id)):
            return encoded
        kept = [
            i
            for i in range(max(0, front - 1), len(ids))
            if not (i > 0 and ids[i - 1] == ids[i] == self.eos_id == labels[i] == labels[i - 1])
        ]
        return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer.is_fast:
            return tokenize(self.tokenizer, text).ids
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _end(self, ids: list[int]) -> list[int]:
        return [*ids, self.eos_id] if self.eos_id is not None and ids[-1:] != [self.eos_id] else ids


def _places(ids: Sequence[int], token: int | None) -> Iterator[int]:
    """Yield the indices of a token."""
    at = -1
    with contextlib.suppress(ValueError):
        while token is not None:
            at = ids.index(token, at + 1)
            yield at


def _has_places(tokens: PlacedTokens) -> bool:
    """Return whether at most half of the tokens stand for no character, and all are in the order of the text."""
    starts, stops = tokens.starts, tokens.stops
    if isinstance(starts, np.ndarray):
        is_ordered = all(bool((np.diff(places) >= 0).all()) for places in (starts, stops))
        empty = int(np.sum(starts == stops))
    else:  # faster for the few tokens of most rows
        is_ordered = all([*places] == sorted(places) for places in (starts, stops))
        empty = sum(map(operator.eq, starts, stops))
    return is_ordered and empty * 2 <= len(starts)


def _is_taken(text: str, tokens: PlacedTokens, start: int) -> bool:
    """Return whether a token of the text before `start` takes white space at `start`."""
    first, last = bisect.bisect_right(tokens.stops, start), bisect.bisect_left(tokens.starts, start)
    inside = [(tokens.starts[i], tokens.stops[i]) for i in range(first, last)]
    return any(text[left:start].strip() and not text[start:right].strip() for left, right in inside)
