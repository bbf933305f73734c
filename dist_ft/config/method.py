"""The `method` group: the keys of every method, with PEFT's names for methods that PEFT implements."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .strict import Count, Strict


class MethodChoice(Strict):
    """Base of the method configurations: properties that other modules read without knowing the method."""

    whole: ClassVar[bool] = False  # the export is a full model instead of an adapter
    virtual_tokens: ClassVar[bool] = False  # prepends trained positions to every row
    library: ClassVar[str] = "peft"  # the library that loads the adapter
    mergeable: ClassVar[bool] = False  # the adapter can be merged into the base model

    @property
    def exact(self) -> bool:
        """Whether the export contains the trained tensors bit for bit, without conversion."""
        return True

    def lr_scale(self, parameter: str) -> float:
        """Return the factor by which the learning rate of a parameter is multiplied, given the parameter's name."""
        return 1.0


class FullConfig(MethodChoice):
    """Full fine-tuning: all weights are trained."""

    whole: ClassVar[bool] = True

    name: Literal["full"]


class FreezeConfig(MethodChoice):
    """Train only the last blocks or the parameters that match patterns; with neither, only the head of the task."""

    whole: ClassVar[bool] = True

    name: Literal["freeze"]
    num_layers: Annotated[int, Field(ge=0)] = Field(2, description="Number of trained blocks, counted from the last.")
    trainable: list[str] = Field(
        default_factory=list, description="Regular expressions; a parameter is trained if one is found in its name."
    )
    train_embeddings: bool = Field(False, description="Train the input embeddings.")
    train_head: bool = Field(False, description="Train the output head.")


class BitfitConfig(MethodChoice):
    """BitFit: train only the biases (Ben Zaken et al. 2022)."""

    whole: ClassVar[bool] = True

    name: Literal["bitfit"]


class LnTuningConfig(MethodChoice):
    """LayerNorm tuning: train copies of the normalization layers (Zhao et al. 2023, arXiv 2312.11420)."""

    mergeable: ClassVar[bool] = True

    name: Literal["ln_tuning"]
    target_modules: list[str] | None = Field(None, description="Name suffixes. Defaults to all normalization layers.")


class Ia3Config(MethodChoice):
    """(IA)^3: trained scaling of keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638)."""

    mergeable: ClassVar[bool] = True

    name: Literal["ia3"]
    target_modules: list[str] | None = Field(
        None, description="Name suffixes. Defaults to PEFT's choice for the model."
    )
    feedforward_modules: list[str] | None = Field(None, description="The target modules whose input is scaled.")


class AdapterConfig(MethodChoice):
    """Bottleneck adapters after the sublayers of every block; keys and values are those of the adapters library."""

    library: ClassVar[str] = "dist_ft"

    name: Literal["adapter"]
    configuration: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="After attention and MLP (Houlsby et al. 2019), or only the MLP (Pfeiffer et al. 2020)."
    )
    reduction_factor: Annotated[float, Field(ge=1)] = Field(16, description="Hidden size divided by bottleneck size.")
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class VirtualTokensChoice(MethodChoice):
    """Base of the methods that prepend virtual tokens to every row."""

    virtual_tokens: ClassVar[bool] = True

    num_virtual_tokens: Count = Field(20, description="Number of virtual tokens in front of every row.")


class PromptConfig(VirtualTokensChoice):
    """Prompt tuning: trained input embeddings of virtual tokens (Lester et al. 2021)."""

    name: Literal["prompt"]
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = Field(
        None, description="Text for prompt_tuning_init=TEXT, repeated or truncated to num_virtual_tokens."
    )
    tokenizer_name_or_path: str | None = Field(
        None, description="Tokenizer of the initial text. Defaults to the model's."
    )


class PrefixConfig(VirtualTokensChoice):
    """Prefix tuning: trained keys and values in every layer (Li and Liang 2021)."""

    name: Literal["prefix"]
    prefix_projection: bool = Field(False, description="Compute the prefix with a two-layer MLP, dropped at export.")
    encoder_hidden_size: Count | None = Field(None, description="Hidden size of that MLP. Defaults to the model's.")

    @property
    def exact(self) -> bool:
        """False with a projection: the MLP is dropped at export and only its output is kept."""
        return not self.prefix_projection


class PTuningConfig(VirtualTokensChoice):
    """P-tuning: input embeddings computed by a small network, which is dropped at export (Liu et al. 2021)."""

    name: Literal["p_tuning"]
    encoder_hidden_size: Count | None = Field(None, description="Hidden size of the network. Defaults to the model's.")
    encoder_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @property
    def exact(self) -> bool:
        """Always False: the network is dropped at export and only its output is kept."""
        return False


class LoraKeys(MethodChoice):
    """Keys of LoRA (Hu et al. 2021), with PEFT's names and meanings."""

    mergeable: ClassVar[bool] = True

    r: Count = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear` (except head and routers), name suffixes, or one regular expression."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023).")
    use_dora: bool = Field(False, description="Train magnitude and direction separately (Liu et al. 2024).")
    modules_to_save: list[str] = Field(default_factory=list, description="Modules to train fully and save.")
    target_parameters: list[str] = Field(
        default_factory=list, description="Name suffixes of fused experts to adapt, such as `mlp.experts.gate_up_proj`."
    )
    exclude_modules: str | list[str] | None = Field(
        None, description="Modules that are not adapted: name suffixes, or one regular expression."
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Indices of the blocks to adapt, from 0. Defaults to all."
    )
    rank_pattern: dict[str, Count] = Field(default_factory=dict, description="Name suffix → r.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Name suffix → lora_alpha."
    )
    init_lora_weights: (
        Literal[True, "gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = Field(
        True,
        description="true is the initialization of Microsoft's LoRA; gaussian, orthogonal, pissa, pissa_niter_N and"
        " olora are alternatives. The initial model always equals the base model.",
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024)."
    )

    @property
    def moves_base(self) -> bool:
        """Whether the initialization moves a part of the base weights into the adapter (PiSSA, OLoRA)."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def exact(self) -> bool:
        """False for PiSSA and OLoRA: their export subtracts the initial adapter, which doubles the rank."""
        return not self.moves_base

    def lr_scale(self, parameter: str) -> float:
        """Return `loraplus_lr_ratio` for B matrices, which start at zero, and 1 for other parameters (LoRA+)."""
        return self.loraplus_lr_ratio or 1.0 if ".lora_B." in parameter else 1.0


class LoraConfig(LoraKeys):
    """LoRA, on a quantized base model if model.quantization is set."""

    name: Literal["lora"]


class QloraConfig(LoraKeys):
    """LoRA on a quantized base model (Dettmers et al. 2023): NF4 with double quantization by default."""

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
