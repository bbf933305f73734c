"""The tokens of a long text, which is encoded in windows, are those of the whole text, in less memory."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_ft.data.render import tokens

WORDS = [
    "the",
    "cat",
    "sat",
    "mat",
    "12345",
    "naïve",
    "漢字",
    "🙂",
    "don't",
    "<end>",
    "wörld...",
    "\n\n\t",
    "",
    "indented",
]


def text_of(count: int, seed: int = 0) -> str:
    dice = random.Random(seed)
    return "".join(dice.choice(WORDS) + dice.choice((" ", " ", "\n", "  ", "")) for _ in range(count))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def without_words() -> Tokenizer:
    """As of Llama 2: merges run through the whole text, which starts with a space that it does not have."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


TRAINERS: dict[Any, Any] = {
    byte_level: trainers.BpeTrainer,
    without_words: trainers.BpeTrainer,
    word_pieces: trainers.WordPieceTrainer,
    unigram: trainers.UnigramTrainer,
}


def trained(make: Any) -> Any:
    options = {"vocab_size": 400, "show_progress": False, "special_tokens": ["[UNK]"]}
    if make is unigram:
        options["unk_token"] = "[UNK]"
    tokenizer = make()
    tokenizer.train_from_iterator([text_of(40, seed) for seed in range(20)], TRAINERS[make](**options))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.add_special_tokens({"extra_special_tokens": [AddedToken("<end>", special=True, rstrip=True)]})
    return fast


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "WINDOW", 1024)
    monkeypatch.setattr(tokens, "OVERLAPS", (256, 512))
    monkeypatch.setattr(tokens, "_EQUAL", 128)
    monkeypatch.setattr(tokens, "_LEAST", 8)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("make", TRAINERS)
def test_windows_have_the_tokens_of_the_whole_text(make: Any) -> None:
    tokenizer = trained(make)
    for seed in range(8):
        text = text_of(1500, seed)
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found = tokens._joined(tokenizer, text, 256)
        assert found is not None, "the text is encoded in windows"
        assert found.ids == whole["input_ids"]
        assert [*zip(found.starts, found.stops, strict=True)] == whole["offset_mapping"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("make", TRAINERS)
@pytest.mark.parametrize("stretch", ["a" * 3001, " " * 3001, "ab" * 1501, "🙂" * 3001, "<end>" * 700, "\n" * 2999])
def test_a_text_with_a_stretch_longer_than_an_overlap_has_its_tokens(make: Any, stretch: str) -> None:
    tokenizer = trained(make)
    text = text_of(100) + stretch + text_of(100, seed=1)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = tokens.tokenize(tokenizer, text)
    assert found.ids == whole["input_ids"]
    assert [*zip(found.starts, found.stops, strict=True)] == whole["offset_mapping"]


def test_truncation_and_padding_of_a_tokenizer_are_not_applied() -> None:
    tokenizer = trained(byte_level)
    text = text_of(50)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=4096)
    assert tokens.tokenize(tokenizer, text).ids == expected


MEASURE = """
import sys
from dist_ft.data.render import tokens
from tests.unit.data.render import test_tokens as made

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

tokenizer = made.trained(made.byte_level)
text = made.text_of(500_000)
tokens.tokenize(tokenizer, text[:1000])
before = peak()
tokens.tokenize(tokenizer, text)
print((peak() - before) / len(text))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is read from /proc")
def test_a_long_text_takes_a_fraction_of_the_memory() -> None:
    """In a process of its own: the library needs more than 200 bytes per character of this text."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80
