"""The plug-in of vLLM that an export with our own modelling files brings, and what keeps vLLM from serving a model.

`vllm_plugin/` has the plug-in's code. Next to it stands what installing would write (`*.dist-info`, with the entry
point `vllm.general_plugins`), so that the folder on PYTHONPATH is all that vLLM needs, in each of its processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import amfm.pretrain.export.vllm_plugin
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import find_target, known_refusals
from amfm.model.huggingface.hf_class import Target
from amfm.model.huggingface.own import MODELING_VERSION, own_fields
from amfm.model.huggingface.refusals import NO_SQUARED_RELU_EXPERTS, Refusal
from amfm.pretrain.export.vllm_plugin.vllm_amfm.served import ATTENDING, attention_sizes, block_names, unserved

PLUGIN_FOLDER = "vllm_plugin"
PACKAGE = "vllm_amfm"
# Of vLLM's attention on a CPU.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def is_served(config: ModelConfig) -> bool:
    """Whether vLLM has parts for all blocks of the model."""
    return not unserved(own_fields(config))


def write_plugin(config: ModelConfig, folder: Path) -> None:
    """Write the plug-in into an export's folder, if vLLM can serve the model."""
    if not is_served(config):
        return
    code = Path(amfm.pretrain.export.vllm_plugin.__file__).parent / PACKAGE
    package, record = (
        folder / PLUGIN_FOLDER / PACKAGE,
        folder / PLUGIN_FOLDER / f"{PACKAGE}-{MODELING_VERSION}.dist-info",
    )
    package.mkdir(parents=True)
    record.mkdir()
    for path in sorted(code.glob("*.py")):
        (package / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    metadata = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {MODELING_VERSION}\n"
    (record / "METADATA").write_text(metadata, encoding="utf-8")
    (record / "entry_points.txt").write_text(f"[vllm.general_plugins]\namfm = {PACKAGE}:register\n", encoding="utf-8")


def export_refusals(config: ModelConfig, target: Target, tokenizer_kind: str) -> list[Refusal]:
    """List what named programs reject of an export: what is known of its class, and of our own what the plug-in cannot serve."""
    refusals = known_refusals(config, target, tokenizer_kind)
    return [*refusals, *_plugin_refusals(config)] if find_target(target).ships_code else refusals


def _plugin_refusals(config: ModelConfig) -> Iterator[Refusal]:
    fields = own_fields(config)
    reasons = unserved(fields)
    yield from (Refusal("vllm", reason) for reason in reasons)
    if reasons:
        return
    names = dict.fromkeys(block_names(fields))
    if "moe" in names and fields["moe"]["activation"] != "swiglu":
        yield Refusal("vllm", NO_SQUARED_RELU_EXPERTS)
    for name in names:
        size = attention_sizes(fields, name)[2] if name in ATTENDING else CPU_HEAD_SIZES[0]
        if size not in CPU_HEAD_SIZES:
            yield Refusal("vllm", f"heads of {size} in {name} have no kernel on a CPU; use one of {CPU_HEAD_SIZES}")
    if "gated_deltanet" in names:
        yield Refusal("vllm", "it runs gated_deltanet only in bf16; give it dtype=bfloat16", by_setting=True)
