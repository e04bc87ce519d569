"""The model: embedding, blocks of the pattern on vLLM's parts, norm and head; and how weights of the export become theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from .attention import GroupedAttention, LatentAttention
from .feed_forward import FeedForward, MixtureOfExperts
from .served import attention_sizes
from .states import COPIES, GatedShortConv, build_gated_deltanet, build_mamba2, delta_sizes, state_specs

# A weight of the export for a parameter here, and what its loader needs next to it.
Loaded = tuple[str, Tensor, dict[str, Any]]
ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "attention": GroupedAttention,
    "window": GroupedAttention,
    "mla": LatentAttention,
}
WITH_STATES: dict[str, Callable[..., nn.Module]] = {
    "mamba2": build_mamba2,
    "short_conv": GatedShortConv,
    "gated_deltanet": build_gated_deltanet,
}


class AmfmBlock(nn.Module):
    """Residual block: x + multiplier * mixer(norm(x))."""

    def __init__(self, name: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.name, self.multiplier = name, config.multipliers["residual"]
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        mixer = f"{prefix}.mixer"
        if name in ATTENTION:
            self.mixer: nn.Module = ATTENTION[name](name, vllm_config, mixer)
        elif name == "moe":
            self.mixer = MixtureOfExperts(vllm_config, mixer)
        elif name == "feed_forward":
            section = config.feed_forward
            width, hidden, activation = config.hidden_size, section["hidden_size"], section["activation"]
            self.mixer = FeedForward(width, hidden, activation, vllm_config, mixer)
        else:
            self.mixer = WITH_STATES[name](vllm_config, mixer)

    def forward(self, positions_N: Tensor, x_ND: Tensor) -> Tensor:
        """x [N, D] -> the stream after this block."""
        normed_ND = self.norm(x_ND)
        y_ND = self.mixer(positions_N, normed_ND) if self.name in ATTENTION else self.mixer(normed_ND)
        return x_ND + y_ND * self.multiplier


class AmfmModel(nn.Module):
    """Token ids or embeddings to the normed stream."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.multiplier = config.multipliers["embedding"]
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            AmfmBlock(name, vllm_config, f"{prefix}.layers.{index}") for index, name in enumerate(config.block_names())
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids [N], or embeddings [N, D], to the stream [N, D]."""
        x_ND = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds) * self.multiplier
        for block in self.layers:
            x_ND = block(positions, x_ND)
        return self.norm(x_ND)


class AmfmForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """What vLLM builds for `architectures: [AmfmForCausalLM]`."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = AmfmModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=config.multipliers["logits"])

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: VllmConfig) -> list[Any]:
        """States of each kind of block: vLLM makes pages as large as the largest."""
        return state_specs(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of the largest state."""
        return cls._largest(vllm_config).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Dtypes of the largest state."""
        return cls._largest(vllm_config).dtypes

    @classmethod
    def _largest(cls, vllm_config: VllmConfig) -> Any:
        return max(state_specs(vllm_config), key=lambda spec: spec.page_size_bytes)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Iterable[Any]) -> dict[Any, Any]:
        """How states of each kind are copied when a prefix is shared."""
        return {kind: COPIES[kind] for kind in mamba_types}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [N] to embeddings [N, D]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the stream of the tokens that are due."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of the tokens that vLLM samples from."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the export's weights; returns the names of the parameters that have one. Raises KeyError for an unknown name."""
        parameters = dict(self.named_parameters())
        blocks = self.config.block_names()
        loaded = set()
        for name, tensor in weights:
            parts = name.split(".")
            block = blocks[int(parts[2])] if name.startswith("model.layers.") else ""
            inner = ".".join(parts[4:]) if block and parts[3] == "mixer" else ""
            place = name.removesuffix(inner)
            for other, value, settings in self._rename(block, inner, tensor) if inner else [("", tensor, {})]:
                parameter = parameters[place + other]
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                loader(parameter, value, *settings.pop("arguments", ()), **settings)
                loaded.add(place + other)
        return loaded

    def _rename(self, block: str, name: str, tensor: Tensor) -> Iterator[Loaded]:
        """Translate a weight of a mixer: its names here, with the part of it that goes there."""
        is_gated = self._is_gated(block)
        if block == "mamba2":
            yield {"A_log": "A"}.get(name, name.replace("conv.", "conv1d.")), _unsqueezed(name, tensor), {}
        elif block == "short_conv":
            yield from _thirds(name, _unsqueezed(name, tensor))
        elif block == "gated_deltanet":
            yield from self._rename_delta(name, tensor)
        elif block in ("attention", "window"):
            yield from self._rename_attention(block, name, tensor)
        elif name in ("experts.up", "experts.down"):
            yield from _experts(name, tensor, is_gated)
        elif name.endswith("up_proj.weight") and is_gated:
            for shard, half in enumerate(tensor.chunk(2)):
                yield name, half, {"arguments": (shard,)}
        else:
            yield name, tensor, {}

    def _is_gated(self, block: str) -> bool:
        section = {"moe": self.config.moe, "feed_forward": self.config.feed_forward}.get(block)
        return section is not None and section["activation"] == "swiglu"

    def _rename_attention(self, block: str, name: str, tensor: Tensor) -> Iterator[Loaded]:
        if name == "in_proj.weight":
            heads, kv_heads, size = attention_sizes(vars(self.config), block)
            for shard, part in zip("qkv", tensor.split([heads * size, kv_heads * size, kv_heads * size])):
                yield "qkv_proj.weight", part, {"arguments": (shard,)}
        elif name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            yield "qkv_proj.weight", tensor, {"arguments": (name[0],)}
        else:
            yield name.replace("out_proj", "o_proj"), tensor, {}

    def _rename_delta(self, name: str, tensor: Tensor) -> Iterator[Loaded]:
        if name != "in_proj.weight":
            yield name.replace("conv.", "conv1d."), _unsqueezed(name, tensor), {}
            return
        sizes = delta_sizes(self.config)
        heads = sizes["linear_num_value_heads"]
        keys = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"]
        values = heads * sizes["linear_value_head_dim"]
        q, k, v, beta, decay, gate = tensor.split([keys, keys, values, heads, heads, values])
        for shard, part in enumerate((q, k, v, gate)):
            yield "in_proj_qkvz.weight", part, {"arguments": (shard,)}
        for shard, part in enumerate((beta, decay)):
            yield "in_proj_ba.weight", part, {"arguments": (shard,)}


def _unsqueezed(name: str, tensor: Tensor) -> Tensor:
    """Give a convolution's weight [C, W] the dim that theirs have."""
    return tensor.unsqueeze(1) if name == "conv.weight" else tensor


def _thirds(name: str, tensor: Tensor) -> Iterator[Loaded]:
    if name != "in_proj.weight":
        yield name, tensor, {}
        return
    for shard, part in enumerate(tensor.chunk(3)):
        yield name, part, {"arguments": (shard,)}


def _experts(name: str, tensor: Tensor, is_gated: bool) -> Iterator[Loaded]:
    """Matrices of each expert: gate above up in ours, two shards of one parameter in theirs."""
    is_up = name == "experts.up"
    place = f"experts.routed_experts.{'w13' if is_up else 'w2'}_weight"
    for expert, matrix in enumerate(tensor):
        halves = matrix.chunk(2) if is_up and is_gated else (matrix,)
        shards = ("w1", "w3") if is_up else ("w2",)
        for shard, part in zip(shards, halves):
            yield place, part, {"arguments": (place,), "shard_id": shard, "expert_id": expert}
