"""The tests that transformers holds its own models to, on our modelling file: a module for pytest in a checkout of theirs.

`test_transformers_suite.py` runs it in a separate process, whose package `tests` is the checkout's.
"""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from amfm.pretrain.export.modeling_template.configuration_amfm import AmfmConfig
from amfm.pretrain.export.modeling_template.modeling_amfm import (
    AmfmForCausalLM,
    AmfmForSequenceClassification,
    AmfmModel,
)
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor

AutoConfig.register("amfm", AmfmConfig)
AutoModel.register(AmfmConfig, AmfmModel)
AutoModelForCausalLM.register(AmfmConfig, AmfmForCausalLM)
AutoModelForSequenceClassification.register(AmfmConfig, AmfmForSequenceClassification)
# By these names their tests know which class has which labels.
modeling_auto.MODEL_MAPPING_NAMES["amfm"] = "AmfmModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["amfm"] = "AmfmForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["amfm"] = "AmfmForSequenceClassification"


class AmfmModelTester:
    """Sizes and inputs, as their tests ask for them. The configuration comes from `AMFM_SUITE_CONFIG`, a folder with config.json."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads
        self.num_labels = self.type_sequence_label_size = 3

    def get_config(self) -> Any:
        return AmfmConfig.from_pretrained(os.environ["AMFM_SUITE_CONFIG"])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class AmfmModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (AmfmModel, AmfmForCausalLM, AmfmForSequenceClassification)
    all_generative_model_classes = (AmfmForCausalLM,)
    model_tester_class = AmfmModelTester
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = AmfmModelTester(self)

    def _check_caches_are_equal(self, first: Any, second: Any) -> None:
        """Compare the states of our cache, which has no layers of theirs."""
        assert first.num_tokens == second.num_tokens and len(first.states) == len(second.states)
        for left, right in zip(first.states, second.states, strict=True):
            for one, other in zip(left or (), right or (), strict=True):
                torch.testing.assert_close(one, other)
