"""How far our model is from each class of transformers: the table of docs/benchmarks/classes.md.

`python -m tests.model.huggingface.differences` measures and writes it: the classes of `families.py` as transformers made
them, the others as we write them (`cases.py`).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from amfm.model.huggingface.classes import BY_NAME, BY_TYPE, NATIVE_TARGETS, weight_map
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.model.huggingface.cases import TARGETED, build_ours
from tests.model.huggingface.families import CASES, VOCABULARY, made_by_transformers

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "classes.md"
TOKENS = 23


@dataclass(frozen=True)
class Differences:
    """The largest difference of logits, and of the gradient of a weight, relative to the largest number there."""

    logits: float
    gradients: float


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest number of theirs."""
    return float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-6)


def find_differences(ours: HybridModel, theirs: torch.nn.Module, target: str) -> Differences:
    """Compare logits and all gradients of both models on two rows of tokens."""
    tokens_BT = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    weight_BTV = torch.randn(2, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits_BTV = ours(tokens_BT, PackMeta.one_document_a_row(2, TOKENS)).logits_BTV
    assert logits_BTV is not None, "no labels were given"
    expected_BTV = theirs(tokens_BT, use_cache=False).logits
    assert float(expected_BTV.detach().std()) > 0.05, "the comparison would not see an error"
    (logits_BTV * weight_BTV).sum().backward()
    (expected_BTV * weight_BTV).sum().backward()
    found = gradients_by_our_name(ours, theirs, target)
    trained = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    assert trained.keys() == found.keys(), trained.keys() ^ found.keys()
    gradients = [relative_difference(gradient, found[name]) for name, gradient in trained.items()]
    return Differences(relative_difference(logits_BTV, expected_BTV), max(gradients))


def gradients_by_our_name(ours: HybridModel, theirs: torch.nn.Module, target: str) -> dict[str, Tensor]:
    """Gradients of the transformers model under our names; a tied weight's are the sum over its places."""
    from transformers.core_model_loading import revert_weight_conversion

    raw = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    mapping = weight_map(ours.config, target)
    on_disk = {
        mapping.aliases.get(name, name): tensor for name, tensor in revert_weight_conversion(theirs, raw).items()
    }
    weights, gradients = ours.state_dict(), dict[str, Tensor]()
    for entry in mapping.entries:
        if entry.ours.endswith("expert_bias") or not on_disk.keys() & set(entry.theirs):
            continue
        # Through the map itself: some of theirs are twice ours.
        own = {name: weights[name].detach().clone().requires_grad_() for name in entry.our_names()}
        parts = [(part, on_disk[name]) for name, part in entry.write(own).items() if name in on_disk]
        found = torch.autograd.grad([part for part, _ in parts], list(own.values()), [other for _, other in parts])
        for name, gradient in zip(own, found, strict=True):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return gradients


def measure() -> Iterator[tuple[str, Differences]]:
    """Every case, by its class."""
    from tests.model.huggingface.test_huggingface import load_into_transformers

    for kind, changes in CASES.values():
        with tempfile.TemporaryDirectory() as folder:
            theirs, state = made_by_transformers(kind, changes, Path(folder))
        found = BY_TYPE[kind]
        config = found.read(theirs.config.to_dict())
        ours = HybridModel(config, single_rank_groups(), seed=0).eval()
        ours.load_state_dict(dict(found.weights(config).to_ours(state)))
        yield found.name, find_differences(ours, theirs, found.name)
    for target, config in TARGETED.values():
        ours = build_ours(config)
        with tempfile.TemporaryDirectory() as folder:
            yield target, find_differences(ours, load_into_transformers(ours, Path(folder), target), target)


def main() -> None:
    """Write the page."""
    found = defaultdict[str, list[Differences]](list)
    for name, differences in measure():
        found[name].append(differences)
    lines = [HEAD, "| class | `model_type` | models | logits | gradients |", "|---|---|---|---|---|"]
    for name in sorted(NATIVE_TARGETS):
        cases = found[name]
        logits, gradients = (max(getattr(case, each) for case in cases) for each in ("logits", "gradients"))
        lines.append(f"| `{name}` | `{BY_NAME[name].model_type}` | {len(cases)} | {logits:.0e} | {gradients:.0e} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


HEAD = """# Classes of transformers

`amfm import` reads, and `amfm export` writes, these classes of transformers 5.24. `export.target: auto` takes the class that a released model came in as, or the first that computes exactly this model; a setting that a class has and our blocks have not is rejected with its name and value.

Each class was compared in several small models, in which every setting that changes values differs from the class's default: the largest difference of a logit and of a weight's gradient, relative to the largest one, in float32. Both sides add in another order. Tensors that are read and written again are equal bitwise, but for norms of `qwen3_next` and `qwen3_5_moe` below 0.5, which these classes store as an offset from 1.

`python -m tests.model.huggingface.differences` measures the table, on a CPU; `tests/model/huggingface` and `tests/pretrain/export/test_families.py` compare the same models, and train, export and generate.
"""

if __name__ == "__main__":
    main()
