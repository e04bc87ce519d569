"""Activations against their formulas."""

from typing import get_args

import pytest
import torch

from amfm.kernels.swiglu import gate
from amfm.kernels.swiglu.gate import find_gate
from amfm.kernels.swiglu.op import plain_unit, squared_relu, swiglu
from amfm.model.config import structure

# One rounding an operation, a handful of operations.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


def limited(x, backend="torch"):
    return swiglu(x, find_gate("swiglu_oai@1.5"), backend=backend)


def limited_silu(x, backend="torch"):
    return swiglu(x, find_gate("swiglu@2.0"), backend=backend)


def geglu(x, backend="torch"):
    return swiglu(x, find_gate("geglu"), backend=backend)


def geglu_erf(x, backend="torch"):
    return swiglu(x, find_gate("geglu_erf"), backend=backend)


def gelu(x, backend="torch"):
    return plain_unit(x, "gelu", backend=backend)


def gelu_tanh(x, backend="torch"):
    return plain_unit(x, "gelu_tanh", backend=backend)


@pytest.mark.parametrize("shape", [(1, 2), (63, 10), (2, 3, 34)])
@pytest.mark.parametrize("activation", [swiglu, limited, limited_silu, geglu, geglu_erf, gelu, gelu_tanh, squared_relu])
def test_torch_path_equals_the_formula_in_output_and_gradient(activation, shape):
    for dtype, tolerance in TOLERANCE.items():
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64) * 3
        results = []
        for backend, precision in (("reference", torch.float64), ("torch", dtype)):
            leaf = x.to(dtype).to(precision).requires_grad_()
            y = activation(leaf, backend=backend)
            (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaf)
            results.append((y.detach(), grad))
        for wanted, got in zip(*results):
            assert (got - wanted).norm() <= tolerance * wanted.norm() + 1e-30


@pytest.mark.parametrize("activation", [swiglu, limited, geglu, geglu_erf, gelu, gelu_tanh, squared_relu])
def test_gradients_pass_gradcheck(activation):
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(activation, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("activation", [swiglu, limited, geglu, geglu_erf, gelu, gelu_tanh, squared_relu])
def test_bfloat16_rounds_once(activation):
    torch.manual_seed(2)
    x = torch.randn(40, 32).bfloat16()
    assert torch.equal(activation(x), activation(x.float()).bfloat16())


def test_large_inputs_stay_finite():
    x = torch.tensor([[-200.0, 1.0], [200.0, 1.0]], requires_grad=True)
    swiglu(x).sum().backward()
    assert torch.isfinite(x.grad).all()


# The units with a gate are one operation, the plain ones another.
@pytest.mark.parametrize(
    "activation",
    [
        swiglu,
        limited,
        squared_relu,
        *(pytest.param(unit, marks=pytest.mark.slow) for unit in (geglu, geglu_erf, gelu, gelu_tanh)),
    ],
)
def test_compiled_result_is_the_eager_one(activation):
    x = torch.randn(4, 8)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), activation(x))


def test_the_limited_unit_and_its_gradient_are_those_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    torch.manual_seed(3)
    theirs = GptOssExperts(GptOssConfig(num_local_experts=1, hidden_size=8, intermediate_size=8))
    ours = (torch.randn(40, 32, dtype=torch.float64) * 5).requires_grad_()
    # Their gates and ups stand by turns.
    turned = torch.stack(ours.chunk(2, dim=-1), dim=-1).flatten(-2)
    wanted, got = theirs._apply_gate(turned), swiglu(ours, find_gate(f"swiglu_oai@{theirs.limit}"))
    assert (ours.abs() > theirs.limit).any()
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    probe = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, ours, probe, retain_graph=True)[0] for y in (wanted, got)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


def test_geglu_is_that_of_gemma():
    from transformers.activations import ACT2FN

    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 5
    first, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(geglu(x), ACT2FN["gelu_pytorch_tanh"](first) * up, rtol=1e-14, atol=1e-14)


def test_gelu_is_that_of_megatron_core_with_and_without_biases():
    """Its fused form, with biases, is tanh's; the one of experts and without biases is exact (`F.gelu`)."""
    from megatron.core.fusions.fused_bias_geglu import bias_geglu
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 5
    none = torch.zeros(32, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):  # theirs are compiled, for 20 s where nothing is cached
        theirs, their_gate = bias_gelu(none, x), bias_geglu(none, x)
    # Their constant of sqrt(2 / pi) has eight digits.
    torch.testing.assert_close(gelu_tanh(x), theirs, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(geglu(x), their_gate, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x), rtol=1e-14, atol=1e-14)


def test_settings_and_kernels_have_the_same_plain_units():
    assert set(structure.PLAIN) == set(gate.PLAIN)
    assert set(get_args(structure.Activation)) == set(gate.PLAIN) | set(gate.GATES)


def test_limits_keep_what_is_not_a_number():
    x = torch.full((1, 2), float("nan"))
    assert limited(x).isnan().all()


def test_bad_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match="even last dim"):
        swiglu(torch.randn(2, 3))
    for word, rule in (
        ("relu", "geglu_erf, squared_relu, gelu"),
        ("squared_relu@7.0", "must be one of"),
        ("swiglu@0", "above 0"),
    ):
        with pytest.raises(ValueError, match=rule):
            find_gate(word)
    with pytest.raises(ValueError, match="floating point"):
        squared_relu(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="activation must be one of squared_relu, gelu, gelu_tanh; got 'swiglu'"):
        plain_unit(torch.ones(2, 2), "swiglu")
