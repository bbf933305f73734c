"""Table of all tasks by name."""

from __future__ import annotations

from typing import Any

from .causal_lm import CausalLM
from .instruction import Instruction
from .masked_lm import MaskedLM
from .preference import Preference
from .question_answering import QuestionAnswering
from .reward import Reward
from .seq2seq import Seq2Seq
from .sequence_classification import SequenceClassification
from .token_classification import TokenClassification

TASKS: dict[str, Any] = {
    "causal_lm": CausalLM,
    "instruction": Instruction,
    "masked_lm": MaskedLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "seq2seq": Seq2Seq,
    "question_answering": QuestionAnswering,
    "preference": Preference,
    "reward": Reward,
}
