"""The configuration of a run, typed and strict: an unknown key is an error, each choice of a group has its own keys.

Names are those of Hugging Face and TRL wherever the meaning is the same. The groups are the folders of `conf/`;
`checks.py` gathers every problem of a composed configuration, this file says what a key is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .schema_augment import AugmentConfig
from .schema_method import (
    AdapterConfig,
    BitfitConfig,
    FreezeConfig,
    FullConfig,
    Ia3Config,
    LnTuningConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
)
from .schema_task import TaskConfig
from .strict import Count, Share, Strict


class ModelConfig(Strict):
    """Which model, in which precision."""

    name_or_path: str = Field(description="Folder, hub id, or `package:NAME` (a Python package that carries a GGUF).")
    revision: str | None = Field(None, description="Hub revision; a commit hash makes the run repeatable.")
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer; the model's own if not given.")
    add_tokens: list[Annotated[str, Field(pattern=r"^\S+$")]] = Field(
        default_factory=list, description="Special tokens that the tokenizer gets; their embeddings learn."
    )
    from_scratch: bool = Field(
        False, description="Weights drawn from train.seed; of the folder only config.json and the tokenizer are read."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Forward and backward, and frozen weights; trained weights and AdamW stay in float32."
    )
    quantization: Literal["none", "nf4", "int8"] | None = Field(
        None, description="Of the frozen linear layers; if not given, nf4 for method=qlora and none otherwise."
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    dropout: Share | None = Field(None, description="Every rate of dropout of the model; its own if not given.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations block by block in the backward.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Read it first.")


DataFormat = Literal[
    "auto",
    "text",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "labelled",
    "tagged",
    "source_target",
    "squad",
    "pairs",
    "tokens",
]


Sources = str | list[str]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]


class DataSet(Strict):
    """One set of a mixture; its keys mean what those of `data` mean."""

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Its share of the samples is this over the sum of all sets' weights; give all or none."
    )
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="The format's name of a column → the data's.")
    template: dict[str, str] = Field(default_factory=dict, description="The format's column → a text with {COLUMN}.")
    revision: str | None = Field(None, description="Hub revision of the data.")
    augment: AugmentConfig | None = Field(None, description="Changed copies of its training rows.")
    k_shot: Count | None = Field(None, description="Learn from so many of its rows of each label, by data.subset_seed.")


class DataConfig(Strict):
    """Where rows come from. A source is a file, a glob, a folder or a hub id; several make one data set."""

    train: Sources | None = Field(None, description="Rows to learn from; or give data.mixture.")
    validation: Sources | None = None
    test: Sources | None = None
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="The format's name of a column → the data's.")
    template: dict[str, str] = Field(
        default_factory=dict,
        description="The format's column → a text with {COLUMN} of the data in it; `{COLUMN}` alone keeps the value.",
    )
    revision: str | None = Field(None, description="Hub revision of the data.")
    mixture: dict[SetName, DataSet] | None = Field(
        None, description="Name → a data set; each keeps its share of the samples throughout the run."
    )
    mixture_temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="T: without weights, shares are as samples^(1/T). 1: all rows alike; large T: all sets alike."
    )
    k_shot: Count | None = Field(None, description="Learn from so many rows of each label, drawn by subset_seed.")
    folds: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Deal the training rows in so many folds, alike in labels; one is the validation data."
    )
    fold: Annotated[int, Field(ge=0)] | None = Field(None, description="Which one, from 0; the first if not given.")
    subset_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of k_shot and folds; train.seed if not given."
    )
    augment: AugmentConfig | None = Field(None, description="Changed copies of training rows.")
    shuffle: bool = Field(True, description="A new order each epoch from train.seed; false keeps the file order.")
    cache_dir: str | None = Field(None, description="Prepared data and models; ~/.cache/dist_ft if not given.")

    def has(self, split: str) -> bool:
        """Whether there are rows for `train`, `validation` or `test`."""
        return bool(self.sources(split)) or any(getattr(part, split) for part in (self.mixture or {}).values())

    def sources(self, split: str) -> Sources | None:
        """Where a split's rows are; of folds the validation rows are among the training rows."""
        found: Sources | None = self.train if split == "validation" and self.folds else getattr(self, split)
        return found

    @property
    def only_tokens(self) -> bool:
        """Whether all rows are tokens already, so that no tokenizer is needed."""
        parts = [self] if self.mixture is None else list(self.mixture.values())
        return all(part.format == "tokens" for part in parts)


