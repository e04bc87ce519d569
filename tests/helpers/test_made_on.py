"""Tensors of a test land on the device that it runs on."""

import torch

from tests.examples.mixers import diags
from tests.helpers import deltas, scans
from tests.helpers.made_on import MadeOn
from tests.kernels import test_attention, test_linear_cross_entropy


def test_factories_land_on_the_device_unless_they_name_another() -> None:
    generator = torch.Generator().manual_seed(1)
    with MadeOn(torch.device("meta")):
        leaf = torch.randn(3, generator=generator, requires_grad=True)
        assert leaf.device.type == "meta" and leaf.is_leaf and leaf.requires_grad
        assert torch.tensor([1, 2]).device.type == torch.zeros(2).device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert (leaf * 2).device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_inputs_of_the_kernels_tests_follow_the_device() -> None:
    with MadeOn(torch.device("meta")):
        scan = scans.make_inputs(scans.ScanCase(lengths=(20, 43), initial=True), torch.float32)
        delta = deltas.make_delta_inputs(deltas.DeltaCase(lengths=(20, 43), initial=True), torch.float32)
        made = [*scan.tensors, scan.initial, scan.documents, *scan.weights, *delta.leaves().values(), delta.documents]
        made += diags.make(diags.DiagCase(lengths=(20, 43), initial=True), torch.float32).values()
        made += test_attention.make_inputs(1, 5, 5, 2, 1, 4)
        made += test_linear_cross_entropy.make_inputs(5, 9, 4, torch.float32)
    assert {tensor.device.type for tensor in made} == {"meta"}
