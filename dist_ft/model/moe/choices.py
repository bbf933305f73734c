"""Which modules choose experts, observed in a forward of a miniature of the model.

A router is found by what it does: a product with a weight, followed by a choice of the largest of its results. It may
be a linear layer, a module around one, an MLP, or take further arguments. The input is one token in each row, so that
sparse attention, which chooses tokens, has nothing to choose from.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from ...state import RouterForm
from ..miniature import VOCABULARY, build_miniature
from ..reach import lies_in, row_of_text
from .structure import block_of, find_experts, find_routers

ROWS = 8  # tokens of the forward, each in a row of its own
PRODUCTS = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
CHOICES = {torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort}


class Observed(NamedTuple):
    """What a forward shows of a router."""

    weight: str  # name of the matrix that gives the logits
    top_k: int
    form: RouterForm | None
    why_unmeasured: str | None


@dataclass(frozen=True)
class _Question:
    """A model class and its configuration; equal for equal configurations."""

    model_class: type[PreTrainedModel]
    text: str
    settings: PreTrainedConfig = field(compare=False)


@dataclass
class _Product:
    """A product of hidden states with a parameter."""

    module: str  # whose forward computes it
    weight: str
    result: Tensor  # [..., columns]


@dataclass
class _Choice:
    """A choice of the largest results of a product."""

    module: str  # whose forward chooses
    product: _Product
    width: int  # of which it chooses
    indices: Tensor  # [..., top_k]


def observe_routers(model: PreTrainedModel) -> Mapping[str, Observed] | None:
    """Return the routers of a model's class by name; None if no miniature of it can be computed."""
    settings = copy.deepcopy(model.config)
    return _observe(_Question(type(model), settings.to_json_string(use_diff=False), settings))


@functools.lru_cache(maxsize=32)
def _observe(question: _Question) -> Mapping[str, Observed] | None:
    try:
        with torch.device("cpu"):
            args = question.model_class, question.settings, "eager", torch.float32
            model = build_miniature(*args, keep_top_k=True)
            trace = _Trace(model)
            trace.run()
    except Exception:  # a class can fail in any way on a configuration of other sizes
        return None
    blocks = sorted({block_of(name) for name, _ in model.named_modules()} - {""})
    routers: dict[str, _Choice | None] = {_router_of(model, choice): choice for choice in trace.choices.values()}
    for name in find_routers(model, blocks, nested=False):
        if not any(name == other or other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in routers):
            routers[name] = None
    return {name: found for name, choice in routers.items() if (found := _describe(model, trace, name, choice))}


