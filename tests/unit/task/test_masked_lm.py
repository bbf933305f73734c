"""Masked language modeling: token selection and masking against counts by hand, and the loss against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from dist_ft.checks.request import check
from dist_ft.config.run import RunConfig
from dist_ft.config.task import MaskedLMConfig
from dist_ft.errors import RequestError
from dist_ft.families import ModelRecipe, architecture_of, build_method, build_task, choose_attention
from dist_ft.model.attention.choice import AttentionChoice
from dist_ft.prepare import Prepared, prepare
from dist_ft.state import Facts, Sample
from dist_ft.task.batches.masks import draw_masks, share_of
from dist_ft.task.masked_lm import WORDS, MaskedLM
from dist_ft.testing import tiny
from tests.samples import SUPPORT_DESK

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
FACTS = Facts(
    pad_id=PAD, mask_id=MASK, special_ids=tuple(range(5)), prefix_ids=(CLS,), suffix_ids=(SEP,), vocabulary=400
)
TEXTS = [m["content"] for line in SUPPORT_DESK.open(encoding="utf-8") for m in json.loads(line)["messages"]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a randomly initialized BERT of 2 layers and a WordPiece tokenizer with 400 tokens."""
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    tiny.save("bert", folder, vocab_size=400)
    return folder


def task(packing: bool = True, seed: int = 0, **keys: Any) -> MaskedLM:
    return MaskedLM(MaskedLMConfig(name="masked_lm", max_length=64, packing=packing, **keys), FACTS, seed=seed)


def sample(index: int, length: int = 60, draw: int = 0) -> Sample:
    """Sample of tokens that are not special, in words of three tokens."""
    ids = np.random.default_rng(index).integers(5, 400, length).astype(np.int32)
    return Sample([{"input_ids": ids, WORDS: (np.arange(length) // 3).astype(np.int32)}], index, draw)


def framed(given: Sample) -> list[int]:
    return [CLS, *(int(token) for segment in given.segments for token in segment["input_ids"]), SEP]


def make_config(folder: Path, tmp_path: Path, texts: list[str], **changes: Any) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    content: dict[str, Any] = {
        "run_name": "t",
        "output_dir": str(tmp_path / "run"),
        "model": {"dtype": "float32", "name_or_path": str(folder)},
        "task": {"name": "masked_lm", "max_length": 32},
        "data": {"train": str(rows), "cache_dir": str(tmp_path / "cache")},
        "method": {"name": "full"},
        "engine": {"name": "ddp"},
        "optim": {},
        "train": {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1},
        "track": {},
        "launch": {"name": "local", "workers_per_node": 1},
    }
    for group, keys in changes.items():
        content[group] = {**content[group], **keys}
    return RunConfig.model_validate(content)


def build(config: RunConfig, prepared: Prepared, *, weights: bool = True) -> Any:
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, torch.device("cpu"), architecture)
    return (
        ModelRecipe(config, prepared.model_dir, attention, architecture, build_method(config))
        .build(weights=weights)
        .model
    )


def test_fifteen_percent_of_which_eighty_ten_and_ten() -> None:
    kinds = {"mask": 0, "other": 0, "same": 0}
    subject = task()
    for index in range(2000):
        given = sample(index)
        batch = subject.collate([given])
        shown, truth = batch.inputs["input_ids"][0].tolist(), framed(given)
        at = batch.positions.tolist()
        assert len(set(at)) == len(at) == 9  # of 60
        assert batch.targets.tolist() == [truth[place] for place in at]
        assert all(shown[place] == truth[place] for place in set(range(62)) - set(at))
        for place in at:
            kinds["mask" if shown[place] == MASK else "same" if shown[place] == truth[place] else "other"] += 1
            assert shown[place] >= MASK
    total = sum(kinds.values())
    # tolerances of six standard deviations for 18,000 draws; a random token equals the original one in 1 of 395 cases
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.018)
    assert kinds["other"] / total == pytest.approx(0.1 * 394 / 395, abs=0.0135)
    assert kinds["same"] / total == pytest.approx(0.1 + 0.1 / 395, abs=0.0135)


def test_every_place_is_chosen_as_often() -> None:
    counts = np.zeros(20)
    for index in range(4000):
        counts[draw_masks(np.arange(20), 0.15, (3, index, 0)).chosen] += 1
    assert counts.sum() == 4000 * 3
    deviation = np.sqrt(4000 * 0.15 * 0.85)
    assert np.abs(counts - 600).max() < 5 * deviation


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 1), (10, 2), (60, 9), (100, 15)])
def test_share(count: int, expected: int) -> None:
    assert share_of(count, 0.15) == expected
    assert len(draw_masks(np.arange(count), 0.15, (0, 0, 0)).chosen) == expected