MethodConfig = Annotated[
    FullConfig
    | FreezeConfig
    | BitfitConfig
    | LnTuningConfig
    | Ia3Config
    | PromptConfig
    | PrefixConfig
    | PTuningConfig
    | AdapterConfig
    | LoraConfig
    | QloraConfig,
    Field(discriminator="name"),
]


class MoeConfig(Strict):
    """Mixtures of experts; setting one of these for a model without experts is an error."""

    router: Literal["frozen", "train", "adapt"] | None = Field(
        None, description="`train`: whole; `adapt`: by LoRA. If not given: trained by method=full, else frozen."
    )
    aux_loss_coef: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Balance loss over the global batch. By default the model's own where routers learn, else 0.",
    )
    aux_loss_per_layer: bool = Field(False, description="Balance each layer; false: their sum, as transformers.")
    z_loss_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="Mean squared logsumexp of router logits.")


class PrivacyConfig(Strict):
    """Differential privacy of the training rows; on where a target epsilon or a noise multiplier is given."""

    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Epsilon that the whole run may spend; the noise follows from it."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of (epsilon, delta); below 1 / rows. A tenth of that if not given."
    )
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Deviation of the noise over max_grad_norm, instead of target_epsilon."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Norm to which each row's gradient is cut.")
    noise_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of noise and sampling; who knows it can take the noise off. A secret one if not given."
    )
    grad_sample_mode: Literal["auto", "loop"] = Field(
        "auto", description="`auto`: Opacus's hooks where they prove right, else `loop`: row by row."
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is asked for."""
        return self.target_epsilon is not None or self.noise_multiplier is not None


class DdpConfig(Strict):
    """Every rank holds everything; gradients are summed."""

    name: Literal["ddp"]


class FsdpConfig(Strict):
    """PyTorch FSDP2: parameters, gradients and optimizer state sharded block by block."""

    name: Literal["fsdp"]
    offload: Literal["none", "params"] = Field("none", description="`params`: shards and the update live on the CPU.")
    reshard_after_forward: bool = Field(True, description="Free a block's weights between forward and backward.")


class Zero12Config(Strict):
    """DeepSpeed ZeRO-1 (optimizer state sharded) and ZeRO-2 (gradients too)."""

    name: Literal["zero1", "zero2"]
    offload: Literal["none", "optimizer"] = "none"


class Zero3Config(Strict):
    """DeepSpeed ZeRO-3: parameters sharded too."""

    name: Literal["zero3"]
    offload: Literal["none", "optimizer", "params"] = Field("none", description="`params` offloads both.")


EngineConfig = Annotated[DdpConfig | FsdpConfig | Zero12Config | Zero3Config, Field(discriminator="name")]


class OptimConfig(Strict):
    """AdamW (Loshchilov and Hutter 2019) and its schedule."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Not of vectors, nor of (IA)^3's factors.")
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Share = Field(0.0, description="Share of the steps over which the rate rises from 0.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Clip the global norm; 0 does not clip.")


