"""Write the weights folder of a shrunk model, once its logits are those of the pruned one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.progress import Report, silent
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.pretrain.export.export import proof_text
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.pruning.shrink import LOGIT_TOLERANCE, logit_difference, shrink_weights


@dataclass(frozen=True)
class ShrinkReport:
    """What was taken out: groups before and after by place, parameters, and what the verification compared."""

    path: Path
    model: ModelConfig
    counts: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    max_logit_difference: float
    compared: str


def shrink_checkpoint(checkpoint: str | Path, out_dir: str | Path, report: Report = silent) -> ShrinkReport:
    """Take groups of zeros out of a checkpoint (or a weights folder) and write OUT, whole or not at all.

    Raises ValueError where nothing is zero or OUT is in use, RuntimeError where logits differ.
    """
    out = Path(out_dir)
    check_free(out)
    weights = read_weights(checkpoint, report)
    if weights.model.lora_mixer is not None:
        raise ValueError(
            f"{weights.origin} has routed updates (model.lora_mixer), which are not made smaller; shrink first"
        )
    shrunk = shrink_weights(weights)
    report("comparing logits before and after")
    tokens_BT, _, compared = proof_text(weights)
    difference = logit_difference(weights, shrunk.weights, tokens_BT)
    if not difference <= LOGIT_TOLERANCE:  # NaN fails too
        raise RuntimeError(
            f"logits of the shrunk model differ by {difference:.1e} of the largest, at most {LOGIT_TOLERANCE:.0e} is "
            "allowed; nothing was written"
        )
    write_model(out, shrunk.weights)
    return ShrinkReport(
        out,
        shrunk.weights.model,
        shrunk.counts,
        count_parameters(weights.model).total,
        count_parameters(shrunk.weights.model).total,
        difference,
        compared,
    )
