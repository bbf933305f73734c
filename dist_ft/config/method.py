"""The keys of every method, with PEFT's names where it has the method, and what the house asks of a choice."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .strict import Count, Strict


class MethodChoice(Strict):
    """What the house asks of a method without knowing which it is."""

    whole: ClassVar[bool] = False  # its export is a model, not an adapter for the base
    virtual_tokens: ClassVar[bool] = False  # it puts learned positions in front of every row
    library: ClassVar[str] = "peft"  # loads its adapter
    mergeable: ClassVar[bool] = False  # its adapter can be put into the base's weights

    @property
    def exact(self) -> bool:
        """Whether the export holds the trained tensors bit by bit, and not what they were turned into."""
        return True

    def lr_scale(self, parameter: str) -> float:
        """By what the learning rate of a parameter, given by name, is multiplied."""
        return 1.0


class FullConfig(MethodChoice):
    """Every weight learns."""

    whole: ClassVar[bool] = True

    name: Literal["full"]


class FreezeConfig(MethodChoice):
    """Only the last blocks learn, or what patterns name; with neither, the head on frozen features."""

    whole: ClassVar[bool] = True

    name: Literal["freeze"]
    num_layers: Annotated[int, Field(ge=0)] = Field(2, description="Blocks that learn, counted from the last.")
    trainable: list[str] = Field(
        default_factory=list, description="Regular expressions; a parameter learns where one is found in its name."
    )
    train_embeddings: bool = Field(False, description="The input embeddings learn.")
    train_head: bool = Field(False, description="The output head learns.")


class BitfitConfig(MethodChoice):
    """Only biases learn (Ben Zaken et al. 2022)."""

    whole: ClassVar[bool] = True

    name: Literal["bitfit"]


class LnTuningConfig(MethodChoice):
    """Only norms learn, in copies beside the base's (Zhao et al. 2023, arXiv 2312.11420)."""

    mergeable: ClassVar[bool] = True

    name: Literal["ln_tuning"]
    target_modules: list[str] | None = Field(None, description="Name endings; all norms if not given.")


class Ia3Config(MethodChoice):
    """Learned factors on keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638)."""

    mergeable: ClassVar[bool] = True

    name: Literal["ia3"]
    target_modules: list[str] | None = Field(None, description="Name endings; PEFT's for the model if not given.")
    feedforward_modules: list[str] | None = Field(None, description="Those of them whose input is scaled.")


class AdapterConfig(MethodChoice):
    """Bottleneck networks behind the sublayers of every block; keys and values are those of the adapters library."""

    library: ClassVar[str] = "dist_ft"

    name: Literal["adapter"]
    configuration: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="Behind attention and MLP (Houlsby et al. 2019), or the MLP (Pfeiffer et al. 2020)."
    )
    reduction_factor: Annotated[float, Field(ge=1)] = Field(16, description="Model width / bottleneck width.")
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class VirtualTokensChoice(MethodChoice):
    """What methods with learned positions in front of every row have in common."""

    virtual_tokens: ClassVar[bool] = True

    num_virtual_tokens: Count = Field(20, description="Learned positions in front of every row.")


class PromptConfig(VirtualTokensChoice):
    """Prompt tuning: learned input embeddings (Lester et al. 2021)."""

    name: Literal["prompt"]
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = Field(None, description="Where to start; repeated or cut to the length.")
    tokenizer_name_or_path: str | None = Field(None, description="Reads that text; the model's own if not given.")


class PrefixConfig(VirtualTokensChoice):
    """Prefix tuning: learned keys and values in every layer (Li and Liang 2021)."""

    name: Literal["prefix"]
    prefix_projection: bool = Field(False, description="Learn through a two-layer network, which is dropped at export.")
    encoder_hidden_size: Count | None = Field(None, description="That network's width; the model's if not given.")

    @property
    def exact(self) -> bool:
        """The network is dropped and what it gives is kept."""
        return not self.prefix_projection


class PTuningConfig(VirtualTokensChoice):
    """P-tuning: input embeddings that a small network gives, which is dropped at export (Liu et al. 2021)."""

    name: Literal["p_tuning"]
    encoder_hidden_size: Count | None = Field(None, description="That network's width; the model's if not given.")
    encoder_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @property
    def exact(self) -> bool:
        """The network is dropped and what it gives is kept."""
        return False


class LoraKeys(MethodChoice):
    """Low-rank adapters beside frozen weights (Hu et al. 2021); names and meanings are PEFT's."""

    mergeable: ClassVar[bool] = True

    r: Count = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear` (neither head nor router), name endings, or one regular expression."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")
    use_dora: bool = Field(False, description="Learn magnitude apart from direction (Liu et al. 2024).")
    modules_to_save: list[str] = Field(default_factory=list, description="Modules trained whole and saved along.")
    target_parameters: list[str] = Field(
        default_factory=list, description="Fused experts by name endings, such as `mlp.experts.gate_up_proj`."
    )
    exclude_modules: str | list[str] | None = Field(None, description="Not adapted: endings, or a regular expression.")
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="Blocks, counted from 0.")
    rank_pattern: dict[str, Count] = Field(default_factory=dict, description="Name ending → its own r.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Name ending → its own lora_alpha."
    )
    init_lora_weights: (
        Literal[True, "gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = Field(
        True, description="true: as Microsoft's LoRA; also pissa, pissa_niter_N, olora. All start at the base model."
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Learning rate of B over that of A (LoRA+, Hayou et al. 2024)."
    )

    @property
    def moves_base(self) -> bool:
        """Whether the adapter starts with a part of the base's weights, which hold the rest."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def exact(self) -> bool:
        """What such a start took from the base is taken off the adapter again, in an export of twice the rank."""
        return not self.moves_base

    def lr_scale(self, parameter: str) -> float:
        """LoRA+ lets B, which starts at zero, learn faster than A."""
        return self.loraplus_lr_ratio or 1.0 if ".lora_B." in parameter else 1.0


class LoraConfig(LoraKeys):
    """LoRA; over a quantised base too, where model.quantization says so."""

    name: Literal["lora"]


class QloraConfig(LoraKeys):
    """LoRA over a quantised base (Dettmers et al. 2023): NF4 with double quantisation unless told otherwise."""

    name: Literal["qlora"]


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
