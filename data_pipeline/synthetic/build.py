"""Build the synthetic task that `data.synthetic` configures.

All tasks share one flat section, so that a benchmark can vary the task by one key. A setting that the chosen task does not
read is rejected, because a run with it would look like another experiment than it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amfm.data_pipeline.synthetic.draws import SyntheticTask
from amfm.data_pipeline.synthetic.tasks import AssociativeRecall, SelectiveCopying, WordProblem

if TYPE_CHECKING:
    from amfm.data_pipeline.config import SyntheticConfig  # pydantic takes longer to import than everything here

# Which settings of `data.synthetic` each task reads, next to its name.
SETTINGS: dict[str, tuple[str, ...]] = {
    "mqar": ("num_pairs", "num_keys", "num_values"),
    "overwriting": ("num_pairs", "num_writes", "num_keys", "num_values"),
    "selective_copying": ("num_copied", "num_symbols"),
    "parity": (),
    "s3": (),
    "s4": (),
    "a5": (),
    "s5": (),
}


def build_task(config: SyntheticConfig) -> SyntheticTask:
    """Build the task of a configuration.

    Raises ValueError for settings that do not fit together, and for one that is set but not read by the task.
    """
    unread = [
        name
        for name, field in type(config).model_fields.items()
        if name not in ("task", *SETTINGS[config.task]) and getattr(config, name) != field.default
    ]
    if unread:
        known = ", ".join(SETTINGS[config.task]) or "none"
        raise ValueError(
            f"{unread[0]}={getattr(config, unread[0])} has no effect on the synthetic task {config.task}, whose settings are: "
            f"{known}; remove it"
        )
    if config.task == "mqar":
        return AssociativeRecall(config.num_pairs, 1, config.num_keys, config.num_values)
    if config.task == "overwriting":
        return AssociativeRecall(config.num_pairs, config.num_writes, config.num_keys, config.num_values)
    if config.task == "selective_copying":
        return SelectiveCopying(config.num_copied, config.num_symbols)
    return WordProblem(config.task)
