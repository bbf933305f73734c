"""A model that generates answers, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from ..data.render.special_text import SpecialText
from ..errors import RequestError
from ..process.options import GenerateOptions
from .turns import Question

STYLES = {
    "prompt": "",
    "base": "dim",
    "export": "green",
    "tuned": "green",
    "data": "italic",
}  # by the name of a speaker
Show = Callable[[str], object]


class Stream(TextStreamer):
    """Passes complete words on while they are generated, without white space around the answer.

    Args:
        tokenizer: tokenizer of the model.
        show: receives the words.
    """

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._held = ""  # white space that is only shown if more follows
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of the answer."""
        text = self._held + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._begun = True
            self._show(shown)


class Speaker:
    """Model that generates answers.

    Args:
        name: name shown with the answers.
        model: transformers or PEFT model.
        tokenizer: tokenizer of the run.
        end_token_id: id of the token that ends an answer in training, or None.
        options: generation options.
        special_text: encoder of the prompts that write out special tokens, see data/render/special_text.py.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        end_token_id: int | None,
        options: GenerateOptions,
        special_text: SpecialText | None = None,
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.ends = sorted({token for token in (end_token_id, tokenizer.eos_token_id) if token is not None})
        pads = (tokenizer.pad_token_id, *self.ends, 0)  # a single prompt is never padded
        self.pad_id = next(token for token in pads if token is not None)
        self.options = options
        self.special_text = special_text

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of a prompt and its answer; None if the model has no such limit."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return limit

    def fits(self, question: Question) -> bool:
        """Return whether prompt and answer together are within the limit of the model."""
        length = len(question.encode(self.tokenizer, self.special_text))
        return self.limit is None or length + self.options.max_new_tokens <= self.limit

    @torch.no_grad()
    def answer(self, question: Question, show: Show | None = None) -> str:
        """Generate the answer to a question.

        Args:
            question: prompt for the model.
            show: receives the answer piece by piece while it is generated.

        Raises:
            RequestError: If prompt and answer together exceed the model's maximum length.
        """
        ids = question.encode(self.tokenizer, self.special_text)
        if self.limit is not None and len(ids) + self.options.max_new_tokens > self.limit:
            rule = f"{len(ids)} tokens plus {self.options.max_new_tokens} new ones exceed the model's limit of"
            way_out = "shorten the prompt or set a lower max_new_tokens"
            raise RequestError.of("prompt", f"{rule} {self.limit}", way_out)
        device = next(self.model.parameters()).device
        given = torch.tensor([ids], device=device)
        heat = self.options.temperature
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn: dict[str, Any] = {"do_sample": True, "temperature": heat}
        if self.options.top_p is not None:
            drawn["top_p"] = self.options.top_p
        torch.manual_seed(self.options.seed)
        output = self.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            streamer=None if show is None else Stream(self.tokenizer, show),
            **(drawn if heat else greedy),
        )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return text.strip()
