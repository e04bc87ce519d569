"""An amfm hybrid model for transformers; load it with trust_remote_code=True.

`AmfmModel` maps tokens to the normed stream, `AmfmForCausalLM` and `AmfmForSequenceClassification` stand on it. Generation
carries an `AmfmCache`. Packed sequences are computed document by document (`documents_amfm.py`). An argument that would be ignored is
an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention_amfm import Attention
from .blocks_amfm import FeedForward, Mamba2, MixtureOfExperts, make_feed_forward, make_norm
from .cache_amfm import AmfmCache, BlockState, as_own_cache
from .configuration_amfm import AmfmConfig
from .documents_amfm import Place, Stretch, by_document, count_positions, find_documents, read_text_mask
from .first_values_amfm import give_first_values
from .mixers_amfm import LETTERS, Mla, build_head, build_mixer
from .package_mixers_amfm import PACKAGE_MIXERS
from .streams_amfm import make_stream

# Programs pass these to every model; `is_causal` true and the longest document say nothing that is not known.
HARMLESS = ("is_causal", "max_length_q", "max_length_k", "cu_seq_lens_k")
NOT_RETURNED = {
    "output_attentions": "attention returns no weights",
    "output_router_logits": "blocks return no router logits, and a balance loss is not part of this class",
}
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


def make_mixer(letter: str, index: int, config: AmfmConfig) -> nn.Module:
    """Make the mixer of a letter or `{name}` in the block of this index."""
    kind, own = config.symbol_of(letter), config.of_block(letter)
    if kind in CORE:
        mixer = CORE[kind](own, index)
        mixer.config = config  # where programs change the choice of attention later
        return mixer
    # Mixers with decays by depth count the blocks that mix over the sequence, not experts and feed-forward.
    sequence = [number for number, other in enumerate(config.letters()) if config.symbol_of(other) not in CHANNELS]
    return build_mixer(kind, own, sequence.index(index), len(sequence))


CORE: dict[str, Callable[[AmfmConfig, int], nn.Module]] = {
    "M": lambda config, index: Mamba2(config),
    "*": Attention,
    "E": lambda config, index: MixtureOfExperts(config),
    "-": make_feed_forward,
}
# Mixers that read no other token.
CHANNELS = ("E", "-")


def run_mixer(mixer: nn.Module, x_BTD: Tensor, stretch: Stretch, state: BlockState) -> tuple[Tensor, BlockState]:
    """Give a mixer what it takes of a stretch of text: y [B, T, D], and the state after it."""
    found: tuple[Tensor, BlockState]
    if isinstance(mixer, MixtureOfExperts | FeedForward):
        return mixer(x_BTD), state
    if isinstance(mixer, Mamba2):
        found = mixer(x_BTD, stretch.text_BT, state)
    elif isinstance(mixer, Attention | Mla) or getattr(mixer, "reads_tokens", False):
        found = mixer(x_BTD, stretch, state)
    else:
        found = mixer(x_BTD, stretch.text_BT, stretch.positions_BT, state)
    return found


class ParallelMixers(nn.Module):
    """Mixers of the same input, whose outputs are added; their states are a tuple of one for each."""

    def __init__(self, letter: str, index: int, config: AmfmConfig) -> None:
        super().__init__()
        symbols = letter.strip("()").split("&")
        self.branches = nn.ModuleList(make_mixer(symbol, index, config) for symbol in symbols)

    def forward(self, x_BTD: Tensor, stretch: Stretch, state: BlockState) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        states = (None,) * len(self.branches) if state is None else state
        found = [run_mixer(branch, x_BTD, stretch, own) for branch, own in zip(self.branches, states, strict=True)]
        return torch.stack([y_BTD for y_BTD, _ in found]).sum(dim=0), tuple(own for _, own in found)


class AmfmBlock(GradientCheckpointingLayer):
    """Residual block: x + multiplier * mixer(norm(x)), the mixer as the letter of the pattern says."""

    def __init__(self, index: int, config: AmfmConfig) -> None:
        super().__init__()
        self.letter = letter = config.letters()[index]
        self.multiplier = config.multipliers["residual"]
        self.norm, self.norm_after = make_norm(config), index in config.norms_after
        self.out_norm = make_norm(config) if config.norm_placement == "both" else None
        self.stream = make_stream(config, index)
        self.mixer = ParallelMixers(letter, index, config) if letter[0] == "(" else make_mixer(letter, index, config)

    def forward(
        self, x_BTD: Tensor, stretches: list[Stretch], state: BlockState = None, *, keeps_state: bool = False
    ) -> tuple[Tensor, BlockState]:
        """x [B, T, D] -> the stream after this block, and the block's state where it is kept."""
        if len(stretches) == 1:
            y_BTD, state = self._mix(x_BTD, stretches[0], state)
            return y_BTD, state if keeps_state else None
        mixed = [self._mix(x_BTD[stretch.place], stretch, None)[0].flatten(0, 1) for stretch in stretches]
        return torch.cat(mixed).view(*x_BTD.shape[:2], *mixed[0].shape[1:]), None

    def _mix(self, x_BTD: Tensor, stretch: Stretch, state: BlockState) -> tuple[Tensor, BlockState]:
        read_BTD, weights = (x_BTD, None) if self.stream is None else self.stream(x_BTD)
        normed_BTD = read_BTD if self.norm_after else self.norm(read_BTD)
        if isinstance(self.mixer, ParallelMixers):
            y_BTD, state = self.mixer(normed_BTD, stretch, state)
        else:
            y_BTD, state = run_mixer(self.mixer, normed_BTD, stretch, state)
        norm = self.norm if self.norm_after else self.out_norm
        y_BTD = (y_BTD if norm is None else norm(y_BTD)) * self.multiplier
        return x_BTD + y_BTD if self.stream is None else self.stream.add(x_BTD, y_BTD, weights), state


class AmfmPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and first values of weights."""

    config_class = AmfmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The loss divides by the number of items of all pieces of a batch where the caller gives it.
    accepts_loss_kwargs = True
    _no_split_modules: ClassVar[list[str]] = ["AmfmBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    # Its state cannot be cut back to an earlier token, which assisted generation would need.
    _is_stateful = True

    def post_init(self) -> None:
        """Name the parameters that stay in float32: choosing experts and decay are sensitive to rounding."""
        names = ("router.weight", "router.bias", "expert_bias", "A_log", "dt_bias", "gate_bias", "bound_logit")
        present = [name for name in self.state_dict() if name.endswith(names)]
        self._keep_in_fp32_modules_strict = {name for name in names if any(key.endswith(name) for key in present)}
        super().post_init()

    def _flash_attn_can_dispatch(self, *args: Any, **kwargs: Any) -> bool:
        """Reject flash attention where blocks could not use it: their masks, or widths of values, are their own."""
        others = ["window", "mla", *(name for name, form in PACKAGE_MIXERS.items() if hasattr(form, "is_softmax"))]
        found = [letter for letter in self.config.mixer_symbols() if LETTERS.get(letter, letter.strip("{}")) in others]
        if found:
            raise ValueError(
                f"flash attention does not serve the block {found[0]} of the pattern; use attn_implementation="
                f"'{'eager' if self._has_sinks() else 'sdpa'}'"
            )
        if self._has_sinks():
            raise ValueError("flash attention has no sinks here; use attn_implementation='eager'")
        if any(section.get("indexer") for section in self.config.sections_of("attention")):
            raise ValueError(
                "flash attention does not read the keys that an indexer chooses; use attn_implementation='sdpa'"
            )
        return super()._flash_attn_can_dispatch(*args, **kwargs)

    def _sdpa_can_dispatch(self, *args: Any, **kwargs: Any) -> bool:
        """Reject PyTorch's attention where heads have sinks, which it does not take; transformers then takes `eager`."""
        if self._has_sinks():
            raise ValueError("PyTorch's attention has no sinks; use attn_implementation='eager'")
        return super()._sdpa_can_dispatch(*args, **kwargs)

    def _has_sinks(self) -> bool:
        """Whether attention that reads the mask of the chosen implementation has sinks."""
        return any(own.get("sinks") for kind in ("attention", "mla") for own in self.config.sections_of(kind))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give a new module its first values."""
        give_first_values(module, self.config.initializer_range)


class AmfmModel(AmfmPreTrainedModel):
    """Embedding, blocks of the pattern, norm. The multiplier of the logits is in what it returns, so that any head may follow."""

    def __init__(self, config: AmfmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([AmfmBlock(index, config) for index in range(len(config.letters()))])
        self.norm, self.final_stream = make_norm(config), make_stream(config, len(config.letters()))
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: AmfmCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids [B, T] or embeddings [B, T, D], after those of `cache`, to the normed stream [B, T, D].

        attention_mask [B, all tokens so far]: 0 is padding, on the left when generating. position_ids or seq_idx [B, T], or
        cu_seq_lens_q [documents + 1] of one flat row: the documents of packed sequences. hidden_states: the embeddings, the stream
        after each block, the last one normed. Raises TypeError for an argument that the class does not take.
        """
        cache = take_cache(kwargs) if cache is None else cache
        check_arguments(type(self).__name__, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if cache is not None:
            cache = as_own_cache(cache, len(self.layers))
        x_BTD = inputs_embeds * self.config.multipliers["embedding"]
        stretches = self._find_stretches(x_BTD, input_ids, attention_mask, cache, position_ids, seq_idx, cu_seq_lens_q)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and len(stretches) == 1
        elif use_cache and len(stretches) > 1:
            raise ValueError(
                "use_cache=True with several documents in a sequence: a state would be of the last one; leave it out"
            )
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = AmfmCache(len(self.layers))
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        streams = [x_BTD]
        for index, block in enumerate(self.layers):
            state = None if cache is None else cache.states[index]
            x_BTD, state = block(x_BTD, stretches, state, keeps_state=bool(use_cache))
            if use_cache and cache is not None:
                cache.states[index] = state
            streams += [x_BTD if self.final_stream is None else self.final_stream.total(x_BTD)] if keeps else []
        if use_cache and cache is not None:
            cache.num_tokens += x_BTD.shape[1]
        read_BTD = x_BTD if self.final_stream is None else self.final_stream(x_BTD)[0]
        hidden_BTD = self.norm(read_BTD) * self.config.multipliers["logits"]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            cache=cache if use_cache else None,
            hidden_states=(*streams[:-1], hidden_BTD) if keeps else None,
        )

    def _find_stretches(
        self,
        x_BTD: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: AmfmCache | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> list[Stretch]:
        """Divide the rows into stretches: one for all rows, or one per document of packed sequences."""
        rows, tokens, _ = x_BTD.shape
        seen = 0 if cache is None else cache.num_tokens
        text_BS = read_text_mask(attention_mask, rows, seen, tokens)
        text_BT = None if text_BS is None else text_BS[:, seen:]
        places = find_documents(rows, tokens, text_BT, position_ids, seq_idx, cu_seq_lens)
        if places is not None and cache is not None and seen:
            raise ValueError("a document begins behind tokens of the cache; give each document its own call")
        if places is not None and is_deepspeed_zero3_enabled():
            raise ValueError(
                "packed sequences under DeepSpeed's ZeRO 3: ranks with other numbers of documents would wait for each other's "
                "weights; use ZeRO 2, or one document per sequence"
            )
        stretches = []
        for place in places or [(slice(None), slice(None))]:
            text = None if text_BS is None else text_BS[place[0], place[1] if places else slice(None)]
            text = None if text is None or (places and bool(text.all())) else text
            if position_ids is None:
                positions = count_positions(place, text, seen, tokens, x_BTD.device)
            else:
                positions = position_ids.expand(rows, -1)[place] if places else position_ids
            mask = create_causal_mask(self.config, x_BTD[place], text, cache)
            tokens_BT = None if input_ids is None else input_ids[place]
            stretches.append(Stretch(place, positions, text, mask, tokens_BT))
        return stretches


class AmfmForCausalLM(AmfmPreTrainedModel, GenerationMixin):
    """Language model; a generated token costs constant time but in attention."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AmfmConfig) -> None:
        super().__init__(config)
        self.model = AmfmModel(config)
        self.lm_head = build_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: AmfmCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, T, V], and the loss with labels, which are shifted inside; -100 does not count.

        Arguments are those of `AmfmModel`. logits_to_keep: the last so many, or these tokens; 0: all. num_items_in_batch: what
        the sum of the losses is divided by, in place of the number of labels here.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if kwargs.get(name) is not None}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=take_cache(kwargs) if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **{name: value for name, value in kwargs.items() if name not in LOSS_ARGUMENTS},
        )
        hidden_BTD = outputs.last_hidden_state
        has_labels = labels is not None or "shift_labels" in loss_arguments
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            if has_labels:
                raise ValueError(
                    f"logits_to_keep={logits_to_keep} with labels: the loss needs all logits; leave one of them out"
                )
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            logits_BTV = self.lm_head(hidden_BTD[:, kept]).float()
        else:
            places = self._find_documents(hidden_BTD, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
            logits_BTV = (by_document(self.lm_head, hidden_BTD, places) if places else self.lm_head(hidden_BTD)).float()
        loss = None
        if has_labels:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def _find_documents(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> list[Place] | None:
        rows, tokens, _ = x_BTD.shape
        text_BT = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        return find_documents(rows, tokens, text_BT, position_ids, seq_idx, cu_seq_lens)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Begin with an empty `AmfmCache`, or continue with one that was given."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={wanted!r}: blocks keep states in an AmfmCache; leave it out")
        if model_kwargs.get("cache") is not None:
            as_own_cache(model_kwargs["cache"], len(self.model.layers))._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = AmfmCache(len(self.model.layers))


class AmfmForSequenceClassification(GenericForSequenceClassification, AmfmPreTrainedModel):
    """Scores of a whole text, read from its last token: for classification and as a reward model."""

    def __init__(self, config: AmfmConfig) -> None:
        # The generic class would ask AutoModel for the base model, and that for trust in these very files.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = AmfmModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache under its name of before transformers 5.24."""
    return kwargs.pop("past_key_values", None)


def check_arguments(name: str, kwargs: dict[str, Any]) -> None:
    """Reject arguments that would be ignored: TypeError for unknown ones, ValueError for what the class does not return."""
    for key, value in kwargs.items():
        if key in NOT_RETURNED:
            if value:
                raise ValueError(f"{name}: {key}={value}: {NOT_RETURNED[key]}; leave it out")
        elif key == "is_causal" and value is False:
            raise ValueError(f"{name}: is_causal=False: states are read from left to right; leave it out")
        elif key not in HARMLESS:
            raise TypeError(f"{name}: {key} is not an argument of an amfm model, and would be ignored; leave it out")
