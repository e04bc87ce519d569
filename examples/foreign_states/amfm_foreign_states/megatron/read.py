"""Megatron-Core's distributed checkpoints (`torch_dist`) of hybrid, attention and MoE models, read into our names.

Their sharded state dicts are torch Distributed Checkpoint underneath. What differs (megatron-core 0.16.1, `sharded_state_dict`
of models/, ssm/ and transformer/):

- A layer of MambaModel is one block of ours, a layer of GPTModel two, attention and what follows.
- Layers are numbered (`decoder.layers.3.mlp...`), or stacked in a first dimension (`decoder.layers.mlp...`); experts are
  stacked after that, or numbered.
- A norm before a matrix has the name that Transformer Engine's fused layer gives it (`linear_qkv.layer_norm_weight`).
- `linear_qkv` has, for each key-value head, its query heads, its key and its value; `linear_fc1` of gated layers is gate
  and up, `in_proj` and `conv1d` of Mamba are cut into `z x B C dt` and `x B C`.
- Moments have the model's keys behind `optimizer.state.exp_avg.`; float32 master weights of bf16 weights after
  `optimizer.state.fp32_param.`, or `.param.` where a distributed optimizer saved them. The counter is in `common.pt`.
  Other forms of a distributed optimizer: `buckets.py`.
- `in_proj` and `conv1d` of Gated DeltaNet are cut into `query key value z beta alpha`; a gate of attention stands after
  the queries of each group in `linear_qkv`. Depths of prediction are `mtp.layers.D`.

- Rotary channels of MLA are pairs there and halves here (`row_order`).

Every tensor must be taken, or it is rejected with an error: learned positions, biases that the model does not have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from amfm.data_pipeline.durable.json_files import read_object, read_word
from amfm.model.config.schema import ModelConfig
from amfm.model.on_demand import OnDemand, Shape, Source
from amfm.model.shapes import block_shapes
from amfm_foreign_states.dcp_folder import DcpFolder
from amfm_foreign_states.megatron.blocks import (
    EXPERTS,
    FUSED,
    NORMS,
    PARTS,
    UP_BIAS,
    check_fits,
    depth_names,
    extra_channels,
    fused_rows,
    key_heads,
    layers,
    names_of,
    norm_names,
    row_order,
)
from amfm_foreign_states.megatron.buckets import BUCKET, REMEDY, STATE, states_by_parameter
from amfm_foreign_states.rows import drop_channel_dim, join, part_of, permuted, resized, stacked, with_column
from amfm_foreign_states.torch_file import BUFFER, Fitted, find_steps, fit_tensors, one_step, read_common

DESCRIPTION, COMMON, LATEST = "metadata.json", "common.pt", "latest_checkpointed_iteration.txt"
# Of ranks with a distributed optimizer: the groups of its parameters, with the counter.
RANK = r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\."
GROUPS = re.compile(rf"{RANK}optimizer/.+")
# All states of a rank in one object (`dp_zero_gather_scatter`).
GATHERED = re.compile(rf"{RANK}param_state/.+")
# Float32 weights of the optimizer: of bf16 models without a distributed optimizer, and with one.
MASTERS = ("fp32_param", "param")
# Of the router: what it counted in the last step, which no run continues from.
COUNTS = ".local_tokens_per_expert"


def find_iteration(path: Path) -> Path:
    """The folder of the newest iteration where a path is one of several; else the path itself."""
    if (path / LATEST).is_file():
        text = read_word(path / LATEST)
        return path / (f"iter_{int(text):07d}" if text.isdecimal() else "release")
    return path


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a distributed checkpoint of Megatron-Core, or one of several."""
    return (find_iteration(path) / DESCRIPTION).is_file()