class _Trace(TorchFunctionMode):
    """Records products with parameters, choices among their results, and the outputs of modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.stack: list[str] = []
        self.products: list[_Product] = []
        self.choices: dict[str, _Choice] = {}  # the last one by weight, of those among the most results
        self.outputs: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave(name))

    @torch.no_grad()
    def run(self) -> None:
        """Run the model without its head."""
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        inputs = row_of_text(base, (ROWS, 1))
        ids = torch.arange(1, ROWS + 1)[:, None] % (VOCABULARY - 1)
        inputs = {name: ids if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with self:
            base(**inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and len(args) > 1:
            weight = args[1] if isinstance(args[1], nn.Parameter) else getattr(args[1], "_base", None)
            if (name := self.names.get(id(weight))) is not None:
                self.products.append(_Product(self.stack[-1], name, result.detach().clone()))
        elif func in CHOICES and args[0].is_floating_point() and args[0].dim() > 1 and self.products:
            indices = result if isinstance(result, Tensor) else result[1]
            self._note(args[0].shape[-1], indices.detach())
        return result

    def _note(self, width: int, indices: Tensor) -> None:
        product, before = self.products[-1], self.choices.get(self.products[-1].weight)
        fits = 1 < width <= product.result.shape[-1] and indices.numel() % ROWS == 0
        if fits and (before is None or width >= before.width):
            self.choices[product.weight] = _Choice(self.stack[-1], product, width, indices.reshape(ROWS, -1))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.stack.append(name)

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.stack.pop()
            self.outputs[name] = output

        return leave


def _router_of(model: nn.Module, choice: _Choice) -> str:
    """Return the largest module around the product and the choice that contains no experts."""
    home = choice.module
    while not lies_in(choice.product.module, [home]):
        home = home.rpartition(".")[0]
    if home == choice.product.module:
        return home
    inner = choice.product.module.removeprefix(f"{home}.").split(".")[0]
    block = block_of(home)
    experts = find_experts(model, f"{home}.{inner}", block, 0) if block else None
    return f"{home}.{inner}" if experts and experts.home == home else home


def _describe(model: nn.Module, trace: _Trace, router: str, choice: _Choice | None) -> Observed | None:
    """Find where a router's logits and its choice are; None for a module that chooses something else."""
    inside = [p for p in trace.products if p.weight.startswith(f"{router}.")]
    block = block_of(router)
    if not inside or not block:
        return None
    product = choice.product if choice else inside[-1]
    experts = find_experts(model, router, block, product.result.shape[-1])
    if experts is None:
        return None
    output = trace.outputs.get(router)
    outputs = output if isinstance(output, tuple | list) else (output,)
    chosen_at, chosen = _find_choice(outputs, choice, experts.number)
    top_k = experts.number if chosen is None else chosen.shape[-1]
    logits = product.result.reshape(ROWS, -1)
    known = functools.partial(Observed, product.weight, top_k)
    if choice is not None and choice.width != experts.number:
        return known(None, f"it chooses among {choice.width} and has {experts.number} experts")
    if chosen is None:
        return known(None, "it does not show which experts it chooses")
    logits = logits[:, : experts.number]  # logits of shared experts come last
    if chosen_at is None and not _same_sets(chosen, logits.topk(top_k).indices):
        return known(None, "it does not choose the experts with the largest logits")
    at = next((i for i, value in enumerate(outputs) if _equal(value, logits)), None)
    of = router
    if at is None:
        of = product.module
        if not isinstance(trace.outputs.get(of), Tensor) or not _equal(trace.outputs[of], logits):
            return known(None, "it does not return the logits that it chooses experts by")
    elif not isinstance(output, tuple | list):
        at = None
    return known(RouterForm(of, at, chosen_at, _uses_sigmoid(outputs, logits, chosen)), None)


def _find_choice(outputs: Any, choice: _Choice | None, experts: int) -> tuple[int | None, Tensor | None]:
    """Return the position of the chosen experts in the outputs, if it is there, and the experts `[tokens, top_k]`."""
    for i, value in enumerate(outputs):
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.numel() % ROWS:
            continue
        found = value.reshape(ROWS, -1)
        same = _same_sets(found, choice.indices) if choice else bool((found < experts).all())
        if same:
            return i, found
    return None, choice.indices if choice else None


def _same_sets(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.sort(dim=-1).values, other.sort(dim=-1).values)


def _equal(value: Any, logits: Tensor) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != logits.numel():
        return False
    return torch.allclose(value.reshape(logits.shape).float(), logits, rtol=1e-4, atol=1e-5)


def _uses_sigmoid(outputs: Any, logits: Tensor, chosen: Tensor) -> bool:
    """Return whether the weights of the chosen experts are proportional to the sigmoids of their logits."""
    weights = [v for v in outputs if isinstance(v, Tensor) and v.is_floating_point() and v.numel() == chosen.numel()]
    if not weights or chosen.shape[-1] == 1:
        return False
    found = weights[0].reshape(chosen.shape)

    def fits(scores: Tensor) -> bool:
        expected = scores.gather(1, chosen)
        return torch.allclose(found / found.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True), rtol=1e-3)

    return fits(logits.sigmoid()) and not fits(logits.softmax(dim=-1))
