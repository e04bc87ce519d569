"""What a teacher of distillation takes (docs/distillation.md): its weights, a forward pass, the comparison, or a store of what it said.

Its forward pass is a third of what forward and backward passes of its blocks take; the comparison makes the model's logits and
their gradients a second time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.exchanges.seconds import pass_seconds
from amfm.launch.plan.expert_time import expert_exchange_seconds
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.roofline import head_seconds
from amfm.launch.plan.time import StepTime, block_seconds
from amfm.model.config.schema import ModelConfig
from amfm.model.divergence import SLICE
from amfm.model.flops import flops_per_token
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.distillation.store import StoreLayout
from amfm.pretrain.distillation.teacher import find_model

SLICE_TENSORS = 6  # logits of both, their log probabilities, products, gradients


def teacher_of(config: RunConfig) -> ModelConfig | None:
    """The model that reads each micro-batch of a run; None without one, and where its files are not on this machine."""
    section = config.distill
    return None if section is None or section.store is not None else _read(section.teacher)


@lru_cache(maxsize=8)
def _read(path: str) -> ModelConfig | None:
    """Read once: a search asks for each layout."""
    return find_model(path) if Path(path).exists() else None


def store_bytes(config: RunConfig) -> int | None:
    """Bytes of the store of a run's teacher; None for a run without one."""
    return None if config.distill is None or config.distill.store is None else StoreLayout.of_run(config).num_bytes()


def teacher_bytes(config: RunConfig, layout: Layout, storage: Storage) -> dict[str, float]:
    """Bytes of a teacher's weights on a rank, which nothing but tensor and expert ranks cut."""
    teacher = teacher_of(config)
    if teacher is None:
        return {}
    (held,) = held_by_stages(teacher, replace(layout, pipeline=1, virtual_stages=1), config.train.sequence_length)
    return {"teacher": float(storage.element_bytes * held.parameters)}


def comparison_bytes(config: RunConfig, layout: Layout, storage: Storage) -> dict[str, float]:
    """Bytes of a comparison with the teacher: a slice of logits, and the gradients of the head until the backward pass."""
    if config.distill is None:
        return {}
    model, tokens, k = config.model, layout.tokens(config), config.distill.top_k
    logits = SLICE_TENSORS * FLOAT32_BYTES * min(SLICE, tokens * model.vocab_size)
    read = storage.element_bytes * tokens * model.hidden_size
    head = (FLOAT32_BYTES + storage.element_bytes) * model.vocab_size / layout.tensor * model.hidden_size
    said = tokens * k * (8 + FLOAT32_BYTES) if config.distill.store is not None and k is not None else 0.0
    return {"comparison with the teacher": logits + read + head + said}


def with_teacher(
    step: StepTime, config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage, imbalance: float
) -> StepTime:
    """A step's seconds with those of a teacher and of the comparison with it."""
    if config.distill is None:
        return step
    seconds, teacher = head_seconds(config, layout, hardware, storage), teacher_of(config)
    if teacher is not None:
        alone = config.model_copy(update={"model": teacher, "distill": None})
        plain = replace(layout, recompute=frozenset())
        (held,) = held_by_stages(teacher, plain, config.train.sequence_length)
        block = {
            (symbol, False): block_seconds(alone, symbol, plain, hardware, storage, imbalance)
            for symbol in set(held.letters)
        }
        seconds += sum(block[symbol, False] for symbol in held.letters) / 3
        seconds += head_seconds(alone, plain, hardware, storage) / 3
        seconds += sum(pass_seconds(alone, plain, hardware, held, overlap=0.0).values()) / 2
        experts = expert_exchange_seconds(
            alone, plain, hardware, storage, held, imbalance=imbalance, sent_rows=1.0, block=block
        )
        seconds += experts[0] / 2
    return replace(step, compute=step.compute | {"teacher": layout.micro_batches(config) * seconds})


def teacher_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of a token in a teacher's forward pass."""
    teacher = teacher_of(config)
    return (
        {} if teacher is None else {"teacher": sum(flops_per_token(teacher, config.train.sequence_length).values()) / 3}
    )


def describe_missing(config: RunConfig) -> str:
    """What to know of a teacher that the plan cannot count; empty when it can."""
    if config.distill is None or config.distill.store is not None or teacher_of(config) is not None:
        return ""
    return (
        f"distill.teacher={config.distill.teacher} is not on this machine, so its weights (2 bytes per parameter in bf16, cut over "
        "tensor and expert ranks) and its forward pass are not counted"
    )