class MegatronFolder:
    """A distributed checkpoint of Megatron-Core as tensors by our names, for a model that the configuration describes.

    Raises ValueError if it is not whole, in another backend, or has a model that ours is not.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.path, self.model = find_iteration(path), model
        backend = read_object(self.path / DESCRIPTION).get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(
                f"{self.path / DESCRIPTION} has sharded_backend={backend!r}; torch_dist is read: save it again with --ckpt-format "
                "torch_dist"
            )
        check_fits(model, self.path)
        self.folder = DcpFolder(self.path)
        self.common = read_common(self.path / COMMON)
        self.keys: dict[str, dict[str, str]] = {"weight": {}}
        for key in [*self.folder.tensors, *filter(GATHERED.fullmatch, self.folder.values)]:
            matched = STATE.fullmatch(key)
            if matched is None and key.partition("optimizer.")[1]:
                self.refuse_unknown(key)
                continue
            kind, name = matched.groups() if matched else ("weight", key)
            self.keys.setdefault(kind, {})[name] = key
        for kind, keys in states_by_parameter(self.folder).items():
            self.keys[kind] = self.keys.get(kind, {}) | keys

    def has_moments(self) -> bool:
        """Whether AdamW's moments are there."""
        return "exp_avg" in self.keys

    def refuse_unknown(self, key: str) -> None:
        """Raise ValueError for optimizer state that is neither by parameters nor in buckets."""
        if BUCKET.fullmatch(key) is None:
            raise ValueError(f"{self.path}: {key} is optimizer state that is not read; {REMEDY}")

    def step(self, names: Collection[str]) -> int:
        """The optimizer's counter, one for all parameters. Raises ValueError if it is nowhere, or parameters differ in it."""
        groups = [self.folder.value(name) for name in self.folder.values if GROUPS.fullmatch(name)]
        steps = {step for found in (self.common.get("optimizer"), groups) for step in find_steps(found)}
        if not steps and isinstance(self.common.get("iteration"), int):
            steps = {self.common["iteration"]}
        if not steps:
            raise ValueError(f"{self.path / COMMON} has no step of the optimizer and no iteration; save it with both")
        return one_step(steps, self.path / COMMON)

    def fit(self, shapes: Mapping[str, Shape], labels: Mapping[str, str], buffers: Mapping[str, Shape]) -> Fitted:
        """Fit the folder's tensors to the model, as `fit_tensors` does."""
        found = self.found(("weight", "exp_avg", "exp_avg_sq") if self.has_moments() else ("weight",))
        return fit_tensors(found, key_of, str(self.path), shapes=shapes, labels=labels, buffers=buffers)

    def found(self, kinds: Sequence[str]) -> OnDemand:
        """All tensors of these kinds by kind and our name (`weight/NAME`); buffers count as weights.

        Raises ValueError for tensors that belong to no block of the model.
        """
        sources: dict[str, Source] = {}
        for kind in kinds:
            reading = Reading(self, kind)
            sources |= {f"{kind}/{name}": source for name, source in reading.model_tensors()}
            left = [key for key in self.keys[kind] if key not in reading.taken and not key.endswith(COUNTS)]
            if left:
                raise ValueError(
                    f"{self.path} does not fit the model: {', '.join(sorted(left)[:8])}{' ...' if len(left) > 8 else ''} of "
                    f"{len(self.keys[kind])} tensors ({kind}) belong to no block of pattern {self.model.pattern}"
                )
        return OnDemand(sources)


def key_of(kind: str, name: str) -> str:
    """The key of a tensor in `MegatronFolder.found`."""
    return f"{'weight' if kind == BUFFER else kind}/{name}"


