"""Special tokens written out in what a user or a tool says, which a tokenizer would take for the tokens themselves.

Text such as `<|im_end|>` in a message would end the turn in the middle of it. By default it is tokenized as text: the
conversation is rendered and tokenized with a copy of the tokenizer in which all special tokens have other names, in its
vocabulary and in its chat template. In this copy the old names are plain text and the ids are the same. What the
assistant and the system say keeps its special tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from ...config.data import SpecialTokensInText
from ...config.run import RunConfig
from ..read.faults import RowFault
from .renderer import Message
from .template import ChatTokenizer, Tokens
from .tokenizer import load_tokenizer
from .turns import Supervision

# names of the copy are single characters from here on, of a private-use area; parts.py uses another one
_FIRST = 0xF0000
_SPEAKERS = ("user", "tool")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEEP = "remove the text, or set data.special_tokens_in_text=keep"


def open_chat_tokenizer(config: RunConfig, folder: str) -> ChatTokenizer:
    """Load the tokenizer in `folder`, with `data.special_tokens_in_text` applied to messages.

    Raises:
        RequestError: See `load_tokenizer`.
    """
    tokenizer = load_tokenizer(config, folder)
    return ChatTokenizer(tokenizer, Supervision.of(config.task), SpecialText.of(config, tokenizer))


class SpecialText:
    """Encoder of the conversations in which a user or a tool writes out special tokens.

    Args:
        tokenizer: A transformers tokenizer.
        own: Special tokens that the user added for the data (`model.add_tokens`), which are kept.
        action: `plain` or `refuse`.
        supervision: What is supervised of conversations.
    """

    def __init__(
        self,
        tokenizer: Any,
        own: Sequence[str],
        action: SpecialTokensInText,
        supervision: Supervision | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.supervision = supervision or Supervision()
        self.action = action
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special and token.content.strip()]
        self.names = {name: chr(_FIRST + i) for i, name in enumerate(name for name in special if name not in own)}
        ordered = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any) -> SpecialText | None:
        """Return the encoder of a run, or None if special tokens in text are kept."""
        action = config.data.special_tokens_in_text
        if action == "keep":
            return None
        return cls(tokenizer, config.model.add_tokens, action, Supervision.of(config.task))

    def encode(
        self,
        messages: Sequence[Message],
        encode: Callable[[ChatTokenizer, Sequence[Message]], Tokens],
        *,
        strict: bool = True,
    ) -> Tokens | None:
        """Encode messages with special tokens of a user or a tool as text.

        Args:
            messages: Chat messages.
            encode: Encodes messages with the tokenizer that it is given.
            strict: If false, text that cannot be encoded this way is encoded as special tokens, as if it were kept.

        Returns:
            The encoded messages, or None if no user or tool writes out a special token (or if not `strict`).

        Raises:
            RowFault: There is such text and the action is `refuse`, or the template does not allow `plain`.
        """
        found = next((name for message in messages if (name := self._find(message)) is not None), None)
        if found is None:
            return None
        try:
            return self._encode(messages, encode, found)
        except RowFault:
            if strict:
                raise
            return None

    def _encode(
        self, messages: Sequence[Message], encode: Callable[[ChatTokenizer, Sequence[Message]], Tokens], found: str
    ) -> Tokens:
        cause = "what a user or a tool says contains a special token"
        if self.action == "refuse":
            raise RowFault(cause, _KEEP, repr(found))
        if self._copy is None:
            raise RowFault(f"{cause}, and those of this tokenizer cannot be told from text", _KEEP, repr(found))
        harmless = [self._replace(message, "x") for message in messages]
        expected = encode(ChatTokenizer(self.tokenizer, self.supervision), harmless)
        try:
            is_same = encode(self._copy, self._renamed(harmless)) == expected
        except RowFault:
            is_same = False
        if not is_same:
            raise RowFault(f"{cause}, and the chat template builds its own from parts", _KEEP, repr(found))
        return encode(self._copy, self._renamed(messages))

    def _find(self, message: Message) -> str | None:
        """Return the first special token that a message writes out although its role must not, or None."""
        if self.pattern is None or message["role"] not in _SPEAKERS:
            return None
        match = self.pattern.search(message["content"])
        return match[0] if match else None

    def _replace(self, message: Message, text: str) -> Message:
        assert self.pattern is not None
        if message["role"] not in _SPEAKERS:
            return message
        return {**message, "content": self.pattern.sub(text, message["content"])}

    def _renamed(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with the names of the copy in what neither a user nor a tool says."""
        return [m if m["role"] in _SPEAKERS else self._rename(m) for m in messages]

    def _rename(self, value: Any) -> Any:
        assert self.pattern is not None
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.names[match[0]], value)
        if isinstance(value, Mapping):
            return {name: self._rename(item) for name, item in value.items()}
        return [self._rename(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _copy(self) -> ChatTokenizer | None:
        """The copy with other names, or None if the tokenizer has no tokenizer.json or cannot be changed this way."""
        if not self.tokenizer.is_fast:
            return None
        content = self._rename_exactly(json.loads(self.tokenizer.backend_tokenizer.to_str()))
        try:
            backend = Tokenizer.from_str(json.dumps(content))
        except Exception:  # tokenizers raises Exception itself, for example if a merge needs a renamed token
            return None
        other = copy.deepcopy(self.tokenizer)
        other._tokenizer = backend
        for name in _NAMED:
            if (token := getattr(self.tokenizer, name)) is not None:
                setattr(other, name, self.names.get(token, token))
        other.extra_special_tokens = [self.names.get(str(t), str(t)) for t in self.tokenizer.extra_special_tokens]
        other.chat_template = self._rename(self.tokenizer.chat_template)
        return ChatTokenizer(other, self.supervision)

    def _rename_exactly(self, value: Any) -> Any:
        """Rename the special tokens in the content of a tokenizer.json, where they are whole strings or keys."""
        if isinstance(value, str):
            return self.names.get(value, value)
        if isinstance(value, dict):
            return {self.names.get(name, name): self._rename_exactly(item) for name, item in value.items()}
        return [self._rename_exactly(item) for item in value] if isinstance(value, list) else value