def test_masks_do_not_depend_on_the_batch_and_change_with_draw_and_seed() -> None:
    subject, given = task(), [sample(0, 60), sample(1, 20), sample(2, 45)]
    together = subject.collate(given)
    for row, alone in enumerate(given):
        single = subject.collate([alone])
        length = len(framed(alone))
        assert together.inputs["input_ids"][row, :length].tolist() == single.inputs["input_ids"][0].tolist()
        assert together.inputs["attention_mask"][row].sum() == length
        mine = together.documents == row
        assert (together.positions[mine] - row * 62).tolist() == single.positions.tolist()
        assert together.targets[mine].tolist() == single.targets.tolist()
    first, again = subject.collate([sample(0)]), task().collate([sample(0)])
    assert first.positions.tolist() == again.positions.tolist()
    others = [subject.collate([sample(0, draw=1)]), task(seed=1).collate([sample(0)])]
    assert all(first.positions.tolist() != other.positions.tolist() for other in others)
    assert others[0].positions.tolist() != others[1].positions.tolist()


def test_whole_words_are_whole_and_words_of_two_documents_are_two() -> None:
    subject, parts = task(whole_word=True), [sample(7, 30).segments[0], sample(8, 30).segments[0]]
    chosen_words = []
    for index in range(200):
        at = subject.collate([Sample(parts, index)]).positions.numpy() - 1
        words = set((at // 3).tolist())
        assert sorted(at.tolist()) == sorted(3 * word + k for word in words for k in range(3))
        assert len(words) == 3  # of 20
        chosen_words.append(words)
    assert any(word < 10 and word + 10 not in words for words in chosen_words for word in words)


def test_special_tokens_are_never_hidden_even_within_a_text() -> None:
    ids = np.array([10, SEP, UNK, 11, MASK, 12], dtype=np.int32)
    segment = {"input_ids": ids, WORDS: np.array([0, 1, 2, 3, 4, -1], dtype=np.int32)}
    seen = {tuple(task(mlm_probability=0.99).collate([Sample([segment], i)]).positions.tolist()) for i in range(50)}
    assert seen == {(1, 4)}
    nothing = task().collate([Sample([{"input_ids": ids[1:3], WORDS: np.array([0, 1])}], 0)])
    assert nothing.supervised == 0


@pytest.mark.parametrize("packing", [True, False])
def test_prepared_rows_have_special_tokens_at_both_ends(bert: Path, tmp_path: Path, packing: bool) -> None:
    config = make_config(bert, tmp_path, [*TEXTS[:40], "  "], task={"packing": packing, "overlong": "truncate"})
    prepared = prepare(config)
    ledger, samples, table = prepared.train.ledger, prepared.train.open_samples(), prepared.train.open_table()
    assert (ledger["rows_read"], ledger["rows_kept"]) == (41, 40)
    subject = build_task(config, prepared.facts, AttentionChoice("sdpa", "sdpa", False, "for a test"))
    total = 0
    for index in range(len(samples)):
        batch = subject.collate([Sample([table.example(*segment) for segment in samples[index]], index)])
        row = batch.inputs["input_ids"][0].tolist()
        assert (row[0], row[-1]) == (CLS, SEP)
        assert not set(row[1:-1]) & {CLS, SEP, PAD}
        assert len(row) == 32 if packing and index < len(samples) - 1 else len(row) <= 32
        total += batch.supervised
    assert total == ledger["supervised_tokens"]


def test_words_are_those_of_the_tokenizer(bert: Path, tmp_path: Path) -> None:
    prepared = prepare(make_config(bert, tmp_path, ["My refundable parcel, please."], task={"packing": False}))
    columns = prepared.train.open_table().columns
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    tokens, words = tokenizer.convert_ids_to_tokens(columns["input_ids"].tolist()), columns[WORDS].tolist()
    assert (words[0], words[-1]) == (-1, -1)
    found: dict[int, str] = {}
    for token, word in list(zip(tokens, words, strict=True))[1:-1]:
        found[word] = found.get(word, "") + token.removeprefix("##")
    assert list(found.values()) == ["my", "refundable", "parcel", ",", "please", "."]


def test_loss_is_that_of_transformers(bert: Path) -> None:
    model = BertForMaskedLM.from_pretrained(bert).eval()
    batch = task().collate([sample(0, 60), sample(1, 33), sample(2, 7)])
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.positions] = batch.targets
    expected = model(**batch.inputs, labels=labels).loss
    result = task().loss(model, batch)
    assert float(result.weight) == int((labels != -100).sum()) == batch.supervised == 9 + 5 + 1
    torch.testing.assert_close(result.loss / result.weight, expected, rtol=1e-6, atol=0.0)
    with torch.no_grad():
        scores = task().score(model, batch)
    right = (model(**batch.inputs).logits.argmax(-1) == labels).sum()
    assert int(scores.counts["correct_tokens"]) == int(right)
    metrics = task().metrics(scores, ())
    assert metrics["perplexity"] == pytest.approx(float(expected.detach().exp()), rel=1e-5)
    empty = task().loss(model, batch.without_targets())
    assert (float(empty.loss), float(empty.weight)) == (0.0, 0.0)
    empty.loss.backward()


def test_a_tokenizer_without_a_mask_token_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no mask token") as caught:
        prepare(make_config(tiny_llama, tmp_path, TEXTS[:3]))
    assert "causal_lm" in caught.value.problems[0].way_out


def test_a_folder_without_a_head_needs_a_new_one(bert: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(bert, encoder)
    torch.manual_seed(1)
    tiny.save("bert", encoder, "AutoModel", vocab_size=400)
    config = make_config(encoder, tmp_path, TEXTS[:5])
    prepared = prepare(config)
    with pytest.raises(RequestError, match="made up at random"):
        build(config, prepared)
    anew = make_config(encoder, tmp_path, TEXTS[:5], task={"new_head": True}, method={"name": "bitfit"})
    model = build(anew, prepared)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"cls.predictions.transform.dense.weight", "cls.predictions.bias"} <= {
        n.split("model.")[-1] for n in learning
    }


@pytest.mark.parametrize("name", ["masked_lm", "causal_lm"])
def test_from_scratch_begins_from_the_seed_alone(name: str, bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "bare", bert if name == "masked_lm" else tiny_llama
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = {"from_scratch": True}
    config = make_config(folder, tmp_path, TEXTS[:20], task={"name": name}, model=model)
    assert check(config) == []
    assert any("safetensors" in p.rule for p in check(make_config(folder, tmp_path, TEXTS[:20], task={"name": name})))
    prepared = prepare(config)
    one, two = build(config, prepared), build(config, prepared)
    other = build(
        make_config(folder, tmp_path, TEXTS[:20], task={"name": name}, model=model, train={"seed": 1}), prepared
    )
    pairs = list(zip(one.state_dict().items(), two.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(mine, again) for (_, mine), again, _ in pairs)
    embeddings, others = one.get_input_embeddings().weight, other.get_input_embeddings().weight
    assert not torch.equal(embeddings, others)
    assert float(embeddings.std()) == pytest.approx(one.config.initializer_range, rel=0.05)
    assert one.get_output_embeddings().weight is embeddings or not one.config.tie_word_embeddings


def test_an_adapter_cannot_hold_a_new_head(bert: Path, tmp_path: Path) -> None:
    config = make_config(bert, tmp_path, TEXTS[:5], task={"new_head": True}, method={"name": "lora"})
    (problem,) = check(config)
    assert problem.where == "task.new_head"
    assert check(make_config(bert, tmp_path, TEXTS[:5], task={"new_head": True})) == []


def test_from_scratch_leaves_nothing_frozen(bert: Path, tmp_path: Path) -> None:
    config = make_config(bert, tmp_path, TEXTS[:5], model={"from_scratch": True}, method={"name": "lora"})
    (problem,) = check(config)
    assert problem.where == "model.from_scratch"
    assert "method=full" in problem.way_out