class Reading:
    """Takes the tensors of one kind out of a folder, and remembers which."""

    def __init__(self, megatron: MegatronFolder, kind: str) -> None:
        self.folder, self.model = megatron.folder, megatron.model
        # Master weights in float32 stand for the weights that they step.
        masters = [megatron.keys.get(name, {}) for name in MASTERS] if kind == "weight" else []
        self.keys = megatron.keys[kind] | {key: found for keys in masters for key, found in keys.items()}
        self.is_pairs = "decoder.final_layernorm.weight" in megatron.keys["weight"]
        self.taken: set[str] = set()

    def model_tensors(self) -> Iterator[tuple[str, Source]]:
        """Iterate over our names and sources; those that are not there are left out."""
        yield from self.named("embedding.weight", self.whole("embedding.word_embeddings.weight"))
        for ours, symbol, layer, place in layers(self.model, is_pairs=self.is_pairs):
            for part in self.model.norm_parts():
                yield from self.named(f"{ours}norm.{part}", self.first(layer, place, norm_names(NORMS[symbol], part)))
            for name in block_shapes(self.model, symbol):
                yield from self.named(f"{ours}mixer.{name}", self.block_tensor(layer, place, symbol, name))
        for depth in range(self.model.num_depth_modules):
            for our_name, name in depth_names(self.model).items():
                yield from self.named(f"mtp.{depth}.{our_name}", self.whole(f"mtp.layers.{depth}.{name}"))
        last = "decoder.final_layernorm" if self.is_pairs else "decoder.final_norm"
        for part in self.model.norm_parts():
            yield from self.named(f"final_norm.{part}", self.whole(f"{last}.{part}"))
        if not self.model.tie_embeddings:
            yield from self.named("head.weight", self.whole("output_layer.weight"))

    def named(self, name: str, source: Source | None) -> Iterator[tuple[str, Source]]:
        """A source under its name, if there is one."""
        if source is not None:
            yield name, source

    def block_tensor(self, layer: str, place: int | None, symbol: str, name: str) -> Source | None:
        """The source of a tensor of ours in a block; None where it is not there."""
        if names := names_of(self.model, symbol, name):
            found, order = self.first(layer, place, names), row_order(self.model, symbol, name)
            return found if found is None or order is None else permuted(found, order)
        if name in PARTS.get(symbol, {}):
            base, parts = PARTS[symbol][name]
            return drop_channel_dim(
                self.at(layer, place, base) or self.joined([self.at(layer, place, f"{base}.{part}") for part in parts])
            )
        if name in EXPERTS:
            found, extra = self.experts(layer, place, EXPERTS[name]), extra_channels(self.model, name)
            if found is None or not extra:
                return found
            if name == "experts.down":
                return resized(found, found.shape[1] + extra, found.shape[2])
            bias = self.experts(layer, place, UP_BIAS)
            return found if bias is None else with_column(found, bias, extra)
        own, _, part = name.rpartition(".")
        fused = self.at(layer, place, f"{FUSED}.{part}")
        rows = fused_rows(self.model, symbol)
        if fused is None or own not in rows:
            return None
        return part_of(fused, list(rows.values()), list(rows).index(own), key_heads(self.model))

    def first(self, layer: str, place: int | None, names: Sequence[str]) -> Source | None:
        """A tensor that may have several names; our own exports have all, and all count as taken."""
        return next((found for found in [self.at(layer, place, name) for name in names] if found), None)

    def whole(self, key: str, lead: tuple[int, ...] = ()) -> Source | None:
        """A tensor by its key; gated matrices may be two tensors, gate (`_w`) and up (`_v`)."""
        if key in self.keys:
            self.taken.add(key)
            return self.folder.source(self.keys[key], lead)
        if f"{key}_w" in self.keys:
            return self.joined([self.whole(f"{key}_w", lead), self.whole(f"{key}_v", lead)])
        return None

    def at(self, layer: str, place: int | None, name: str) -> Source | None:
        """A tensor of a layer, numbered or at its place of a stack."""
        found = self.whole(f"{layer}{name}")
        return found or (None if place is None else self.whole(f"decoder.layers.{name}", (place,)))

    def experts(self, layer: str, place: int | None, name: str) -> Source | None:
        """The matrices or biases of all experts, [E, out, in] or [E, out]: a stack, or tensors by number."""
        stack = self.at(layer, place, f"mlp.experts.experts.{name}")
        if stack is not None:
            return stack
        assert self.model.moe is not None, "the pattern has E, the configuration no moe section"
        numbers = range(self.model.moe.num_experts)
        each = [self.at(layer, place, f"mlp.experts.experts.{number}.{name}") for number in numbers]
        present = [source for source in each if source is not None]
        return stacked(present) if len(present) == len(each) else None

    def joined(self, sources: Sequence[Source | None]) -> Source | None:
        """Tensors below each other; None if one is missing."""
        present = [source for source in sources if source is not None]
        return join([(source, 0, source.num_rows) for source in present]) if len(present) == len(sources) else None
