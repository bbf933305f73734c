"""Losses of tokens without their logits: the head and the cross-entropy, chunk by chunk, with recomputation.

Logits of T tokens and a vocabulary of V take 12 T V bytes with their float32 copy and their gradient: 13.6 GiB for
8,192 tokens of 152,000 words. Here, the head of the model returns losses instead of logits while it is asked for them,
so that whatever engines and adapters do around it stays as it is. In the backward, each chunk is computed again, unless
the head is frozen.

Between head and logits, models scale or cap (Granite, Cohere, Gemma). These operations are known by the keys of the
configuration and applied within a chunk; a miniature of the class shows that the losses are the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..state import Batch
from .miniature import VOCABULARY, build_miniature

BYTES_PER_LOGIT = 12  # in bfloat16 with a float32 copy, its softmax and their gradient
CHUNK_BYTES = 256 * 2**20  # of the logits of a chunk
LEAST_ROWS = 128  # of a chunk; fewer would read the head from memory more often than it is computed with
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}  # of losses; another scale or cap gives at least 1e-4

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """An operation between head and logits, and the attribute that switches it off while losses are returned."""

    owner: Any
    name: str
    neutral: Any
    apply: Operation


@dataclass(frozen=True)
class Question:
    """What the head is asked for.

    Attributes:
        targets: Token ids, `[n]`.
        positions: Rows of the hidden states, flattened over batch and sequence, that predict them, `[n]`.
        width: Length of the sequence; a method may have prepended virtual tokens.
        smoothing: Share of the loss that is uniform over the vocabulary (Szegedy et al. 2016).
        judged: Whether to return also if a target is the most probable token.
    """

    targets: Tensor
    positions: Tensor
    width: int
    smoothing: float
    judged: bool


class OutputHead:
    """The head of a language model, which returns losses while it is asked for them.

    Args:
        model: The model of transformers, with its adapters.
        steps: What it does between head and logits.
        rows: Largest number of tokens whose logits exist at a time.
    """

    def __init__(self, model: PreTrainedModel, steps: Sequence[Step], rows: int) -> None:
        self.head: nn.Module = model.get_output_embeddings()
        self.steps = steps
        self.rows = rows
        self.question: Question | None = None
        self.compute: Callable[..., Tensor] = self.head.forward
        self.head.forward = self.answer

    def divides(self, targets: int) -> bool:
        """Return whether the losses of so many targets are computed in chunks.

        A head of several trained parameters always divides: on a rank with fewer targets, their gradients would arrive
        in another order, and ZeRO reduces them in the order of their arrival.
        """
        return targets > self.rows or sum(p.requires_grad for p in self.head.parameters()) > 1

    def token_losses(
        self, model: nn.Module, batch: Batch, *, width: int, smoothing: float = 0.0, judged: bool = False, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each target, `[n]` float32, and if it is the most probable token, `[n]` bool.

        Args:
            model: The model as the engine wraps it.
            batch: A micro-batch.
            width: Length of the sequence that the head sees.
            smoothing: Label smoothing.
            judged: Whether the second tensor is asked for; otherwise it is empty.
            inputs: Further keyword arguments of the model.
        """
        self.question = Question(batch.targets, batch.positions, width, smoothing, judged)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "question", None)
            for step in self.steps:
                stack.callback(setattr, step.owner, step.name, getattr(step.owner, step.name))
                setattr(step.owner, step.name, step.neutral)
            answer: Tensor = model(**batch.inputs, **inputs).logits[0]
        assert answer.shape == (len(batch.targets), 1 + judged), "nothing but the head computes logits"
        return answer[:, 0], answer[:, 1:].flatten().bool()

    def answer(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states `[batch, seq, width]` or, if asked, losses and judgements `[1, n, 1 or 2]`."""
        asked = self.question
        if asked is None:
            return self.compute(hidden)
        rows = hidden[:, -asked.width :].flatten(0, 1)[asked.positions]
        if self.divides(len(rows)):
            learning = [p for p in self.head.parameters() if p.requires_grad]
            losses, right = _InChunks.apply(rows, self, asked, *learning)
        else:
            losses, right = self.losses_of(rows, asked.targets, asked)
        columns = [losses, right.to(losses.dtype)] if asked.judged else [losses]
        return torch.stack(columns, dim=-1)[None]

    def losses_of(self, rows: Tensor, targets: Tensor, asked: Question) -> tuple[Tensor, Tensor]:
        """Return losses and judgements of hidden states `[n, width]`, whose logits exist at the same time."""
        logits = self.compute(rows)
        for step in self.steps:
            logits = step.apply(logits)
        right = logits.detach().argmax(dim=-1) == targets if asked.judged else targets.new_empty(0, dtype=torch.bool)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=asked.smoothing)
        return losses, right


class _InChunks(torch.autograd.Function):
    """Losses of hidden states chunk by chunk.

    If the head is frozen, the forward also computes the gradient of each loss with respect to its hidden state, which
    the backward only scales (as Liger's fused linear cross-entropy does). Otherwise, the backward computes the logits
    of each chunk again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: OutputHead, asked: Question, *learning: Tensor) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.asked, ctx.scales = head, asked, ctx.needs_input_grad[0] and not learning
        losses, right, gradients = [], [], torch.empty_like(rows) if ctx.scales else None
        for first in range(0, len(rows), head.rows):
            here = slice(first, first + head.rows)
            with torch.set_grad_enabled(ctx.scales):
                part = rows[here].detach().requires_grad_(ctx.scales)
                found, judgements = head.losses_of(part, asked.targets[here], asked)
            if gradients is not None:
                (gradients[here],) = torch.autograd.grad(found, part, torch.ones_like(found))
            losses.append(found.detach())
            right.append(judgements)
        ctx.save_for_backward(rows if gradients is None else gradients)
        judged = torch.cat(right)
        ctx.mark_non_differentiable(judged)
        return torch.cat(losses), judged

    @staticmethod
    def backward(ctx: Any, along: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        head, asked, (saved,) = ctx.head, ctx.asked, ctx.saved_tensors
        if ctx.scales:
            return (saved * along[:, None]).to(saved.dtype), None, None
        rows = saved
        learning = [p for p in head.head.parameters() if p.requires_grad]
        # Sums over chunks are kept in float32, as a matrix product over all rows keeps them.
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in learning]
        gradients = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for first in range(0, len(rows), head.rows):
            here = slice(first, first + head.rows)
            with torch.enable_grad():
                part = rows[here].detach().requires_grad_(gradients is not None)
                losses, _ = head.losses_of(part, asked.targets[here], asked)
                wanted = [*learning, *([part] if gradients is not None else [])]
                found = torch.autograd.grad(losses, wanted, along[here], allow_unused=True)
            for total, gradient in zip(sums, found[: len(sums)], strict=True):
                if gradient is not None:
                    total.add_(gradient)
            if gradients is not None:
                gradients[here] = found[-1]
        return gradients, None, None, *sums


def attach_head(model: PreTrainedModel, *, always: bool = False) -> tuple[OutputHead | None, str]:
    """Make the head of a language model return losses when it is asked for them.

    Args:
        model: The model of transformers after its method was applied, inside the wrappers of methods and engines.
        always: Whether to divide also micro-batches of few logits.

    Returns:
        The head, None if the model cannot be computed in this way, and the reason for either in words.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None, f"{type(model).__name__} has no output embeddings"
    if any(isinstance(module, nn.Dropout) and module.p for module in head.modules()):
        return None, "dropout in the head would draw differently when it is computed again"
    order, reason = _prove(model)
    if order is None:
        return None, reason
    vocabulary = int(model.config.get_text_config().vocab_size)
    rows = LEAST_ROWS if always else max(LEAST_ROWS, CHUNK_BYTES // (BYTES_PER_LOGIT * vocabulary))
    found = _steps_of(model)
    reason = f"logits of at most {rows:,} tokens exist at a time, with a vocabulary of {vocabulary:,}"
    return OutputHead(model, [found[i] for i in order], rows), reason


def _prove(model: PreTrainedModel) -> tuple[tuple[int, ...] | None, str]:
    """Return which steps of `_steps_of` are applied in which order, None if the losses would differ, and why."""
    name = type(model).__name__
    ids = torch.randint(1, VOCABULARY - 1, (2, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5) * 2
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    batch = Batch(inputs, ids.flatten()[positions + 1], positions, positions, ids.numel())
    for dtype in TOLERANCES:
        try:
            small = build_miniature(type(model), copy.deepcopy(model.config), "eager", dtype)
            with torch.no_grad():
                small.get_output_embeddings().weight.mul_(16)  # so that caps show
            expected = _plain(small, batch)
            break
        except Exception as error:  # a class can fail in any way on a configuration of other sizes
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            unproven = f"no small {name} could be computed: {first_line}"
    else:
        return None, unproven
    steps = _steps_of(small)
    for order in _orders(steps):
        found = _asked(small, [steps[i] for i in order], batch)
        if found is not None and bool((found - expected).norm() <= TOLERANCES[dtype] * expected.norm()):
            return order, ""
    return None, f"{name} changes logits after its head in a way that is not known"


def _orders(steps: Sequence[Step]) -> Iterator[tuple[int, ...]]:
    """Yield the indices of steps in every order, more steps first; an attribute is used once."""
    for count in range(len(steps), -1, -1):
        for order in itertools.permutations(range(count and len(steps)), count):
            if len({(id(steps[i].owner), steps[i].name) for i in order}) == count:
                yield order


@torch.no_grad()
def _asked(model: PreTrainedModel, steps: Sequence[Step], batch: Batch) -> Tensor | None:
    """Return losses and judgements of the targets, `[2, n]`; None if the model does something else with logits."""
    head = OutputHead(model, steps, rows=2)
    try:
        return torch.stack(head.token_losses(model, batch, width=batch.inputs["input_ids"].shape[1], judged=True))
    except Exception:  # for example, it adds a bias of the vocabulary
        return None
    finally:
        del head.head.forward


@torch.no_grad()
def _plain(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return what `_asked` should return, from logits."""
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
    losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    return torch.stack([losses, logits.argmax(dim=-1) == batch.targets])


def _steps_of(model: PreTrainedModel) -> list[Step]:
    """Return what the model may do between head and logits; division and multiplication by one key are alternatives."""
    text, base = model.config.get_text_config(), getattr(model, model.base_model_prefix, None)
    scales = [
        *(
            (config, name)
            for config in _distinct(model.config, text)
            for name in ("logits_scaling", "output_multiplier")
        ),
        (model, "logit_scale"),
        (base, "lm_head_multiplier"),
    ]
    steps = []
    for owner, name in scales:
        value = getattr(owner, name, None)
        if isinstance(value, int | float) and value != 1:
            steps += [Step(owner, name, 1.0, functools.partial(scale, other=value)) for scale in (torch.div, torch.mul)]
    for owner in (*_distinct(model.config, text), model):
        cap = getattr(owner, "final_logit_softcapping", None)
        if cap:
            steps.append(Step(owner, "final_logit_softcapping", None, functools.partial(_cap, cap=cap)))
    return steps


def _cap(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _distinct(*objects: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for one in objects:
        if id(one) not in seen:
            seen.add(id(one))
            yield one
