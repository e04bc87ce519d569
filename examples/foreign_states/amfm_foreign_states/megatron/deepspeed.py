"""The names and forms that Megatron-DeepSpeed's GPT model has in DeepSpeed's universal layout, both ways.

Read at commit 4efb479 of github.com/deepspeedai/Megatron-DeepSpeed (`megatron/model/`) and in DeepSpeed 0.19
(`ds_to_universal.py`, `universal_checkpoint.py`). A layer is two blocks of ours, `*` and then `-`. Their two models have
different names and forms of the same tensors:

- GPTModelPipe, of pipeline stages, numbers its parts: 0 casts, 1 embeds, layers follow, then the last norm and the head.
  A tied embedding is `tied_modules.embed`.
- GPTModel, of `--no-pipeline-parallel`, has `language_model.encoder.layers.3...`; ZeRO 2 and 3 need it.
- `query_key_value` holds blocks of queries, keys and values. Until December 2024 (pull request 441, which brought FPDT) a
  block was a key-value head's; since then it is a tensor rank's, and only as many key-value heads as query heads work. What
  wrote a folder is told by its arguments. We write one block, and the older form for fewer key-value heads.
- `dense_h_to_4h` of a gated layer is gate and then up, as ours.
- The converter takes the padding off the vocabulary, and their loader puts zeros there for its own number of ranks;
  so does an import whose `model.vocab_size` is larger.

A file says how tensor ranks share its tensor: `cat_dim`, and `param_n_sub_params` where each part is shared on its own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.fields import Wanted, unfit_multipliers, unfit_settings, unfit_softmax_scale
from amfm.model.on_demand import Shape, Source
from amfm_foreign_states.rows import OwnNames, interleave, pad, part_of, unflatten

GptKind = Literal["pipeline", "plain"]
PEER, OTHER = "Megatron-DeepSpeed's GPT model", "another format"
FUSED = "self_attention.query_key_value.weight"
QKV = ("q_proj", "k_proj", "v_proj")
VOCABULARY = ("embedding.weight", "head.weight")
# Our names in a block, and theirs in a layer.
BLOCKS = {
    "*": {
        "norm.weight": "input_layernorm.weight",
        **{f"mixer.{name}.weight": FUSED for name in QKV},
        "mixer.o_proj.weight": "self_attention.dense.weight",
    },
    "-": {
        "norm.weight": "post_attention_layernorm.weight",
        "mixer.up_proj.weight": "mlp.dense_h_to_4h.weight",
        "mixer.down_proj.weight": "mlp.dense_4h_to_h.weight",
    },
}
CUT_COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
# An argument of those since pull request 441.
NEW_ARGUMENT = "ds_sequence_parallel_fpdt"
ATTENTION: Wanted = {
    "qk_norm": (False, "queries and keys are not normed"),
    "gate": ("none", "attention has no gate"),
    "bias": (False, "projections are read without biases"),
    "sinks": (False, "attention has no sinks"),
}
ROPE: Wanted = {"scaling": ("none", "rotations are not stretched")}
DENSE: Wanted = {
    "linear_kind": ("dense", "matrices are whole"),
    "activation_limit": (None, "nothing is limited"),
    "bias": (False, "matrices are read without biases"),
}
MODEL: Wanted = {
    "norm": ("rmsnorm", "norms are RMSNorms"),
    "num_depths": (0, "there is no multi-token prediction"),
    "self_guided_training": (None, "matrices have no guide"),
    "lora_mixer": (None, "there are no routed updates"),
    "mup": (None, "all groups have one learning rate"),
}
MISSING = {"E": "DeepSpeed keeps the experts of its MoE layer outside the universal layout"}


def find_kind(names: Sequence[str]) -> GptKind | None:
    """Which of the two models the names of a folder are of; None: of neither."""
    if not any(name.endswith(FUSED) for name in names):
        return None
    return "plain" if any(name.startswith("language_model.") for name in names) else "pipeline"


def check_expressible(model: ModelConfig, where: object) -> None:
    """Raise ValueError for a model that Megatron-DeepSpeed's GPT model cannot be, naming blocks and settings."""
    reasons = []
    pairs = list(zip(model.letters[0::2], model.letters[1::2]))
    if len(model.letters) % 2 or set(pairs) != {("*", "-")}:
        unknown = sorted(set(model.letters) - set(BLOCKS))
        why = "".join(f"; {symbol}: {MISSING[symbol]}" for symbol in unknown if symbol in MISSING)
        found = f"has blocks {', '.join(unknown)}" if unknown else "is not a row of pairs"
        reasons.append(
            f"model.pattern={model.pattern} {found}: each layer of {PEER} is attention and a feed-forward, *-{why}"
        )
    reasons += unfit_settings("model", model, PEER, MODEL, OTHER) + unfit_multipliers(model, PEER, other=OTHER)
    attention, dense = model.attention, model.feed_forward
    reasons += unfit_settings("model.attention", attention, PEER, ATTENTION, OTHER)
    reasons += unfit_settings("model.feed_forward", dense, PEER, DENSE, OTHER)
    if attention is not None:
        reasons += unfit_settings("model.attention.rope", attention.rope, PEER, ROPE, OTHER)
        reasons += unfit_softmax_scale(attention, PEER, OTHER)
        if attention.rope.theta != int(attention.rope.theta):
            reasons.append(f"model.attention.rope.theta={attention.rope.theta}: {PEER} needs integers")
    if dense is not None and dense.activation not in ("swiglu", "squared_relu"):
        reasons.append(f"model.feed_forward.activation={dense.activation}: {PEER} has swiglu and squared_relu")
    if reasons:
        raise ValueError(f"{where}: {'; '.join(reasons)}")


