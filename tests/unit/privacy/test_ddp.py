"""Differential privacy against plain loops over single rows, Opacus's own accountant, and what chance must give."""

from __future__ import annotations

import math
import stat
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional

from dist_ft.build import build_privacy
from dist_ft.checks.request import check
from dist_ft.config.method import LoraConfig
from dist_ft.config.plan import SEED_FILE
from dist_ft.config.privacy import PrivacyConfig
from dist_ft.config.task import Seq2SeqConfig, SequenceClassificationConfig
from dist_ft.data.order.deal import deal
from dist_ft.data.order.order import PoissonOrder
from dist_ft.errors import RequestError
from dist_ft.launch.compose import compose
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.privacy.ddp import Private
from dist_ft.privacy.mechanism import Privacy, agree_on_privacy, settle_seed
from dist_ft.process.place import Place
from dist_ft.state import Batch, BuiltModel, Facts, Sample
from dist_ft.task.batches.tokens import collate_padded, sum_losses
from dist_ft.task.seq2seq import Seq2Seq
from dist_ft.task.sequence_classification import SequenceClassification

CPU = torch.device("cpu")
SIZE = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZE, "intermediate_size": 24, "max_position_embeddings": 32}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
CLIP = 0.4
LENGTHS = (9, 3, 12, 5, 5, 7, 2)

# kind of model, its task, whether Opacus's hooks are right for it
MODELS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("LlamaForCausalLM", {**WIDE, "num_key_value_heads": 1, "tie_word_embeddings": False}, "causal", True),
    "llama-tied": ("LlamaForCausalLM", {**WIDE, "num_key_value_heads": 1, "tie_word_embeddings": True}, "causal", True),
    "gpt2-tied": ("GPT2LMHeadModel", GPT2, "causal", True),
    "bert": ("BertForSequenceClassification", {**WIDE, **DRY, "num_labels": 3}, "classes", True),
    "gpt2": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3, "pad_token_id": 0}, "classes", True),
    "t5": ("T5ForConditionalGeneration", T5, "seq2seq", False),  # relative positions are looked up once for all rows
}


def make_model(name: str, method: str = "full") -> nn.Module:
    kind, settings, _, _ = MODELS[name]
    config_kind = kind.split("For")[0].replace("LMHeadModel", "") + "Config"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config_kind)(**settings))
    if method == "full":
        return model
    head = ["score"] if kind == "GPT2ForSequenceClassification" else []
    adapted = Lora(LoraConfig(name="lora", r=3)).apply(find_anatomy(model, task_head=head))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # they start at zero, where A has no gradient
            nn.init.normal_(parameter, std=0.2)
    return adapted


def make_segments(task: str) -> list[list[dict[str, np.ndarray]]]:
    dice = np.random.default_rng(5)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = dice.integers(1, 61, length)
        if task == "causal":
            labels = ids.copy()
            labels[: i % length] = -100
            rows.append([{"input_ids": ids, "labels": labels}])
        elif task == "classes":
            rows.append([{"input_ids": ids, "label": np.array([i % 3])}])
        else:  # sources and targets whose padded widths are the same
            rows.append([{"input_ids": ids}, {"input_ids": dice.integers(1, 61, LENGTHS[-1 - i])}])
    return rows


def make_task(task: str) -> tuple[Any, Any]:
    """Collate and loss."""
    if task == "causal":
        return collate_padded, sum_losses
    if task == "classes":
        facts = Facts(labels=("a", "b", "c"))
        subject: Any = SequenceClassification(SequenceClassificationConfig(name="sequence_classification"), facts)
    else:
        subject = Seq2Seq(Seq2SeqConfig(name="seq2seq"), Facts())
    return subject.collate, subject.loss


