"""The models that `amfm init` offers: sizes of the ladder of presets, in the styles of four published families.

A size says how wide and deep a model is and how it is trained; a style says which blocks it has and how they are built.
Nemotron's style of a size from 20m on is the preset of that size under configs/, which a test compares with this table; at 30B,
Nemotron's and Granite's are the published models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SWIGLU_SHARE = 2 / 3  # of the width of squared ReLU: three matrices instead of two (Shazeer 2020, arXiv 2002.05202)

SHORT_RUN_STEPS = 1_000


@dataclass(frozen=True)
class Size:
    """One rung of the ladder: shapes with Nemotron's blocks, and the run that suits them.

    Widths of experts are those of squared ReLU. `pattern`: of mixers `M` or `*` and experts `E`, or dense blocks `-` of the width
    that a token passes of them, which families of experts only do not have. `delta_pattern`: about
    the same depth, in groups of three Gated DeltaNet blocks and one of attention. `sequence_length` in tokens,
    `global_batch_size` in sequences per step.
    """

    pattern: str
    delta_pattern: str
    vocab_size: int
    hidden_size: int
    mamba: tuple[int, int, int]  # heads of 64, state numbers, groups
    attention: tuple[int, int, int]  # heads, key-value heads, width of a head
    experts: tuple[int, int, int, int]  # experts, choices per token, width, width of the shared one
    sequence_length: int
    global_batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int


SIZES = {
    # Trains in minutes on a laptop. So small a model learns more per second with dense blocks (docs/benchmarks/speedrun.md);
    # configs/tiny_cpu.yaml has its width, and experts, because it shows every kind of block.
    "3m": Size(
        pattern="(M-)*2 *- (M-)*2",
        delta_pattern="(GE)*3 *E",
        vocab_size=2_048,
        hidden_size=192,
        mamba=(6, 32, 1),
        attention=(6, 2, 32),
        experts=(8, 2, 96, 192),
        sequence_length=512,
        global_batch_size=64,
        steps=2_000,
        learning_rate=4.0e-3,
        warmup_steps=100,
    ),
    "20m": Size(
        pattern="(ME)*3 *E (ME)*2",
        delta_pattern="((GE)*3 *E)*2",
        vocab_size=16_384,
        hidden_size=256,
        mamba=(8, 64, 1),
        attention=(4, 2, 64),
        experts=(16, 2, 192, 384),
        sequence_length=1024,
        global_batch_size=64,
        steps=10_000,
        learning_rate=2.0e-3,
        warmup_steps=500,
    ),
    "150m": Size(
        pattern="((ME)*4 *E)*2 ME",
        delta_pattern="((GE)*3 *E)*3",
        vocab_size=32_768,
        hidden_size=512,
        mamba=(16, 128, 2),
        attention=(8, 2, 64),
        experts=(32, 4, 256, 512),
        sequence_length=2048,
        global_batch_size=256,
        steps=12_000,
        learning_rate=1.2e-3,
        warmup_steps=600,
    ),
    "1b": Size(
        pattern="((ME)*4 *E)*2 (ME)*2",
        delta_pattern="((GE)*3 *E)*3",
        vocab_size=65_536,
        hidden_size=1024,
        mamba=(32, 128, 8),
        attention=(16, 4, 64),
        experts=(64, 6, 480, 960),
        sequence_length=4096,
        global_batch_size=512,
        steps=15_000,
        learning_rate=8.0e-4,
        warmup_steps=750,
    ),
    "8b": Size(
        pattern="((ME)*4 *E)*2 (ME)*3",
        delta_pattern="((GE)*3 *E)*3",
        vocab_size=65_536,
        hidden_size=2048,
        mamba=(64, 128, 8),
        attention=(16, 4, 128),
        experts=(128, 6, 1024, 2048),
        sequence_length=4096,
        global_batch_size=1024,
        steps=50_000,
        learning_rate=5.0e-4,
        warmup_steps=2_000,
    ),
    "30b": Size(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        delta_pattern="((GE)*3 *E)*6",
        vocab_size=131_072,
        hidden_size=2688,
        mamba=(64, 128, 8),
        attention=(32, 2, 128),
        experts=(128, 6, 1856, 3712),
        sequence_length=8192,
        global_batch_size=3072,
        steps=100_000,
        learning_rate=1.0e-3,
        warmup_steps=2_000,
    ),
}

STYLES = {
    "nemotron": "Mamba2, few attention blocks without positions, experts of squared ReLU with a sigmoid router",
    "granite": "Mamba2, few attention blocks without positions, SwiGLU experts with a softmax router",
    "qwen3next": "three Gated DeltaNet blocks to one of attention with rotary positions, SwiGLU experts",
    "turbos": "Mamba2 and attention with rotary positions and normed queries and keys, SwiGLU experts",
}

# Granite 4.0 H-Small (its public config.json), instead of the 30B of the table.
_GRANITE_30B: dict[str, Any] = {
    "pattern": "(ME)*5 *E ((ME)*9 *E)*3 (ME)*4",
    "vocab_size": 100_352,
    "hidden_size": 4096,
    "mamba": (128, 128, 1),
    "attention": (32, 8, 128),
}


def size_of(name: str, style: str) -> Size:
    """The size in a style; Granite's 30B has published shapes of its own."""
    size = SIZES[name]
    return replace(size, **_GRANITE_30B) if (name, style) == ("30b", "granite") else size


