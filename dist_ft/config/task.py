"""The `task` group: each task has its own keys."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from .strict import Share, Strict, Text

Overlong = Literal["error", "truncate", "drop"]
Unsupervised = Literal["error", "drop"]
Variable = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]*$")]
SHIPPED_TEMPLATES = ("chatml", "llama3_calls", "tools_as_text")  # files of data/render
ChatTemplate = Annotated[
    Text | None,
    Field(description=f"Path of a Jinja file, or {', '.join(SHIPPED_TEMPLATES)}. Defaults to the tokenizer's."),
]
ChatTemplateKwargs = Annotated[
    dict[Variable, Any],
    Field(
        description="Variables of the chat template, such as enable_thinking; the exported template has them as"
        " defaults."
    ),
]
Reasoning = Annotated[
    Literal["require", "keep", "drop", "inline"],
    Field(
        description="Reasoning of supervised turns: require it in the rendering, keep what is rendered of it, drop it"
        " from the rows, or write it inline: in `<think>` tags at the start of the content."
    ),
]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class TaskChoice(Strict):
    """Base of the task configurations."""

    keeps_virtual_tokens: ClassVar[bool] = True  # adapters of virtual tokens save all that the task trains

    @property
    def packs(self) -> bool:
        """Whether several rows of the training split are packed into one sample."""
        return bool(getattr(self, "packing", False))


class CausalLMConfig(TaskChoice):
    """Causal language modeling on text (continued pre-training)."""

    name: Literal["causal_lm"]
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = Field(True, description="Concatenate documents and split them into full blocks of max_length.")
    overlong: Overlong = Field("error", description="Without packing: action for a document longer than max_length.")


class InstructionConfig(TaskChoice):
    """Instruction tuning: the loss covers only the assistant's turns."""

    name: Literal["instruction"]
    max_length: Annotated[int, Field(ge=2)] = 2048
    packing: bool = Field(
        False, description="Pack rows into samples of at most max_length tokens; rows cannot attend to each other."
    )
    overlong: Overlong = Field("error", description="Action for a row longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="Action for a row without a supervised token.")
    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=dict)
    reasoning: Reasoning = "require"
    train_on: Literal["assistant", "last", "all"] | list[Role] = Field(
        "assistant",
        description="Supervised turns: the assistant's, its last one, those of a list of roles, or every token. The"
        " flags `weight`, `loss` and `train` of a message take precedence.",
    )
    train_on_eos: Literal["turn", "last", "none"] = Field(
        "turn", description="End tokens to learn: of each supervised turn, of the last one, or none."
    )
    one_row_per_turn: bool = Field(
        False, description="Train each supervised turn in a sequence of its own, which ends with it."
    )


class MaskedLMConfig(TaskChoice):
    """Masked language modeling (pre-training of encoders)."""

    name: Literal["masked_lm"]
    max_length: Annotated[int, Field(ge=8)] = 512
    packing: bool = Field(True, description="Concatenate texts and split them into full blocks of max_length.")
    overlong: Overlong = Field("error", description="Without packing: action for a text longer than max_length.")
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Fraction of the tokens to predict.")
    whole_word: bool = Field(False, description="Select whole words, with all their tokens, instead of single tokens.")
    new_head: bool = Field(False, description="Initialize a new head, for a model without one. Not for adapters.")


class SequenceClassificationConfig(TaskChoice):
    """Classification of a text or a pair of texts, with one or several labels."""

    name: Literal["sequence_classification"]
    max_length: Annotated[int, Field(ge=2)] = 512
    overlong: Overlong = Field("error", description="Action for a row longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="Action for a row without a label or without text.")
    labels: list[str] | None = Field(
        None, description="Label names in the order of their ids. Defaults to those found in data.train."
    )
    multi_label: bool = Field(False, description="Rows have a list of labels, each a separate binary target.")
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None, description="One weight per label, or `balanced`: inversely proportional to its count in data.train."
    )
    label_smoothing: Share = Field(0.0, description="Fraction of the target spread evenly over all labels.")