def own_loss(model: nn.Module, task: str, row: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """The mean loss of one row that is alone, in transformers' own words."""
    ids = torch.from_numpy(row[0]["input_ids"])[None]
    if task == "causal":
        return model(input_ids=ids, labels=torch.from_numpy(row[0]["labels"])[None]).loss
    if task == "classes":
        return functional.cross_entropy(model(input_ids=ids).logits, torch.from_numpy(row[0]["label"]))
    return model(input_ids=ids, labels=torch.from_numpy(row[1]["input_ids"])[None]).loss


def clipped_sum(model: nn.Module, task: str, clip: float = CLIP) -> tuple[list[torch.Tensor], list[float]]:
    """Abadi et al. 2016, algorithm 1, lines 3 to 5 without noise, one row after another; and the rows' norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, norms = [torch.zeros_like(p) for p in parameters], []
    for row in make_segments(task):
        gradients = torch.autograd.grad(own_loss(model, task, row), parameters, allow_unused=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        norms.append(norm)
        for held, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                held.add_(gradient / max(1.0, norm / clip))
    return total, norms


def make_privacy(**changes: Any) -> Privacy:
    given = {"noise_multiplier": 0.0, "sample_rate": 0.1, "delta": 1e-5, "max_grad_norm": CLIP, "expected_rows": 7.0}
    return Privacy(**{**given, "seed": 3, **changes})  # type: ignore[arg-type]


def make_engine(model: nn.Module, privacy: Privacy) -> Private:
    engine = Private(privacy, device=CPU, place=Place(), dtype=torch.float32, max_grad_norm=1.0)
    engine.setup(
        BuiltModel(model, find_anatomy(model)), lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2)
    )
    return engine


def batches(task: str, per_device: int) -> Iterator[Batch]:
    collate, _ = make_task(task)
    rows = [Sample(segments, i) for i, segments in enumerate(make_segments(task))]
    for first in range(0, len(rows), per_device):
        yield collate(rows[first : first + per_device])


def feed(engine: Private, task: str, per_device: int) -> float:
    loss = make_task(task)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rows go one by one
        sums = [engine.forward_backward(b, loss, torch.tensor(1.0), last=False).loss for b in batches(task, per_device)]
    return float(sum(sums))


@pytest.mark.parametrize("mode", ["hooks", "loop"])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in MODELS), ("llama-tied", "lora"), ("bert", "lora")]
)
def test_clipped_sums_are_those_of_a_plain_loop_over_single_rows(name: str, method: str, mode: str) -> None:
    model, task = make_model(name, method), MODELS[name][2]
    clip = float(np.median(clipped_sum(model, task)[1]))  # some rows are above it and some below
    expected, norms = clipped_sum(model, task, clip)
    assert min(norms) < clip < max(norms)
    engine = make_engine(model, make_privacy(hooks=mode == "hooks", max_grad_norm=clip))
    for per_device in (3, 7, 1):
        for total in engine.sums:
            total.zero_()
        feed(engine, task, per_device)
        for (parameter, _), got, want in zip(engine.trained, engine.sums, expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6), (parameter, per_device)
    assert engine.proven == (mode == "hooks" and (method == "lora" or MODELS[name][3]))


def test_a_step_is_that_of_the_noisy_mean_over_the_expected_rows() -> None:
    privacy = make_privacy(noise_multiplier=1.3)
    engine, plain = make_engine(make_model("bert"), privacy), make_model("bert")
    expected, _ = clipped_sum(plain, "classes")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3)
    for step in (1, 2):
        expected, _ = clipped_sum(plain, "classes")
        feed(engine, "classes", 3)
        stats = engine.step(5e-3)
        noise = privacy.draw_noise(step, expected)
        for parameter, total, drawn in zip(plain.parameters(), expected, noise, strict=True):
            parameter.grad = (total + drawn) / 7
        optimizer.step()
        assert stats.metrics == {"train/epsilon": privacy.epsilon(step)}
    for got, want in zip(engine.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=2e-6)


def test_a_step_without_rows_is_noise_alone() -> None:
    engine = make_engine(make_model("bert"), make_privacy(noise_multiplier=1.0))
    empty = next(batches("classes", 3)).without_targets()
    assert float(engine.forward_backward(empty, make_task("classes")[1], torch.tensor(0.0), last=True).loss) == 0
    noise = engine.privacy.draw_noise(1, engine.sums)
    norm = math.sqrt(sum(float(drawn.square().sum()) for drawn in noise)) / 7
    assert engine.step(1e-3).grad_norm == pytest.approx(norm, rel=1e-5)


def test_recomputed_blocks_and_batch_norm() -> None:
    model = make_model("llama")
    expected, _ = clipped_sum(model, "causal")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    engine = make_engine(model, make_privacy())
    feed(engine, "causal", 4)
    assert all(torch.allclose(got, want, rtol=1e-4, atol=1e-6) for got, want in zip(engine.sums, expected, strict=True))
    with pytest.raises(RequestError, match="normalises by the whole batch"):
        make_engine(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), make_privacy())


def test_noise_has_its_deviation_and_depends_on_seed_and_step_only() -> None:
    like = [torch.zeros(300, 400), torch.zeros(5)]
    privacy = make_privacy(noise_multiplier=2.5, max_grad_norm=0.4)
    first, again = privacy.draw_noise(1, like), make_privacy(noise_multiplier=2.5).draw_noise(1, like)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    values = first[0].double()
    assert float(values.std()) == pytest.approx(1.0, rel=0.01) and abs(float(values.mean())) < 0.01
    assert float((values.abs() < 0.6745).double().mean()) == pytest.approx(0.5, abs=0.01)  # quartiles of a Gaussian
    for other in (privacy.draw_noise(2, like), make_privacy(noise_multiplier=2.5, seed=4).draw_noise(1, like)):
        assert abs(float((values * other[0]).mean())) < 0.02


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.1, 0.01, 300), (0.6, 0.2, 12), (5.0, 1.0, 40)])
def test_epsilon_is_that_of_the_accountant_of_opacus(noise: float, rate: float, steps: int) -> None:
    privacy, accountant = make_privacy(noise_multiplier=noise, sample_rate=rate), RDPAccountant()
    assert privacy.epsilon(0) == 0
    found = []
    for step in range(1, steps + 1):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
        found.append(privacy.epsilon(step))
        if step in (1, 2, steps):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert found[-1] == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-9)
    assert found == sorted(found) and found[0] > 0


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_noise_keeps_the_target(target: float) -> None:
    order = PoissonOrder(2000, 1, 50, 20_000)
    privacy = agree_on_privacy(PrivacyConfig(target_epsilon=target, max_grad_norm=0.7), order, 400)  # type: ignore[call-arg]
    assert target - 0.02 < privacy.epsilon(400) <= target
    assert privacy.delta == pytest.approx(1 / 20_000)
    assert (privacy.sample_rate, privacy.expected_rows, privacy.max_grad_norm) == (0.025, 50, 0.7)
    assert "differential privacy of rows" in privacy.describe(400)


@pytest.mark.parametrize(("quantization", "hooks"), [("nf4", True), ("int8", False)])
def test_rows_go_one_by_one_where_they_would_change_each_other(quantization: str, hooks: bool) -> None:
    words = ["method=qlora", f"model.quantization={quantization}", "privacy.noise_multiplier=1"]
    found = build_privacy(compose(words).config, PoissonOrder(100, 1, 10, 1000), 10)
    assert found is not None and found.hooks == hooks


def test_what_promises_nothing_is_refused() -> None:
    order = PoissonOrder(100, 1, 50, 1000)
    with pytest.raises(RequestError, match="no less than 1 / 100 rows"):
        agree_on_privacy(PrivacyConfig(noise_multiplier=1.0, delta=0.01), order, 10)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="however large the noise"):
        agree_on_privacy(PrivacyConfig(target_epsilon=1e-9), order, 10)  # type: ignore[call-arg]


def test_rows_are_sampled_by_throws_of_their_own() -> None:
    order = PoissonOrder(400, 11, 32, 10_000)
    steps = [order.step(step) for step in range(1, 1001)]
    sizes = np.array([len(chosen) for chosen in steps])
    assert sizes.mean() == pytest.approx(32, rel=0.02)
    assert sizes.var() == pytest.approx(400 * 0.08 * 0.92, rel=0.15)  # binomial
    counts = np.bincount(np.concatenate(steps), minlength=400)
    assert counts.mean() == pytest.approx(80, rel=0.02) and counts.var() == pytest.approx(1000 * 0.08 * 0.92, rel=0.2)
    assert np.array_equal(order.step(7), PoissonOrder(400, 11, 32, 10_000).step(7))
    assert not np.array_equal(order.step(7), PoissonOrder(400, 12, 32, 10_000).step(7))
    assert len(order.draws(7)) == len(order.step(7))
    assert len(PoissonOrder(5, 0, 5, 10).step(1)) == 5


def test_ranks_share_a_step_of_any_size() -> None:
    order, lengths = PoissonOrder(40, 2, 2, 100), np.arange(1, 41)
    sizes = set()
    for step in range(1, 40):
        chosen = order.step(step)
        sizes.add(len(chosen))
        for world in (1, 2, 3):
            dealt = deal(chosen, lengths, world, 2)
            assert len({len(micros) for micros in dealt}) == 1
            assert sorted(row for micros in dealt for micro in micros for row in micro) == chosen.tolist()
    assert {0, 1, 2, 3} <= sizes


def test_a_secret_seed_is_drawn_once_and_readable_by_its_owner_only(tmp_path: Any) -> None:
    plans: list[Any] = [
        SimpleNamespace(run_dir=tmp_path / name, config=SimpleNamespace(privacy=PrivacyConfig()))  # type: ignore[call-arg]
        for name in ("one", "two")
    ]
    one, two = (settle_seed(plan, Place()) for plan in plans)
    assert one != two and max(one, two) > 2**64
    assert settle_seed(plans[0], Place()) == one
    assert stat.S_IMODE((tmp_path / "one" / SEED_FILE).stat().st_mode) == 0o600
    plans[0].config.privacy = PrivacyConfig(noise_seed=5)  # type: ignore[call-arg]
    assert settle_seed(plans[0], Place()) == 5


REFUSED = {
    "privacy.noise_multiplier": ["privacy.noise_multiplier=1"],
    "engine": ["engine=zero2"],
    "method": ["method=ia3"],
    "task.packing": ["task.packing=true"],
    "task.class_weights": ["task=sequence_classification", "task.class_weights=balanced"],
    "train.load_best_model_at_end": [
        "train.load_best_model_at_end=true",
        "train.eval_steps=2",
        "data.validation=rows.jsonl",
    ],
    "train.early_stopping_patience": [
        "train.early_stopping_patience=2",
        "train.eval_steps=2",
        "data.validation=rows.jsonl",
    ],
    "train.resume": ["train.resume=."],
    "task": ["task=preference"],
    "data.mixture": ["data.train=null", "data.mixture.a.train=rows.jsonl"],
    "data.k_shot": ["task=sequence_classification", "data.k_shot=1"],
    "data.folds": ["data.folds=2"],
    "model.name_or_path": ["model.name_or_path=experts"],
}


@pytest.mark.parametrize("where", REFUSED)
def test_unsound_mixes_are_refused(where: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "text": "x", "label": "c"}\n')
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 4}')

    def problems(*words: str) -> dict[str, str]:
        composed = compose(["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b", *words])
        return {problem.where.split(" ")[0]: problem.rule for problem in check(composed.config, composed.origins)}

    rule = problems("privacy.target_epsilon=8", *REFUSED[where])[where]
    assert problems(*REFUSED[where]).get(where) != rule
    assert not problems("privacy.target_epsilon=8")
