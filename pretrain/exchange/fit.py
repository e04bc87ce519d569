"""Fits tensors of another format to the parameters of a model: all of them are there, in their shapes, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from amfm.model.on_demand import OnDemand, Shape, Source
from amfm.pretrain.engine.moments import moments_of

BUFFER = "buffer"
MAX_FAULTS = 8
# From kind (`weight`, a moment, `buffer`) and name to the key that a format has for it.
KeyOf = Callable[[str, str], str]
# Masters and moments by kind and name, and buffers.
Fitted = tuple[dict[str, dict[str, Source]], dict[str, Source]]


def fit_tensors(
    found: OnDemand,
    key_of: KeyOf,
    where: str,
    *,
    shapes: Mapping[str, Shape],
    labels: Mapping[str, str],
    buffers: Mapping[str, Shape],
    ignored: Collection[str] = (),
) -> Fitted:
    """Find masters and moments, by kind and name, and buffers under the keys of a format.

    `labels`: of the parameters' groups, which say what moments each has. Raises ValueError naming what is missing, surplus
    (`ignored` aside) or of another shape, in the format's keys.
    """
    keys = {
        key_of(kind, name): (kind, name, shape)
        for name, shape in shapes.items()
        for kind in ("weight", *moments_of(labels[name]))
    }
    keys |= {key_of(BUFFER, name): (BUFFER, name, shape) for name, shape in buffers.items()}
    faults = [f"{key} is missing" for key in keys if key not in found]
    faults += [
        f"{key} is {list(found.shape(key))}, the model says {list(shape)}"
        for key, (_, _, shape) in keys.items()
        if key in found and found.shape(key) != shape
    ]
    faults += [f"{key} does not belong" for key in sorted(found.keys() - keys.keys() - set(ignored))]
    if faults:
        more = f" and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ValueError(
            f"{where} does not fit the model: looked for {len(keys)} tensors, found {len(found)}; "
            f"{'; '.join(faults[:MAX_FAULTS])}{more}"
        )
    fitted: dict[str, dict[str, Source]] = {}
    for key, (kind, name, _) in keys.items():
        fitted.setdefault(kind, {})[name] = found.sources[key]
    return fitted, fitted.pop(BUFFER, {})


def shapes_of(entries: Mapping[str, Mapping[str, list[int]]]) -> dict[str, Shape]:
    """Shapes of the parameters or buffers that a record describes."""
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def one_step(steps: set[int], where: object) -> int:
    """The optimizer's counter, which all parameters must share. Raises ValueError where they do not."""
    if len(steps) != 1:
        raise ValueError(f"{where}: parameters were stepped {sorted(steps)} times; a run has one number for all")
    return steps.pop()
