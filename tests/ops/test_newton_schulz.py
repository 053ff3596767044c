"""Newton-Schulz: the forms agree, the singular values land where the README says, the paper's identities hold."""

import pytest
import torch

from nestling.ops import dispatch, newton_schulz
from nestling.testing import assert_close, gradcheck64

SHAPES = [(3, 3), (2, 5), (7, 4), (3, 4, 6), (2, 3, 5, 2), (0, 4, 4), (1, 1)]


def polynomial_of_singular_values(X: torch.Tensor, steps: int, coefficients: tuple[float, ...]) -> torch.Tensor:
    """The same by definition: an odd polynomial of a matrix acts on its singular values."""
    a, b, c = coefficients
    U, s, Vh = torch.linalg.svd(X / torch.linalg.matrix_norm(X, keepdim=True), full_matrices=False)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return U @ (s[..., None] * Vh)


@pytest.mark.parametrize("coefficients", [newton_schulz.QUINTIC, newton_schulz.CUBIC])
@pytest.mark.parametrize("form", ["reference", "batched"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_polynomial_of_the_singular_values(form, shape, coefficients):
    X = torch.randn(shape, dtype=torch.float64)
    made = dispatch.newton_schulz(X, 5, coefficients, form=form)
    assert_close(made, polynomial_of_singular_values(X, 5, coefficients), rtol=1e-10)


@pytest.mark.parametrize("form", ["reference", "batched"])
def test_scale_does_not_matter_and_zero_stays_zero(form):
    X = torch.randn(2, 4, 6, dtype=torch.float64)
    assert_close(dispatch.newton_schulz(1e3 * X, form=form), dispatch.newton_schulz(X, form=form))
    assert not dispatch.newton_schulz(torch.zeros(2, 3, 3), form=form).any()


def test_the_gradient_of_each_form():
    for form in ("reference", "batched"):
        gradcheck64(lambda X, form=form: dispatch.newton_schulz(X, 2, form=form), torch.randn(2, 3, 4))


def test_five_quintic_steps_reach_the_stated_band_and_three_cubic_ones_do_not():
    s = torch.logspace(-2.88, 0, 400, dtype=torch.float64)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() > 0.6 and s.max() < 1.21
    values = torch.linalg.svdvals(dispatch.newton_schulz(torch.randn(30, 50, dtype=torch.float64)))
    assert values.min() > 0.6 and values.max() < 1.25
    U = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    X = U @ torch.diag(torch.tensor([0.1] + [0.351763] * 8, dtype=torch.float64))  # of norm 1
    values = torch.linalg.svdvals(dispatch.newton_schulz(X, 3, newton_schulz.CUBIC))
    assert abs(float(values.min()) - 0.33) < 0.01


def test_the_first_step_of_the_orthogonalisation_objective_is_the_cubic_map():
    """(44) with rate 1/4: a gradient step on |O - g|^2/2 + |O^T O - I|^2/2 from O = g."""
    g = torch.randn(4, 6, dtype=torch.float64)
    g = (g / torch.linalg.matrix_norm(g)).requires_grad_()
    loss = (g.T @ g - torch.eye(6)).square().sum() / 2
    step = g - torch.autograd.grad(loss, g)[0] / 4
    assert_close(newton_schulz.reference.newton_schulz(g.detach(), 1, newton_schulz.CUBIC), step.detach())


def test_bfloat16_stays_inside_the_band():
    X = torch.randn(3, 40, 60)
    made = dispatch.newton_schulz(X.bfloat16())
    assert made.dtype == torch.bfloat16
    values = torch.linalg.svdvals(made.float())
    assert values.min() > 0.55 and values.max() < 1.3
    error = (made.double() - dispatch.newton_schulz(X.double())).square().mean().sqrt()
    assert error < 2e-2 * dispatch.newton_schulz(X.double()).square().mean().sqrt()


def test_the_choice_says_why():
    chosen = dispatch.choose("newton_schulz", 0, device="cpu", widths=())
    assert chosen == ("batched", "the tensors are on cpu")
    with pytest.raises(ValueError, match="form is 'chunk'; newton_schulz has auto, reference, batched, triton"):
        dispatch.newton_schulz(torch.randn(2, 2), form="chunk")
    with pytest.raises(ValueError, match="the kernel has no gradient.*'auto' or 'batched'"):
        dispatch.newton_schulz(torch.randn(2, 2, requires_grad=True), form="triton")
    assert dispatch.newton_schulz_dtype(torch.device("meta")) == torch.float32
