"""What all tests share: quiet single-threaded libraries that reach for no network, and a tiny model."""

from __future__ import annotations

import os

# before torch, transformers or wandb are imported, and for every process that a test starts
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
)
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
for name in (*GROUP, "SLURM_PROCID", "WANDB_API_KEY"):
    os.environ.pop(name, None)

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "dist_ft" / "data" / "support_desk" / "train.jsonl"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def left_groups() -> Iterator[None]:
    """What a joined group of workers leaves in the environment would make other libraries join one too."""
    yield
    for name in GROUP:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Small real data sets beside the checkout; tests that need them are skipped without."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no folder ../shared/data with the small data sets")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 512 tokens, trained on the support desk, with a ChatML template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [m["content"] for line in CORPUS.open(encoding="utf-8") for m in json.loads(line)["messages"]]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder with a Llama of 2 layers, width 32, random weights (seed 0) in safetensors, and `tiny_tokenizer`."""
    import torch

    from dist_ft.testing import tiny

    folder = tmp_path_factory.mktemp("tiny_llama")
    sizes = {"vocab_size": 512, "intermediate_size": 64, "max_position_embeddings": 512}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        tiny.save("llama", folder, **sizes, **tokens, tie_word_embeddings=True)
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    return folder
