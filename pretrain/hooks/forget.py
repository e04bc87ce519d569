"""Active forgetting: the embedding is re-initialised every N steps, with first values of its own seed.

The rest of the model then learns what does not depend on one table of embeddings, so that another one (of another
language, for example) is learnt faster later (Chen et al. 2023, arXiv 2307.01163). A function of the step: nothing more is
saved.
"""

from __future__ import annotations

from amfm.model.init import initial_values, named_seed
from amfm.pretrain.config.pruning import ForgetConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult

EMBEDDING = "embedding.weight"


class Forget(Hook):
    """Gives the embedding new first values and zero moments, as the section `forget` asks for it."""

    def __init__(self, section: ForgetConfig, run: Run) -> None:
        self.run, self.section = run, section

    def after_step(self, result: StepResult) -> None:
        """Forget if the step just done is one for it."""
        run, section, step = self.run, self.section, self.run.progress.step
        if step > section.until_step or step % section.every_steps:
            return
        model = run.config.model
        seed = named_seed(run.config.train.seed, f"forget.{step // section.every_steps}")
        values = initial_values(EMBEDDING, (model.vocab_size, model.hidden_size), model, seed)
        run.open_masters().write({EMBEDDING: values})
        run.note_edit()
        run.tell("forgot", f"step {step}: the embedding is re-initialised", parameter=EMBEDDING)
