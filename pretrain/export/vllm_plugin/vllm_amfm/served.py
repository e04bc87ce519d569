"""Which models of ours vLLM's parts can serve, by the fields of config.json; it imports nothing, and the export asks it too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LETTERS = {
    "M": "mamba2",
    "*": "attention",
    "E": "moe",
    "-": "feed_forward",
    "C": "short_conv",
    "G": "gated_deltanet",
    "H": "hgrn2",
    "K": "kda",
    "L": "lightning",
    "P": "deltaproduct",
    "W": "window",
    "+": "mla",
}
SERVED = ("mamba2", "attention", "moe", "feed_forward", "short_conv", "gated_deltanet", "window", "mla")
# Blocks that keep a state of one size, and those that keep keys and values.
STATEFUL = ("mamba2", "short_conv", "gated_deltanet")
ATTENDING = ("attention", "window", "mla")


def block_names(fields: Mapping[str, Any]) -> list[str]:
    """Name the block of each place of the pattern."""
    return [LETTERS.get(symbol, symbol.strip("{}")) for symbol in re.findall(r"\{[a-z0-9_]+\}|.", fields["pattern"])]


def unserved(fields: Mapping[str, Any]) -> list[str]:
    """List what keeps vLLM from serving the model, block by block, each as block, rule and remedy; empty: it is served."""
    names = set(block_names(fields))
    mixers = fields.get("mixers") or {}
    reasons = [f"the block {name}: vLLM has no part that it could run on" for name in sorted(names - {*SERVED, "kda"})]
    if "kda" in names:
        reasons.append("the block kda: vLLM's part for it needs a GPU, and was not tried")
    if "gated_deltanet" in names:
        reasons += _unserved_delta(mixers["gated_deltanet"])
    if "mla" in names:
        options = mixers["mla"]
        size = options["nope_head_dim"] + options["rope_head_dim"]
        if options["value_head_dim"] > size:
            reasons.append(
                f"the block mla: value_head_dim={options['value_head_dim']} is above the {size} of its keys, and its keys and "
                "values lie in one cache; use narrower values"
            )
    return reasons


def _unserved_delta(options: Mapping[str, Any]) -> Iterator[str]:
    if options.get("allow_negative_eigenvalues"):
        yield "the block gated_deltanet: allow_negative_eigenvalues=true, and beta of vLLM's part is below 1; use false"
    if not options["conv_kernel"]:
        yield "the block gated_deltanet: conv_kernel=0, and vLLM's part always convolves; use 2 to 4"


def attention_sizes(fields: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """Query heads, key heads and the size of a head of `attention`, `window` or `mla`."""
    if name == "attention":
        section = fields["attention"]
        return section["num_heads"], section["num_kv_heads"], section["head_dim"]
    options = fields["mixers"][name]
    if name == "mla":
        return options["num_heads"], options["num_heads"], options["nope_head_dim"] + options["rope_head_dim"]
    return options["num_heads"], options["num_kv_heads"] or options["num_heads"], options["head_dim"]