class TokenClassificationConfig(TaskChoice):
    """Token classification: one tag per word, such as named entities (IOB tags) or parts of speech."""

    name: Literal["token_classification"]
    max_length: Annotated[int, Field(ge=2)] = 512
    overlong: Overlong = Field(
        "error", description="Action for a row longer than max_length; truncated words count as `O`."
    )
    unsupervised: Unsupervised = Field("error", description="Action for a row without words or with an untagged word.")
    labels: list[str] | None = Field(
        None, description="Label names in the order of their ids. Defaults to those found in data.train."
    )
    label_smoothing: Share = Field(0.0, description="Fraction of the target spread evenly over all labels.")


class Seq2SeqConfig(TaskChoice):
    """Sequence-to-sequence training of an encoder-decoder model."""

    name: Literal["seq2seq"]
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="Maximum number of source tokens.")
    max_target_length: Annotated[int, Field(ge=2)] = Field(128, description="Maximum number of target tokens.")
    overlong: Overlong = Field("error", description="Action for a row with a longer source or target.")
    unsupervised: Unsupervised = Field("error", description="Action for a row without a source or a target.")
    source_prefix: str = Field("", description="Text prepended to every source, such as `summarize: `.")
    metrics: list[Literal["rouge", "bleu", "chrf", "exact_match"]] = Field(
        default_factory=list,
        description="Metrics of texts generated in evaluation; empty: only the loss, no generation.",
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Maximum number of tokens generated in evaluation. Defaults to max_target_length."
    )
    num_beams: Annotated[int, Field(ge=1)] = 1
    label_smoothing: Share = Field(0.0, description="Fraction of the target spread evenly over all tokens.")


class QuestionAnsweringConfig(TaskChoice):
    """Extractive question answering; long contexts are split into overlapping chunks."""

    keeps_virtual_tokens: ClassVar[bool] = False
    name: Literal["question_answering"]
    max_length: Annotated[int, Field(ge=8)] = Field(
        384, description="Maximum number of tokens of a chunk: question, context and special tokens."
    )
    doc_stride: Annotated[int, Field(ge=0)] = Field(128, description="Context tokens that adjacent chunks share.")
    max_answer_length: Annotated[int, Field(ge=1)] = Field(30, description="Maximum number of answer tokens.")
    n_best: Annotated[int, Field(ge=1)] = Field(
        20, description="Number of candidate spans per row over which the scores are normalized."
    )
    unsupervised: Unsupervised = Field("error", description="Action for a row whose answer is not in its context.")
    null_score_diff_threshold: float | None = Field(
        None,
        description="Predict no answer if its score exceeds that of the best span by more than this; if not set, every"
        " question has an answer.",
    )


class PreferenceConfig(TaskChoice):
    """Preference optimization (DPO): raise the probability of chosen over rejected answers; keys are TRL's."""

    name: Literal["preference"]
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="Maximum number of tokens of a prompt and an answer."
    )
    overlong: Overlong = Field("error", description="Action for a pair with a sequence longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="Action for a pair with an empty answer or equal answers.")
    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=dict)
    reasoning: Reasoning = "require"
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = Field(
        "sigmoid", description="`sigmoid` is the loss of the DPO paper."
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Higher values keep the model closer to the initial model; tau of loss_type=ipo."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Assumed fraction of pairs with swapped answers; loss_type=sigmoid becomes cDPO."
    )


class RewardConfig(TaskChoice):
    """Reward modeling: a higher score for the chosen answer of a pair (Bradley and Terry); keys are TRL's."""

    keeps_virtual_tokens: ClassVar[bool] = False
    name: Literal["reward"]
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="Maximum number of tokens of a prompt and an answer."
    )
    overlong: Overlong = Field("error", description="Action for a pair with a sequence longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="Action for a pair with an empty answer or equal answers.")
    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = Field(default_factory=dict)
    reasoning: Reasoning = "require"
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Coefficient of a pair's squared score sum, which keeps scores centered at zero."
    )


TaskConfig = Annotated[
    CausalLMConfig
    | InstructionConfig
    | MaskedLMConfig
    | SequenceClassificationConfig
    | TokenClassificationConfig
    | Seq2SeqConfig
    | QuestionAnsweringConfig
    | PreferenceConfig
    | RewardConfig,
    Field(discriminator="name"),
]
