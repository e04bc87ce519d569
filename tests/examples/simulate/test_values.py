"""What a simulated rank knows of integers that began on the host, against the same operations on real tensors."""

import torch
from amfm_simulate.tracer import Tracer
from amfm_simulate.values import KnownValues
from torch._subclasses.fake_tensor import FakeTensorMode


def document_ids():
    return torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)


def traced(run):
    """What `run` gives when its operations are fake and its integers are carried along, as real tensors."""
    tracer = Tracer(torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), tracer:
        result = run()
        return {name: tracer.values.read(tensor) for name, tensor in result.items()}


def layout_of(ids_BT):
    """Where documents begin, whose number no shape says, and the place of each token in its own."""
    starts_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
    starts_BT[:, 1:] = torch.diff(ids_BT, dim=1) > 0
    starts = starts_BT.flatten().nonzero().flatten()
    column_T = torch.arange(ids_BT.shape[1])
    positions_BT = column_T - torch.where(starts_BT, column_T, 0).cummax(1).values
    return {"starts": torch.cat([starts, starts.new_tensor([ids_BT.numel()])]), "positions": positions_BT}


def test_documents_of_a_fake_batch_are_those_of_the_real_one():
    real = {name: tensor.tolist() for name, tensor in layout_of(document_ids()).items()}
    assert traced(lambda: layout_of(document_ids().clone())) == real


def test_views_share_what_is_written_and_unknown_numbers_are_forgotten():
    def run():
        counts = torch.zeros(6, dtype=torch.int64)
        counts[2:4] = 7
        pairs = counts.view(3, 2)
        pairs[:, 1].add_(1)
        spoilt = torch.zeros(2, dtype=torch.int64)
        spoilt.copy_(torch.rand(2))
        return {"counts": counts, "spoilt": spoilt}

    assert traced(run) == {"counts": [0, 1, 7, 8, 0, 1], "spoilt": None}


def test_a_value_ends_with_its_storage():
    values = KnownValues()
    with FakeTensorMode():
        fake = torch.empty(3, dtype=torch.int64)
    values.record(fake, torch.tensor([1, 2, 3]))
    assert values.read(fake) == [1, 2, 3]
    del fake
    assert not values.twins