@dataclass(frozen=True)
class GptNames(OwnNames):
    """Parameters of a model that `check_expressible` lets pass, by the names of one of the two models.

    `blocks`: of rows of queries, keys and values in `query_key_value`.
    """

    model: ModelConfig
    kind: GptKind
    blocks: int

    def theirs(self, name: str) -> str:
        """The name of the folder where a parameter of ours is."""
        return self.table.get(name, name)

    @cached_property
    def table(self) -> dict[str, str]:
        """Their name for each of our parameters; queries, keys and values of a block have the same."""
        layers, is_plain = len(self.model.letters) // 2, self.kind == "plain"
        if is_plain:
            first, last, head = "language_model.embedding", "language_model.encoder.final_layernorm", "output_layer"
        else:
            first, last, head = "tied_modules.embed", f"{layers + 2}", f"{layers + 3}.lm_head"
            first = first if self.model.tie_embeddings else "1"
        named = {"embedding.weight": f"{first}.word_embeddings.weight"}
        for index, symbol in enumerate(self.model.letters):
            layer = f"language_model.encoder.layers.{index // 2}" if is_plain else f"{index // 2 + 2}"
            named |= {f"blocks.{index}.{ours}": f"{layer}.{theirs}" for ours, theirs in BLOCKS[symbol].items()}
        named["final_norm.weight"] = f"{last}.weight"
        if not self.model.tie_embeddings:
            named["head.weight"] = f"language_model.{head}.weight" if is_plain else f"{head}.weight"
        return named

    def write(self, ours: Mapping[str, Source]) -> dict[str, Source]:
        """Their tensors, of weights or of one kind of moments."""
        grouped: dict[str, list[Source]] = {}
        for name, theirs in self.table.items():
            grouped.setdefault(theirs, []).append(ours[name])
        return {name: interleave(of, self.blocks) if len(of) > 1 else of[0] for name, of in grouped.items()}

    def extras(self, name: str) -> dict[str, Any]:
        """What a file says of how tensor ranks share the tensor of their name."""
        if name.endswith(("word_embeddings.weight", "lm_head.weight", "output_layer.weight")):
            return {"cat_dim": 0, "vocab_tensor": True}
        if name.endswith(CUT_COLUMNS):
            return {"cat_dim": 1}
        assert self.model.feed_forward is not None, "each layer has a feed-forward"
        is_gated = self.model.feed_forward.activation == "swiglu"
        parts = 2 if name.endswith("dense_h_to_4h.weight") and is_gated else 1
        if name.endswith(FUSED) and self.blocks == 1:
            parts = 3
        return {"cat_dim": 0} | ({"param_n_sub_params": parts} if parts > 1 else {})

    def read(self, theirs: Mapping[str, Source], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Source]]:
        """Iterate over our tensors of a folder, by our names; what it lacks is left out.

        A vocabulary without padding gets that of the model, in zeros.
        """
        for name, their_name in self.table.items():
            source, shape = theirs.get(their_name), shapes[name]
            if source is None:
                continue
            if their_name.endswith(FUSED):
                own = name.rpartition(".mixer.")[2].removesuffix(".weight")
                rows = [shapes[name.replace(own, part)][0] for part in QKV]
                whole = unflatten(source, (sum(rows), *shape[1:]))
                yield name, part_of(whole, rows, QKV.index(own), self.blocks)
            elif name in VOCABULARY:
                numel = torch.Size(source.shape).numel()
                yield name, pad(unflatten(source, (numel // shape[1], shape[1])), shape[0])
            else:
                yield name, unflatten(source, shape)


def name_for_export(model: ModelConfig, kind: GptKind, where: object) -> GptNames:
    """The names to write a model in. Raises ValueError for one that their GPT model cannot be."""
    check_expressible(model, where)
    assert model.attention is not None, "each layer has attention"
    groups = model.attention.num_kv_heads
    return GptNames(model, kind, 1 if groups == model.attention.num_heads else groups)


def find_blocks(attention: AttentionConfig, arguments: Any, where: object) -> int:
    """Blocks of rows in `query_key_value` of a folder, by the arguments of the run that wrote it.

    Raises ValueError if both orders are possible and nothing tells which.
    """
    if attention.num_kv_heads != attention.num_heads:
        return attention.num_kv_heads
    if arguments is None:
        raise ValueError(
            f"{where} has no arguments of Megatron-DeepSpeed (`args`), which tell how query_key_value orders its rows; keep "
            "the client state when the checkpoint is saved"
        )
    if not hasattr(arguments, NEW_ARGUMENT):
        return attention.num_heads
    ranks = getattr(arguments, "tensor_model_parallel_size", None)
    if not isinstance(ranks, int) or ranks < 1 or attention.num_heads % ranks:
        raise ValueError(f"{where}: tensor_model_parallel_size={ranks!r} does not divide {attention.num_heads} heads")
    return ranks


def describe_arguments(record: Mapping[str, Any], model: ModelConfig, sequence_length: int) -> Namespace:
    """The arguments of Megatron-DeepSpeed for this model and its place in training, as far as it compares them."""
    attention, dense = model.attention, model.feed_forward
    assert attention is not None and dense is not None, "check_expressible was not called"
    is_rotary = attention.positions == "rope"
    grouped = attention.num_kv_heads != attention.num_heads
    return Namespace(
        num_layers=len(model.letters) // 2,
        hidden_size=model.hidden_size,
        ffn_hidden_size=dense.hidden_size,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        kv_channels=attention.head_dim,
        normalization="rmsnorm",
        layernorm_epsilon=model.norm_epsilon,
        swiglu=dense.activation == "swiglu",
        squared_relu=dense.activation == "squared_relu",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        add_position_embedding=False,
        use_rotary_position_embeddings=is_rotary,
        rope_theta=int(attention.rope.theta),
        rotary_percent=attention.rope.fraction,
        seq_length=sequence_length,
        max_position_embeddings=sequence_length,
        padded_vocab_size=model.vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=record["state"]["progress"]["tokens"] // sequence_length,
        consumed_valid_samples=0,
        **({} if grouped else {NEW_ARGUMENT: False}),
    )


def describe_client(record: Mapping[str, Any], model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """What Megatron-DeepSpeed asks of a checkpoint next to the model: place in training, arguments, its schedule's
    state.

    The schedule's settings are its program's own, so it must be told to keep them (--override-opt_param-scheduler).
    """
    arguments = describe_arguments(record, model, sequence_length)
    tokens = record["state"]["progress"]["tokens"]
    settings = ("max_lr", "min_lr", "lr_decay_style")
    counts = [f"lr_{phase}_{unit}" for phase in ("warmup", "decay") for unit in ("steps", "tokens")]
    schedule = dict.fromkeys([*settings, *counts]) | {
        "num_steps": arguments.consumed_train_samples,
        "num_tokens": tokens,
    }
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": record["step"],
        "tokens": tokens,
        "lr_scheduler": schedule,
    }