class TrainConfig(Strict):
    """How long, how large, how often."""

    max_steps: Count | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Count = Field(32, description="Rows (packed: blocks) of one optimizer step over all ranks.")
    per_device_train_batch_size: Count = Field(4, description="Rows of one micro-batch; accumulation follows.")
    per_device_eval_batch_size: Count = 8
    seed: Annotated[int, Field(ge=0)] = 0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Noise on embeddings in training (NEFTune): 5 to 15."
    )
    logging_steps: Count = 1
    eval_steps: Count | None = Field(None, description="Also evaluated before the first and after the last step.")
    save_steps: Count | None = Field(None, description="Also saved after the last step.")
    save_total_limit: Count | None = Field(None, description="Newest checkpoints kept; the best one is kept besides.")
    metric_for_best_model: str = Field("loss", description="Which eval/… is meant by best: loss, accuracy, f1 …")
    early_stopping_patience: Count | None = Field(None, description="Evaluations without a better one.")
    load_best_model_at_end: bool = Field(False, description="Export the best evaluated step, not the last.")
    resume: str = Field("auto", description="`auto` (newest sound checkpoint), `never`, or a checkpoint's path.")
    timeout_s: Annotated[float, Field(gt=0)] = Field(600, description="A rank silent for so long is given up.")


class TrackConfig(Strict):
    """Weights & Biases; metrics.jsonl and the terminal are always there."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online where a key is found, offline otherwise."
    )
    project: str = "dist_ft"
    run_name: str | None = Field(None, description="The run's name in W&B; the top run_name if not given.")
    group: str | None = Field(None, description="Under which W&B gathers runs, such as those of a sweep.")
    tags: list[str] = Field(default_factory=list)


class LocalConfig(Strict):
    """Workers on this machine, by torchrun (ddp, fsdp) or the deepspeed launcher (zero*); one worker needs neither."""

    name: Literal["local"]
    workers_per_node: Count | Literal["auto"] = Field("auto", description="`auto`: one a GPU; 2 on a CPU machine.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Rendezvous port; 0 takes a free one.")


class HostfileConfig(Strict):
    """Workers on the hosts of a DeepSpeed hostfile, over ssh or pdsh."""

    name: Literal["deepspeed"]
    hostfile: str = Field(description="Lines of `HOST slots=N`.")
    nodes: Count | None = Field(None, description="The first so many hosts; all if not given.")
    workers_per_node: Count | None = Field(None, description="Workers on each host; its slots if not given.")
    master_addr: str | None = Field(None, description="Address of the first host; looked up there if not given.")
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500


class SlurmConfig(Strict):
    """A SLURM job: one task a worker."""

    name: Literal["slurm"]
    nodes: Count = 1
    workers_per_node: Count = Field(description="Workers, and GPUs unless gpus_per_node says otherwise, on a node.")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Count | None = None
    mem: str | None = Field(None, description="Memory a node, in SLURM's words (`64G`).")
    time: str | None = Field(None, description="Time limit, in SLURM's words (`2-00:00:00`).")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    setup: list[str] = Field(default_factory=list, description="Shell lines before the workers start (module load …).")
    sbatch: dict[str, str] = Field(default_factory=dict, description="Any other sbatch option: long name → value.")


LaunchConfig = Annotated[LocalConfig | HostfileConfig | SlurmConfig, Field(discriminator="name")]


class RunConfig(Strict):
    """All of a run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
    output_dir: str
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    method: MethodConfig
    moe: MoeConfig = MoeConfig()  # type: ignore[call-arg]
    privacy: PrivacyConfig = PrivacyConfig()  # type: ignore[call-arg]
    engine: EngineConfig
    optim: OptimConfig
    train: TrainConfig
    track: TrackConfig
    launch: LaunchConfig

    @model_validator(mode="before")
    @classmethod
    def settle_quantization(cls, values: Any) -> Any:
        """What is not given becomes what the method means, so that a plan says it."""
        model, method = (values.get(key) for key in ("model", "method")) if isinstance(values, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(method, dict) or model.get("quantization") is not None:
            return values
        return {**values, "model": {**model, "quantization": "nf4" if method.get("name") == "qlora" else "none"}}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a composed configuration, for editors."""
    return RunConfig.model_json_schema()