def model_section(name: str, style: str, size: Size | None = None) -> dict[str, Any]:
    """The `model` section of a size in a style, as plain values for a configuration file.

    `size`: shapes that are not in the table, under any other name.
    """
    size = size or size_of(name, style)
    section: dict[str, Any] = {
        "pattern": pattern_of(size, name, style),
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
    }
    if style == "granite" and name == "30b":
        section["tie_embeddings"] = True
    heads, state, groups = size.mamba
    if style == "qwen3next":
        options = {"num_heads": heads, "head_dim": 64, "num_key_heads": heads // 2 if heads % 2 == 0 else heads}
        section["mixers"] = {"gated_deltanet": options}
    else:
        section["mamba"] = {"num_heads": heads, "head_dim": 64, "state_size": state, "num_groups": groups}
        section["mamba"] |= {"chunk_size": 128} if name == "30b" else {}
    section["attention"] = attention_section(size, style)
    if "-" in section["pattern"]:
        _, top_k, width, shared = size.experts
        return section | {"feed_forward": {"hidden_size": top_k * width + shared}}
    section["moe"] = moe_section(size, name, style)
    return section


def pattern_of(size: Size, name: str, style: str) -> str:
    """Block pattern of a size in the letters of the style's family."""
    if style == "nemotron":
        return size.pattern
    if style == "qwen3next":
        return size.delta_pattern
    pattern = with_experts(size).pattern
    if style == "turbos":
        pairs = "((ME)*4 AE)*4 (ME)*4" if name == "30b" else pattern.replace("*E", "AE")
        return pairs.replace("E", "F")
    return pattern


def with_experts(size: Size) -> Size:
    """The size with experts for dense blocks."""
    return replace(size, pattern=size.pattern.replace("-", "E"))


def attention_section(size: Size, style: str) -> dict[str, Any]:
    """The `attention` section: heads and their width, with rotary positions where the style has them."""
    heads, kv_heads, head_dim = size.attention
    section: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return section | ({"qk_norm": True, "positions": "rope"} if style in ("qwen3next", "turbos") else {})


def moe_section(size: Size, name: str, style: str) -> dict[str, Any]:
    """The `moe` section: experts, router and load balancing of the style."""
    experts, top_k, width, shared = size.experts
    if style == "granite" and name == "30b":
        experts, top_k, width, shared = 72, 10, 768, 1536
    elif style != "nemotron":
        width, shared = narrow(width), narrow(shared)
    section: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "expert_hidden_size": width}
    section["shared_expert_hidden_size"] = shared
    if style != "nemotron":
        return section | {"activation": "swiglu", "router": "softmax", "auxiliary_loss_weight": 1.0e-3}
    section |= {"activation": "squared_relu", "router": "sigmoid"}
    section |= {"routed_scaling": 2.5} if name == "30b" else {}
    return section | {
        "expert_bias": True,
        "bias_update_rate": bias_update_rate(size.steps),
        "sequence_loss_weight": 1.0e-4,
    }


def bias_update_rate(steps: int) -> float:
    """Step of the balancing bias: a short run needs big ones, or its experts collapse before the bias has moved.

    At 1e-3 tiny_cpu kept one expert at 3.9 times the mean for all of its 240 steps, at 2e-2 it came to 1.2 to 1.4.
    """
    return 2.0e-2 if steps <= SHORT_RUN_STEPS else 1.0e-3


def narrow(width: int) -> int:
    """Width of SwiGLU experts with about the parameters of squared-ReLU ones of `width`; a multiple of 32."""
    return max(32, round(width * SWIGLU_SHARE / 32) * 32)


# One dial: a layer is a sequence mixer and the experts after it, and the width is 32 channels per layer, so that depth and width
# grow together and parameters as depth^3. `amfm study ladder` fits its laws to models of this shape.
CHANNELS_PER_LAYER = 32
HEAD_DIM = 32  # of attention
ATTENTION_EVERY = 6  # layers, as in ladder_20m
LEAST_DEPTH, MOST_DEPTH = 2, 64
EXPERTS, TOP_K = 16, 2


def dial_size(depth: int, width: int | None = None, vocab_size: int = 16_384) -> Size:
    """Shapes of a model of `depth` layers; `width` in channels: another than 32 per layer.

    Tokens, batch and rate are left at 0: they follow from laws and not from shapes. Raises ValueError for a depth out of
    2 to 64, and for a width that heads of 32 channels do not divide.
    """
    if not LEAST_DEPTH <= depth <= MOST_DEPTH:
        raise ValueError(f"depth {depth} must be from {LEAST_DEPTH} to {MOST_DEPTH} layers")
    width = CHANNELS_PER_LAYER * depth if width is None else width
    if width < 2 * HEAD_DIM or width % HEAD_DIM:
        raise ValueError(f"width {width} must be a multiple of {HEAD_DIM} from {2 * HEAD_DIM}")
    heads = width // HEAD_DIM
    return Size(
        pattern=" ".join(f"{letter}E" for letter in mixers(depth, "M", ATTENTION_EVERY)),
        delta_pattern=" ".join(f"{letter}E" for letter in mixers(depth, "G", 4)),
        vocab_size=vocab_size,
        hidden_size=width,
        mamba=(heads, 64 if width >= 256 else 32, 1),  # inner width twice the model's, in heads of 64
        attention=(heads, heads // 2 if heads % 2 == 0 else heads, HEAD_DIM),
        experts=(EXPERTS, TOP_K, width * 3 // 4, width * 3 // 2),
        sequence_length=0,
        global_batch_size=0,
        steps=0,
        learning_rate=0.0,
        warmup_steps=0,
    )


def mixers(depth: int, linear: str, every: int) -> str:
    """Letters of the sequence mixers: one attention block in every `every`, the first in the middle of a group."""
    first = min(every // 2, depth // 2)
    return "".join("*" if layer % every == first else linear for layer in range(depth))
