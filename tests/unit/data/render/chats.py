"""Chat templates of common model families, and what is supervised of a conversation as a string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render import template_file
from dist_ft.data.render.template import ChatTokenizer

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


QWEN3 = (  # renders a thinking block only in the last answer, even if the block is empty
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set thought = parts[0].split('<think>')[-1].strip('\n') %}"
    "<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ thought if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PLAIN = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)


SPECIAL = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip


CORPUS = ["Hello there, how are you today?", "I am well, thank you.", "What is the capital of France?", "It is Paris."]


CHAT = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "I am well"},
    {"role": "assistant", "content": "It is Paris."},
]


def shipped(name: str) -> str:
    """The text of a template that comes with the package."""
    return Path(template_file.__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(template: str | None, *, eos: str | None = "</s>", adds_bos: bool = False) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def marked(tokenizer: Any, encoded: dict[str, list[int]]) -> str:
    """Decode the tokens, with supervised runs enclosed in ⟦ ⟧."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
    text, previous, run = "", False, []
    for token, label in [*zip(ids, labels, strict=True), (None, IGNORED_LABEL)]:
        supervised = label != IGNORED_LABEL
        if run and (supervised != previous or token is None):
            piece = tokenizer.decode(run)
            text, run = text + (f"⟦{piece}⟧" if previous else piece), []
        run.append(token)
        previous = supervised
    return text


def encode(template: str | None, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = make_tokenizer(template, **options)
    return marked(tokenizer, ChatTokenizer(tokenizer).encode_messages(messages))
