"""A gradient that is changed on its way, as a faulty device would: by a hook, for which autograd has to get it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def spoil_gradient(weight: nn.Parameter, spoil: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Pass every gradient of a weight through `spoil` until what is returned is called."""
    place = vars(weight).pop("gradient_sum", None)
    handle = weight.register_hook(spoil)

    def stop() -> None:
        handle.remove()
        if place is not None:
            weight.gradient_sum = place  # type: ignore[attr-defined]

    return stop
