"""An amfm hybrid model for transformers; load it with trust_remote_code=True.

Generation carries a state (`AmfmState`) in the outputs instead of a key-value cache of transformers, whose classes know
attention layers only. The state also holds the tokens that made it, so that a changed prompt is noticed and read anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .blocks_amfm import Attention, BlockState, DepthwiseConv, Experts, FeedForward, Mamba2, MixtureOfExperts, RMSNorm
from .configuration_amfm import AmfmConfig
from .linear_mixers_amfm import LinearMixer
from .mixers_amfm import Memories, build_mixer
from .window_linear_amfm import WindowLinear


@dataclass
class AmfmState:
    """What generation carries on: the tokens that made it and a state for each block (None where it has none)."""

    tokens_BT: Tensor
    blocks: tuple[BlockState, ...]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the state, in place, as beam search keeps them."""
        self.tokens_BT = self.tokens_BT[beam_idx]
        self.blocks = tuple(state and tuple(part[beam_idx] for part in state) for state in self.blocks)


@dataclass
class AmfmOutput(ModelOutput):
    """Loss with labels, logits [B, T, V], and the state after the tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Any = None


class AmfmBlock(nn.Module):
    """Residual block: x + multiplier * mixer(norm(x)), the mixer as the letter of the pattern says."""

    def __init__(self, index: int, config: AmfmConfig) -> None:
        super().__init__()
        letters = config.letters()
        self.letter = letter = letters[index]
        self.multiplier = config.multipliers["residual"]
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if letter == "M":
            self.mixer: nn.Module = Mamba2(config)
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "E":
            self.mixer = MixtureOfExperts(config)
        elif letter == "-":
            section = config.feed_forward
            assert section is not None, "the pattern has '-', the configuration no feed_forward section"
            self.mixer = FeedForward(config.hidden_size, section["hidden_size"], section["activation"])
        else:
            # Mixers with decays by depth count the blocks that mix over the sequence, not experts and feed-forward.
            sequence = [number for number, other in enumerate(letters) if other not in ("E", "-")]
            self.mixer = build_mixer(letter, config, sequence.index(index), len(sequence))

    def forward(
        self, x_BTD: Tensor, mask_BS: Tensor | None, positions_BT: Tensor, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> the stream after this block and the block's state."""
        normed_BTD = self.norm(x_BTD)
        # `*` needs the mask of all tokens so far; the others that of the new ones, what they need of earlier ones is in the state.
        mask_BT = None if mask_BS is None else mask_BS[:, mask_BS.shape[1] - x_BTD.shape[1] :]
        if self.letter == "M":
            y_BTD, state = self.mixer(normed_BTD, mask_BT, state)
        elif self.letter == "*":
            y_BTD, state = self.mixer(normed_BTD, mask_BS, positions_BT, state)
        elif self.letter in ("E", "-"):
            y_BTD = self.mixer(normed_BTD)
        else:
            y_BTD, state = self.mixer(normed_BTD, mask_BT, positions_BT, state)
        return x_BTD + y_BTD * self.multiplier, state


class AmfmPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and first values of weights."""

    config_class = AmfmConfig
    base_model_prefix = ""
    _no_split_modules: ClassVar[list[str]] = ["AmfmBlock"]
    _supports_sdpa = True
    # Its state cannot be cut back to an earlier token, which assisted generation would need.
    _is_stateful = True
    # Choosing experts and decay are sensitive to rounding.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "router.weight",
        "expert_bias",
        "A_log",
        "dt_bias",
        "gate_bias",
        "bound_logit",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        """Give a new module its first values: normal ones for matrices, ones for norms, decays and time steps by range."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, Experts):
            nn.init.normal_(module.up, std=deviation)
            nn.init.normal_(module.down, std=deviation)
        elif isinstance(module, MixtureOfExperts) and module.section["expert_bias"]:
            nn.init.zeros_(module.expert_bias)
        elif isinstance(module, DepthwiseConv):
            bound = module.weight.shape[1] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, LinearMixer | Memories | WindowLinear):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=deviation)
        elif isinstance(module, Mamba2):
            nn.init.ones_(module.D)
            with torch.no_grad():
                module.A_log.uniform_(1, 16).log_()
                # Time steps log-uniform in 0.001 to 0.1; the bias is their inverse softplus.
                step = torch.empty_like(module.dt_bias).uniform_(-6.9, -2.3).exp()
                module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class AmfmForCausalLM(AmfmPreTrainedModel, GenerationMixin):
    """Language model: embedding, blocks of the pattern, norm, head; a generated token costs constant time but in attention.

    `head` and `embedding` are one matrix where the configuration ties them.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}

    def __init__(self, config: AmfmConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([AmfmBlock(index, config) for index in range(len(config.letters()))])
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        state: AmfmState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> AmfmOutput | tuple[Any, ...]:
        """Token ids [B, T] (after those of `state`) to logits; labels are shifted inside; -100 does not count.

        attention_mask [B, all tokens so far]: 0 is padding, on the left when generating.
        """
        seen = 0 if state is None else state.tokens_BT.shape[1]
        mask_BS = attention_mask
        # A mask without padding says nothing, and blocks take a shorter way without one.
        if mask_BS is not None and bool(mask_BS.all()):
            mask_BS = None
        if mask_BS is None:
            positions_BT = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        else:
            # Positions count text alone, so that padding on the left does not shift them.
            positions_BT = (mask_BS.long().cumsum(dim=-1) - 1).clamp(min=0)[:, seen:]
        x_BTD = self.embedding(input_ids) * self.config.multipliers["embedding"]
        block_states: list[BlockState] = []
        for index, block in enumerate(self.blocks):
            x_BTD, block_state = block(x_BTD, mask_BS, positions_BT, None if state is None else state.blocks[index])
            block_states.append(block_state)
        hidden_BTD = self.final_norm(x_BTD)
        if logits_to_keep:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
        logits = self.head(hidden_BTD).float() * self.config.multipliers["logits"]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        next_state = None
        if use_cache:
            tokens_BT = input_ids if state is None else torch.cat([state.tokens_BT, input_ids], dim=1)
            next_state = AmfmState(tokens_BT, tuple(block_states))
        output = AmfmOutput(loss=loss, logits=logits, state=next_state)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: AmfmState | None = None,
        use_cache: bool | None = True,
        **_: Any,
    ) -> dict[str, Any]:
        """Select the tokens that the state has not seen; all of them where its rows are no longer these."""
        if state is not None:
            seen = state.tokens_BT.shape[1]
            if seen < input_ids.shape[1] and torch.equal(state.tokens_BT, input_ids[:, :seen]):
                input_ids = input_ids[:, seen:]
            else:
                state = None
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "state": state,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:
        """No key-value cache of transformers: the state travels in the outputs."""

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("state") is not None:
            model_kwargs["state"] = outputs["state"]
        return model_kwargs
