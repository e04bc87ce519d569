"""Active forgetting: the embedding begins anew every so many steps, with first values of a seed of its own.

The rest of the model then learns what does not depend on one table of embeddings, so that another one (of another
language, say) is learnt faster later (Chen et al. 2023, arXiv 2307.01163). A function of the step: nothing more is saved.
"""

from __future__ import annotations

from amfm.model.init import initial_values, named_seed
from amfm.pretrain.checkpoint.masters import MasterView
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.run import Run

EMBEDDING = "embedding.weight"


def forget_if_due(run: Run) -> None:
    """Give the embedding new first values and zero moments, if the step just done is one for it. Every rank must call this."""
    section, step = run.config.forget, run.progress.step
    if section is None or step > section.until_step or step % section.every_steps:
        return
    model = run.config.model
    seed = named_seed(run.config.train.seed, f"forget.{step // section.every_steps}")
    values = initial_values(EMBEDDING, (model.vocab_size, model.hidden_size), model, seed)
    view = MasterView(run.saver.layout, run.saver.writers, ranks_of(run.engine).rank)
    view.write({EMBEDDING: values})
    run.note_edit()
    run.record_event("forgot", parameter=EMBEDDING)
    run.say(f"step {step}: the embedding begins anew")
