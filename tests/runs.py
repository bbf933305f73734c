"""Configurations of whole runs over small rows, and the folder of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dist_ft.checkpoint.saver import save as save_checkpoint
from dist_ft.config.plan import Plan, read_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.render.template import find_end_token
from dist_ft.data.render.tokenizer import open_tokenizer
from dist_ft.export.probe import probe_model
from dist_ft.export.write import export_run
from dist_ft.families import ModelRecipe, build_method
from dist_ft.model.load import attention_of
from dist_ft.prepare import prepare
from dist_ft.process import comm
from dist_ft.process.place import Place
from dist_ft.state import CAUSAL_LM, NamedState, Progress
from dist_ft.track.jsonl import JsonLines
from tests.samples import given

STEPS, BATCH, MAX_LENGTH = 20, 8, 48
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-3, 0.1, 1.0
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [
        ("Refund my order", "team: billing"),
        ("Screen is black", "team: technical"),
        ("Hello there", "team: x"),
    ]
]


def token_run(
    folder: Path,
    model: str,
    data: str,
    engine: str,
    world: int,
    accumulation: int,
    packing: bool,
    method: dict[str, Any],
) -> dict[str, Any]:
    """A run over rows of tokens."""
    return {
        "run_name": folder.name,
        "output_dir": str(folder),
        "model": {"dtype": "float32", "name_or_path": model},
        "task": {"name": "instruction", "max_length": MAX_LENGTH, "packing": packing},
        "data": {"train": data, "format": "tokens", "shuffle": False, "cache_dir": str(folder.parent / "cache")},
        "method": method,
        "engine": {"name": engine},
        "optim": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "lr_scheduler_type": "linear",
            "max_grad_norm": MAX_NORM,
        },
        "train": {
            "max_steps": STEPS,
            "global_batch_size": BATCH,
            "per_device_train_batch_size": BATCH // world // accumulation,
            "save_minutes": None,  # epochs have two steps
        },
        "track": {"wandb": "off", "report": False},
        "launch": {"name": "local", "workers_per_node": world},
    }


def labelled_run(folder: Path, model: str, data: Path, engine: str, world: int, **changes: Any) -> dict[str, Any]:
    """A run over the rows of `tests.samples.write_labelled_rows`; `changes` replace whole groups."""
    groups: dict[str, Any] = {
        "run_name": folder.name,
        "output_dir": str(folder),
        "model": {"dtype": "float32", "name_or_path": model},
        "task": {"name": "sequence_classification", "max_length": 32, "class_weights": "balanced"},
        "data": {
            "train": str(data),
            "validation": str(data),
            "shuffle": False,
            "cache_dir": str(folder.parent / "cache"),
        },
        "method": {"name": "full"},
        "engine": {"name": engine},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_grad_norm": 1.0},
        "train": {
            "max_steps": 6,
            "global_batch_size": 8,
            "per_device_train_batch_size": 8 // world // 2,
            "save_minutes": None,
        },
        "track": {"wandb": "off", "report": False},
        "launch": {"name": "local", "workers_per_node": world},
    }
    return {**groups, **changes}


def chat_config(folder: Path, model: Path, method: dict[str, Any], cache: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_name": "r",
            "output_dir": str(folder),
            "model": {"dtype": "float32", "name_or_path": str(model)},
            "task": {"name": "instruction", "max_length": 128},
            "data": {
                "train": str(cache / "rows.jsonl"),
                "validation": str(cache / "rows.jsonl"),
                "cache_dir": str(cache),
            },
            "method": method,
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
            "track": {"wandb": "off", "report": False},
            "launch": {"name": "local"},
        }
    )


def finish_run(folder: Path, model: Path, method: dict[str, Any], cache: Path) -> Path:
    """Create the folder of a run without training: add noise to the weights, export them and save a checkpoint."""
    (cache / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    config = chat_config(folder, model, method, cache)
    write_plan(
        Plan(
            config=config, nodes=1, workers_per_node=1, world_size=1, accumulation_steps=1, git_sha="abc",
            created="2026-01-01", origins={},
        )
    )  # fmt: skip
    prepared = prepare(config)
    attention = attention_of(config.model, prepared.model_dir, torch.device("cpu"), CAUSAL_LM)
    recipe = ModelRecipe(config, prepared.model_dir, attention, CAUSAL_LM, build_method(config))
    trained = recipe.build(weights=True).model
    torch.manual_seed(3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name: p.data for name, p in trained.named_parameters() if p.requires_grad}
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    log = JsonLines(folder / "metrics.jsonl")
    log.log({"eval/loss": 3.25}, step=0)
    log.log({"eval/loss": 1.75}, step=7)
    log.close()
    export_run(
        method=build_method(config),
        model_config=config.model,
        model_dir=prepared.model_dir,
        bare=recipe.build_meta().model,
        tokenizer=tokenizer,
        end_token_id=find_end_token(tokenizer, config.task),
        weights=weights.items(),
        out=folder / "model",
        card="# card\n",
        probe=probe_model(trained, given(prepared.train.open_table().example(0)["input_ids"])),
    )
    comm.join(Place(), comm.open_store(Place(), 10), torch.device("cpu"), 10)
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    moments = {f"exp_avg/{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_checkpoint(folder / "checkpoints", NamedState(tensors | moments, 7), Progress(7, 1, "ddp", None, 1.75, 7, 0))
    comm.leave()
    return folder


def move_plan(run: Path, folder: Path) -> Path:
    """Write the plan of a run into a folder that holds nothing else; return the path of its run.yaml."""
    plan = read_plan(run)
    write_plan(plan.model_copy(update={"config": plan.config.model_copy(update={"output_dir": str(folder)})}))
    return folder / "run.yaml"
