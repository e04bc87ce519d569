"""What `train.freeze` leaves as it is: parameters that have no gradients, which no optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from amfm.model.hybrid import HybridModel
from amfm.pretrain.parallel import Parallel


def freeze_parameters(model: HybridModel, patterns: Sequence[str], parallel: Parallel) -> None:
    """Freeze each parameter that a pattern names, by its own name or that of a module around it.

    Engine, optimizer and checkpoints go by `requires_grad`. Collective: every rank must call this with its part of the
    model. Raises ValueError on all ranks for a pattern that no rank has a parameter of, and where a rank is left without
    any to train.
    """
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        matching = {pattern for pattern in patterns if any(fnmatchcase(module, pattern) for module in around)}
        if matching:
            parameter.requires_grad_(False)
            found |= matching
    is_idle = not any(parameter.requires_grad for parameter in model.parameters())
    answers: list[tuple[set[str], bool]] = parallel.gather_objects((found, is_idle))
    unknown = [pattern for pattern in patterns if not any(pattern in matched for matched, _ in answers)]
    if unknown:
        tops = sorted({name for name, _ in model.named_children()})
        raise ValueError(
            f"train.freeze names {', '.join(unknown)}, and the model has no such parameter or module; names begin with "
            f"{', '.join(tops)}, such as blocks.0.mixer, and `*` stands for any part (manifest.json of a checkpoint lists all)"
        )
    idle = [rank for rank, (_, alone) in enumerate(answers) if alone]
    if idle:
        raise ValueError(f"train.freeze leaves rank {idle[0]} nothing to train; name less, or use fewer pipeline ranks")
