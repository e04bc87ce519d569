"""Names and shapes of all weights of a model, only from its configuration.

So a checkpoint is checked and converted without building the model: one mixer of each kind is built without storage and asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from amfm.model.build import sample_mixer, stream_shapes
from amfm.model.config.schema import ModelConfig
from amfm.model.loss import head_shapes
from amfm.model.routed_updates import update_shapes


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of our model (the router's bias buffer included), in order."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    width = config.hidden_size

    def add_norm(name: str) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in config.norm_parts()})

    def add_reader(name: str, *, is_final: bool) -> None:
        found = stream_shapes(config, is_final=is_final)
        shapes.update({f"{name}.{part}": shape for part, shape in found.items()})

    def add_blocks(prefix: str, letters: Sequence[str]) -> None:
        for index, letter in enumerate(letters):
            add_norm(f"{prefix}blocks.{index}.norm")
            if not prefix:
                add_reader(f"blocks.{index}.stream", is_final=False)
            if config.norms_per_block() == 2:
                add_norm(f"{prefix}blocks.{index}.out_norm")
            place = index if not prefix and config.block_options(letter).differs_by_block() else None
            for name, shape in block_shapes(config, letter, place).items():
                shapes[f"{prefix}blocks.{index}.mixer.{name}"] = shape
            for name, shape in update_shapes(config, letter).items():
                shapes[f"{prefix}blocks.{index}.{name}"] = shape

    add_blocks("", config.letters)
    add_norm("final_norm")
    add_reader("final_stream", is_final=True)
    if config.head is not None:
        shapes |= {f"head.{name}": shape for name, shape in head_shapes(config).items()}
    elif not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, width)
    for depth in range(config.num_depth_modules):
        own = f"mtp.{depth}."
        add_norm(f"{own}embed_norm")
        add_norm(f"{own}stream_norm")
        shapes[f"{own}in_proj.weight"] = (width, 2 * width)
        add_blocks(own, config.parsed_pattern.depth_letters)
        add_norm(f"{own}norm")
    return shapes


def block_shapes(config: ModelConfig, letter: str, index: int | None = None) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of a kind of block, without its norm.

    index: of the block, where blocks of the kind differ; by default the first.
    """
    return {name: tuple(tensor.shape) for name, tensor in sample_mixer(config, letter, index).state_dict().items()}
