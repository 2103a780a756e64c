"""The reference against the definition: it is the truth the fast backends are held to."""

import pytest
import torch

from tests.kernels.problems import ODD_SHAPES, WITH_DELTAS, make, memory_full_of_nan, output_gradient


@pytest.mark.parametrize("shape", (ODD_SHAPES | WITH_DELTAS).values(), ids=ODD_SHAPES | WITH_DELTAS)
def test_equals_the_loop_over_tokens(shape):
    problem = make(**shape)
    out = problem.per_token()
    want = torch.autograd.grad(out, problem.leaves, output_gradient(out), allow_unused=True)
    with memory_full_of_nan():
        got = problem.with_gradients("reference")
    torch.testing.assert_close(got[0], out.detach(), rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(got[1:], want, strict=True):
        expected = torch.zeros_like(gradient) if expected is None else expected
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
