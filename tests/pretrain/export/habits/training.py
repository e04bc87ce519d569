"""How users train: Trainer, checkpointed activations, adapters, data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.pretrain.export.habits.calling import refused_by_name
from tests.pretrain.export.habits.exported import Exported, assert_near, habit, tokens


def gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@habit()
def checkpointed_activations_give_the_same_gradients(export: Exported) -> None:
    model = export.fresh().train()
    inputs = {"input_ids": tokens(), "labels": tokens()}
    expected = gradients(model, **inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model, **inputs)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(found[name], gradient)


@habit()
def every_parameter_gets_a_gradient(export: Exported) -> None:
    model = export.fresh().train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients(model, input_ids=tokens(), labels=tokens()).keys() == names


@habit("accelerate")
def trainer_steps_the_same_with_a_batch_in_pieces(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import train_with_pieces

    whole = train_with_pieces(export, pieces=1)
    for pieces in (2, 4):
        found = train_with_pieces(export, pieces=pieces)
        assert abs(found.loss - whole.loss) < 1e-5 * whole.loss
        for name, weight in whole.weights.items():
            assert_near(found.weights[name], weight, 1e-5)


@habit("peft")
def adapters_on_every_linear_layer_learn_and_merge(export: Exported) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(export.fresh(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    head = export.model().get_output_embeddings()
    linear = [m for m in export.model().modules() if isinstance(m, nn.Linear) and m is not head]
    adapters = {name: part for name, part in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == len(linear)
    torch.manual_seed(0)
    for part in adapters.values():
        nn.init.normal_(part, std=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in adapters.values())
    before = model.eval()(tokens()).logits
    assert float((before - export.model()(tokens()).logits).abs().max()) > 1e-3
    assert_near(model.merge_and_unload()(tokens()).logits, before, 1e-4)


@habit("peft")
def learned_prompts_stand_before_the_text(export: Exported) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(export.fresh(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    loss = model(input_ids=tokens(), attention_mask=torch.ones(2, 12), labels=tokens()).loss
    loss.backward()
    (prompt,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert prompt.grad is not None and prompt.grad.abs().max() > 0


@habit("accelerate", slow=True)
def plain_data_parallel_ranks_average_their_gradients(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import gradients_of_two_ranks

    inputs = {"input_ids": tokens(2), "labels": tokens(2)}
    expected = gradients(export.fresh().train(), **inputs)
    for name, gradient in gradients_of_two_ranks(export).items():
        assert_near(gradient, expected[name])


@habit("trl", "peft", slow=True)
def trl_fine_tunes_with_its_defaults(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import losses_of_sft

    losses = losses_of_sft(export)
    assert losses[-1] < losses[0]


@habit("trl", "peft", slow=True)
def trl_fine_tunes_packed_rows(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import losses_of_sft

    with refused_by_name():
        losses = losses_of_sft(export, packing=True, max_length=64)
        assert losses[-1] < losses[0]


@habit("trl", slow=True)
def trl_prefers_with_dpo(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import losses_of_dpo

    losses = losses_of_dpo(export)
    assert losses[-1] < losses[0]


@habit("trl", slow=True)
def trl_rewards_with_grpo(export: Exported) -> None:
    from tests.pretrain.export.habits.trainer import steps_of_grpo

    assert steps_of_grpo(export) == 2
