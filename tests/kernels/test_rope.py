"""Rotary positions against the pair-by-pair reference, and frequencies against transformers."""

import pytest
import torch

from amfm.kernels.rope.op import Llama3Numbers, qk_norm_rope, rope_frequencies

# One rounding an operation; float32 angles at positions below a hundred carry 1e-5 of themselves at most.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


def run(backend, dtype, *, tokens=63, heads=4, kv_heads=1, size=16, fraction=1.0, norm=True, rotate=True):
    generator = torch.Generator().manual_seed(tokens)

    def make(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, k = make(2, tokens, heads, size), make(2, tokens, kv_heads, size)
    q_weight, k_weight = make(size), make(size)
    positions = torch.arange(tokens).remainder(17).expand(2, tokens)
    frequencies, factor = rope_frequencies(size, theta=100.0, fraction=fraction)
    outputs = qk_norm_rope(
        q,
        k,
        positions,
        frequencies if rotate else None,
        factor * 1.25,
        q_weight_K=q_weight if norm else None,
        k_weight_K=k_weight if norm else None,
        backend=backend,
    )
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum() for y in outputs)
    leaves = (q, k, q_weight, k_weight) if norm else (q, k)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 63},
        {"fraction": 0.5},
        {"norm": False},
        {"rotate": False},
        {"norm": False, "fraction": 0.25, "heads": 3, "kv_heads": 3},
        {"norm": False, "rotate": False},
    ],
)
def test_torch_path_equals_the_reference_in_outputs_and_gradients(sizes):
    wanted = run("reference", torch.float64, **sizes)
    for dtype, tolerance in TOLERANCE.items():
        for got, want in zip(run("torch", dtype, **sizes), wanted):
            assert (got - want).norm() <= tolerance * want.norm()


def test_gradients_pass_gradcheck():
    torch.manual_seed(1)
    q, k = torch.randn(1, 3, 2, 8, dtype=torch.float64), torch.randn(1, 3, 1, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    frequencies, factor = rope_frequencies(8, theta=50.0, fraction=0.5)

    def compute(q, k, q_weight, k_weight):
        return qk_norm_rope(
            q, k, torch.tensor([[0, 1, 5]]), frequencies, factor, q_weight_K=q_weight, k_weight_K=k_weight
        )

    leaves = [x.clone().requires_grad_() for x in (q, k, weight, weight * 2)]
    assert torch.autograd.gradcheck(compute, leaves)


def test_rotation_agrees_with_the_llama_code_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(2)
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    positions = torch.arange(9).expand(2, 9)
    frequencies, factor = rope_frequencies(16, theta=10_000.0)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    wanted = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin(), unsqueeze_dim=2)
    for got, want in zip(qk_norm_rope(q, k, positions, frequencies, factor), wanted):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("fraction", "truncate"), [(1.0, True), (0.5, True), (1.0, False)])
def test_frequencies_agree_with_transformers(head_dim, fraction, truncate):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = {"rope_theta": 500_000.0, "partial_rotary_factor": fraction}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0, **base}
    yarn["truncate"] = truncate
    config = LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=32768, rope_parameters=yarn
    )  # fmt: skip
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    got, factor = rope_frequencies(
        head_dim, theta=500_000.0, fraction=fraction, scaling="yarn", yarn_factor=8.0, yarn_original_length=4096,
        yarn_beta_fast=24.0, yarn_truncate=truncate,
    )  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor, rel=1e-12)

    # Their dynamic scaling at the trained length times n is theta * n^(d / (d - 2)): ours with alpha = n.
    config = LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, **base},
    )  # fmt: skip
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=4096 * 50)
    got, factor = rope_frequencies(head_dim, theta=500_000.0, fraction=fraction, scaling="ntk", ntk_alpha=50.0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert factor == 1.0


def test_llama3_frequencies_agree_with_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    theirs |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, head_dim=128, max_position_embeddings=131072, rope_parameters=theirs
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    got, factor = rope_frequencies(128, theta=500_000.0, scaling="llama3", llama3=Llama3Numbers(8.0, 8192))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert factor == 1.0
    with pytest.raises(ValueError, match="scaling=linear needs linear_factor, and nothing else reads it"):
        rope_frequencies(128, theta=500_000.0, scaling="linear")
    with pytest.raises(ValueError, match="scaling=llama3 needs llama3, and nothing else reads it"):
        rope_frequencies(128, theta=500_000.0, scaling="llama3")


def test_compiled_result_is_the_eager_one():
    q, k, weight = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(8)
    frequencies, factor = rope_frequencies(8, theta=50.0)

    def compute(q, k):
        return qk_norm_rope(q, k, torch.arange(5)[None], frequencies, factor, q_weight_K=weight, k_weight_K=weight)

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), compute(q, k))


def test_bad_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match="must be even"):
        rope_frequencies(6, theta=10.0, fraction=0.5)
    with pytest.raises(ValueError, match="needs ntk_alpha"):
        rope_frequencies(8, theta=10.0, scaling="ntk")
    with pytest.raises(ValueError, match="nothing else reads it"):
        rope_frequencies(8, theta=10.0, yarn_factor=4.0)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8)
    positions = torch.arange(5)[None]
    with pytest.raises(ValueError, match="heads have only 8"):
        qk_norm_rope(q, k, positions, torch.ones(5), 1.0)
    with pytest.raises(ValueError, match="positions_BT must have shape"):
        qk_norm_rope(q, k, positions[0], torch.ones(4), 1.0)
    with pytest.raises(ValueError, match="k_BTJK must have shape"):
        qk_norm_rope(q, k[..., :4], positions, torch.ones(4), 1.0)
