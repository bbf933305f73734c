"""The `task` group: each task has its own keys."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .strict import Share, Strict

Overlong = Literal["error", "truncate", "drop"]
Unsupervised = Literal["error", "drop"]


class TaskChoice(Strict):
    """What the keys of every task have."""

    keeps_virtual_tokens: ClassVar[bool] = True  # what learns can be stored beside prompt, prefix and P-tuning

    @property
    def packs(self) -> bool:
        """Whether rows of the training split share a sample."""
        return bool(getattr(self, "packing", False))


class CausalLMConfig(TaskChoice):
    """Continued pre-training on text."""

    name: Literal["causal_lm"]
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = Field(True, description="Cut the documents, one after another, into full blocks of max_length.")
    overlong: Overlong = Field(
        "error", description="Without packing: what to do with a document longer than max_length."
    )


class InstructionConfig(TaskChoice):
    """Answers to prompts: loss on the assistant's turns only."""

    name: Literal["instruction"]
    max_length: Annotated[int, Field(ge=2)] = 2048
    packing: bool = Field(False, description="Put several rows into one of at most max_length tokens, kept apart.")
    overlong: Overlong = Field("error", description="A row longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="A row without a supervised token.")
    chat_template: str | None = Field(None, description="A Jinja file, or `chatml`; the tokenizer's own if not given.")


class MaskedLMConfig(TaskChoice):
    """Hidden tokens of text: pre-training of encoders."""

    name: Literal["masked_lm"]
    max_length: Annotated[int, Field(ge=8)] = 512
    packing: bool = Field(True, description="Cut the documents, one after another, into full blocks of max_length.")
    overlong: Overlong = Field("error", description="Without packing: what to do with a text longer than max_length.")
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Share of tokens to predict.")
    whole_word: bool = Field(False, description="Choose words, with all their tokens, and not single tokens.")
    new_head: bool = Field(False, description="The head begins anew; for a folder that has none. Not with adapters.")


class SequenceClassificationConfig(TaskChoice):
    """A label, or several, for a text or a pair of texts."""

    name: Literal["sequence_classification"]
    max_length: Annotated[int, Field(ge=2)] = 512
    overlong: Overlong = Field("error", description="A row longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="A row without a label, or without a text.")
    labels: list[str] | None = Field(
        None, description="Names in the order of their numbers; from data.train if not given."
    )
    multi_label: bool = Field(False, description="Rows have a list of labels, each learned as a yes or no of its own.")
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None, description="`balanced`: rows weigh as their label is rare in data.train; or a weight a label."
    )
    label_smoothing: Share = Field(0.0, description="Share of the target that all labels divide among them.")


class TokenClassificationConfig(TaskChoice):
    """A tag for each word: names of persons and places (IOB tags), parts of speech."""

    name: Literal["token_classification"]
    max_length: Annotated[int, Field(ge=2)] = 512
    overlong: Overlong = Field("error", description="A row longer than max_length; words that are cut count as `O`.")
    unsupervised: Unsupervised = Field("error", description="A row without words, or with a word without a tag.")
    labels: list[str] | None = Field(
        None, description="Names in the order of their numbers; from data.train if not given."
    )
    label_smoothing: Share = Field(0.0, description="Share of the target that all labels divide among them.")


class Seq2SeqConfig(TaskChoice):
    """A text from a text, on an encoder-decoder."""

    name: Literal["seq2seq"]
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="Most tokens of a source.")
    max_target_length: Annotated[int, Field(ge=2)] = Field(128, description="Most tokens of a target.")
    overlong: Overlong = Field("error", description="A row with a longer source or target.")
    unsupervised: Unsupervised = Field("error", description="A row without a source or without a target.")
    source_prefix: str = Field("", description="Put before every source, such as `summarize: `.")
    metrics: list[Literal["rouge", "bleu", "chrf", "exact_match"]] = Field(
        default_factory=list, description="Of texts generated in evaluation; none: loss only, nothing is generated."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most tokens generated in evaluation; max_target_length if not given."
    )
    num_beams: Annotated[int, Field(ge=1)] = 1
    label_smoothing: Share = Field(0.0, description="Share of the target that all tokens divide among them.")


class QuestionAnsweringConfig(TaskChoice):
    """The part of a text that answers a question; long texts are read in overlapping pieces."""

    keeps_virtual_tokens: ClassVar[bool] = False
    name: Literal["question_answering"]
    max_length: Annotated[int, Field(ge=8)] = Field(384, description="Tokens of a piece: question, context, specials.")
    doc_stride: Annotated[int, Field(ge=0)] = Field(
        128, description="Tokens that one piece of a context has of the last."
    )
    max_answer_length: Annotated[int, Field(ge=1)] = Field(30, description="Most tokens of a predicted answer.")
    n_best: Annotated[int, Field(ge=1)] = Field(
        20, description="Spans of a row among which a prediction's score is shared."
    )
    unsupervised: Unsupervised = Field("error", description="A row whose answer does not stand in its context.")
    null_score_diff_threshold: float | None = Field(
        None,
        description="Nothing is the answer where it scores higher than the best span by more than this; if not given,"
        " every question has an answer.",
    )


class PreferenceConfig(TaskChoice):
    """The better of two answers to a prompt is made more probable than the other (DPO); keys are TRL's."""

    name: Literal["preference"]
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="Most tokens of a prompt with an answer.")
    overlong: Overlong = Field("error", description="A pair of which either is longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="A pair with an empty answer, or with equal ones.")
    chat_template: str | None = Field(None, description="A Jinja file, or `chatml`; the tokenizer's own if not given.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = Field("sigmoid", description="sigmoid is DPO's own.")
    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="How dear it is to leave the model as it started; ipo's tau."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of pairs that may be the wrong way round; sigmoid becomes cDPO."
    )


class RewardConfig(TaskChoice):
    """A score for an answer, higher for the better one of a pair (Bradley and Terry); keys are TRL's."""

    keeps_virtual_tokens: ClassVar[bool] = False
    name: Literal["reward"]
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="Most tokens of a prompt with an answer.")
    overlong: Overlong = Field("error", description="A pair of which either is longer than max_length.")
    unsupervised: Unsupervised = Field("error", description="A pair with an empty answer, or with equal ones.")
    chat_template: str | None = Field(None, description="A Jinja file, or `chatml`; the tokenizer's own if not given.")
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Keeps scores about zero: factor of the squared sum of a pair's."
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
