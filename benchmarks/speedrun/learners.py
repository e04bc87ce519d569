"""What learns: our model under our engine, and classes of transformers with a plain loop, each a step and a held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from amfm.data_pipeline.batch import Batch
from amfm.launch.bench.kernels import multiplies_bf16
from amfm.model.flops import count_parameters
from amfm.model.huggingface.classes import TokenIds, huggingface_config
from amfm.model.loss import IGNORE_INDEX
from amfm.pretrain.config.schema import RunConfig, ScheduleConfig
from amfm.pretrain.micro_batch import MicroBatches
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.stages import learning_rate
from benchmarks.small_steps import accumulate_gradients, build_for_steps
from benchmarks.speedrun.ways import Way

PLACES = 1000  # of a schedule, which follows the share of the seconds that are spent
CHUNK = 64  # of a scan in transformers on a processor: faster than its default
# Of the peer, by the width of our model: layers, heads, key-value heads, inner width; with a vocabulary of 2,048 as many
# parameters as are active in tiny_cpu and in active_20m.yaml.
LLAMAS = {192: (5, 6, 2, 512), 512: (6, 8, 2, 1536)}


class Learner(Protocol):
    """Takes steps at a share of its schedule, and measures held-out loss: nats and tokens."""

    active: int
    precision: str

    def step(self, batches: Sequence[Batch], share: float) -> None:
        """One optimizer step over these micro-batches."""

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The sum of negative log-likelihoods, and of how many tokens."""


class Ours:
    """A configuration's model under our engine."""

    def __init__(self, config: RunConfig, parallel: Parallel, rate: float) -> None:
        self.config, self.parallel, self.rate = config, parallel, rate
        self.engine, _ = build_for_steps(config, parallel)
        self.active = count_parameters(config.model).active
        self.precision: str = config.train.precision

    def step(self, batches: Sequence[Batch], share: float) -> None:
        """As `amfm train` steps, with the rate of the configuration's schedule."""
        sums = accumulate_gradients(self.config, self.parallel, self.engine, None, batches)
        self.engine.step(rate_at(share, self.config.schedule, self.rate))
        self.engine.module.update_expert_bias(sums.expert_counts)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The main loss only."""
        self.engine.module.eval()
        nats = 0.0
        with torch.inference_mode():
            for given in MicroBatches(batches, self.parallel, self.config.model)[:]:
                nats += float(self.engine.forward(given.tokens_BT, given.meta, given.labels_BT).loss.nll_sum)
        self.engine.module.train()
        return nats, sum(int(batch.loss_mask_BT.sum()) for batch in batches)


class Peer:
    """A class of transformers with clipping, warm-up and cosine, AdamW or Muon, as plain PyTorch code.

    Documents of a sequence see each other, as they do without a mask.
    """

    def __init__(self, model: Any, rate: float, *, muon: bool, autocast: bool, active: int) -> None:
        self.model, self.rate, self.autocast, self.active = model.train(), rate, autocast, active
        self.precision = "bf16 (autocast)" if autocast else "float32"
        self.schedule = ScheduleConfig(kind="cosine", min_ratio=0.1)
        named = list(model.named_parameters())
        inner = [each for name, each in named if muon and each.ndim == 2 and ".layers." in name]
        rest = [each for _, each in named if not any(each is one for one in inner)]
        groups = [
            {"params": [each for each in rest if each.ndim >= 2], "weight_decay": 0.1},
            {"params": [each for each in rest if each.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        ]
        if inner:
            self.optimizers.append(torch.optim.Muon(inner, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))

    def step(self, batches: Sequence[Batch], share: float) -> None:
        """A mean over the tokens of all micro-batches, one norm, one step."""
        tokens = sum(int(batch.loss_mask_BT.sum()) for batch in batches)
        for batch in batches:
            (self.nats(batch) / tokens).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(share, self.schedule, self.rate)
            optimizer.step()
            optimizer.zero_grad()

    def nats(self, batch: Batch) -> torch.Tensor:
        """The sum of negative log-likelihoods of a micro-batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits_BTV = self.model(input_ids=batch.tokens_BT, use_cache=False).logits
        return functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """With the weights as they are."""
        self.model.eval()
        with torch.inference_mode():
            nats = sum(float(self.nats(batch)) for batch in batches)
        self.model.train()
        return nats, sum(int(batch.loss_mask_BT.sum()) for batch in batches)


def rate_at(share: float, schedule: ScheduleConfig, peak: float) -> float:
    """The rate of a step that begins when a share of the seconds is spent."""
    place = min(PLACES, 1 + int(share * PLACES))
    return learning_rate(place, schedule, peak=peak, total_steps=PLACES)


def build_learner(way: Way, config: RunConfig, parallel: Parallel, rate: float) -> Callable[[bool], Learner]:
    """What makes the way's learner, of which a peer may be asked to multiply in bf16."""
    if way.kind == "amfm":
        return lambda _: Ours(config, parallel, rate)
    make = {"llama": build_llama, "nemotron_h": build_nemotron}[way.kind]

    def build(autocast: bool) -> Learner:
        torch.manual_seed(config.train.seed)
        model = make(config)
        active = count_parameters(config.model).active
        if way.kind == "llama":
            active = sum(each.numel() for each in model.parameters())
        return Peer(model, rate, muon=way.muon, autocast=autocast, active=active)

    return build


def build_llama(config: RunConfig) -> Any:
    """A Llama as transformers initializes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = config.model.hidden_size
    layers, heads, key_heads, inner = LLAMAS[width]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.model.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            intermediate_size=inner,
            max_position_embeddings=config.train.sequence_length,
            tie_word_embeddings=False,
        )
    )


def build_nemotron(config: RunConfig) -> Any:
    """A NemotronH of the configuration's shapes, as transformers initializes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = huggingface_config(
        config.model, "nemotron_h", TokenIds(0, 0, 0), max_position_embeddings=config.train.sequence_length
    )
    known = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    theirs = AutoConfig.for_model("nemotron_h", **known | {"chunk_size": CHUNK})
    return AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)


def may_multiply_bf16(way: Way) -> bool:
    """Whether a peer is to be tried with products in bf16."""
    return way.kind != "amfm" and multiplies_bf16(torch.device("cpu"))
