"""Second derivatives, in each order of modes, against differences of first ones."""

import pytest
import torch
from torch.func import grad, jvp

import torchjd_func as jd
from tests.matrices import matrix
from tests.registry import METHODS, fresh, losses_for

SMOOTH = {name: method for name, method in METHODS.items() if method.differentiable}
STEP = 1e-5


def pushed(fn, x, along):
    """Return the derivative of a function along a direction, in forward mode."""
    return jvp(fn, (x,), (along,))[1]


def pulled(fn, x, along):
    """Return the same in reverse mode."""
    return (grad(fn)(x) * along).sum()


ORDERS = {
    "reverse over reverse": (pulled, pulled),
    "forward over reverse": (pushed, pulled),
    "reverse over forward": (pulled, pushed),
    "forward over forward": (pushed, pushed),
}


def check_second(fn, x, along, names=ORDERS):
    """Check second derivatives of a function along a direction."""
    after, before = (pulled(fn, x + sign * STEP * along, along) for sign in (1, -1))
    want = (after - before) / (2 * STEP)
    for name in names:
        outer, inner = ORDERS[name]
        got = outer(lambda x, inner=inner: inner(fn, x, along), x, along)
        torch.testing.assert_close(
            got, want, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_of_methods(name):
    method = SMOOTH[name]
    m = max(3, method.min_m)
    jac, losses = matrix("gaussian", m, 7), losses_for(method, m)
    aggregator, state = fresh(method, jac, m)
    _, state = aggregator(1.1 * jac, state, losses=losses)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def number(jac):
        return aggregator(jac, state, losses=losses)[0] @ weights

    # The tangents of torch.linalg.eigh have derivatives that are not-a-number (torch 2.13).
    missing = {"reverse over forward"} if name.startswith("aligned_mtl") else set()
    check_second(number, jac, 0.3 * matrix("gaussian", m, 7, 5), ORDERS.keys() - missing)


PREFERRED = {
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "cagrad": lambda p: jd.cagrad(0.4, preference=p),
    "config": jd.config,
    "nash_mtl": lambda p: jd.nash_mtl(preference=p),
    "fairgrad": lambda p: jd.fairgrad(1.5, preference=p),
    "geometric_median": jd.geometric_median,
    "constant": jd.constant,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", PREFERRED)
def test_two_steps_are_differentiated_twice_by_a_preference(name):
    start = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def losses(x):
        return torch.stack(
            [(x - 1).square().sum(), (x[0] + x[1]).square() + x[1], (2 * x).exp().sum()]
        )

    def trained(preference):
        step, x = jd.grad(losses, PREFERRED[name](preference)), start
        for _ in range(2):
            x = x - 0.1 * step(None, x)[0]
        return losses(x).prod()

    preference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    along = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    first = (trained(preference + STEP * along) - trained(preference - STEP * along)) / (2 * STEP)
    torch.testing.assert_close(pulled(trained, preference, along), first, rtol=1e-4, atol=1e-7)
    check_second(trained, preference, along)


def orthogonal(m, n):
    """Return orthogonal rows of different lengths, whose products are 0 to the last bit."""
    return torch.diag(torch.linspace(1.0, 2.0, n, dtype=torch.float64))[:m]


def with_zero(m, n):
    """Return rows of which the last is zero."""
    return torch.cat([matrix("gaussian", m - 1, n, 4), torch.zeros(1, n, dtype=torch.float64)])


# Of a zero gradient the linear program has many solutions.
MANY_SOLUTIONS = ("epo", "pmgda")


@pytest.mark.parametrize("make", [orthogonal, with_zero])
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_where_products_of_rows_are_zero(name, make):
    method = SMOOTH[name]
    if make is with_zero and name.startswith(MANY_SOLUTIONS):
        return
    m = max(3, method.min_m)
    jac, losses = make(m, 7), losses_for(method, m)
    aggregator, state = fresh(method, jac, m)
    _, state = aggregator(matrix("gaussian", m, 7), state, losses=losses)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    along = matrix("gaussian", m, 7, 5)

    def number(jac):
        return aggregator(jac, state, losses=losses)[0] @ weights

    here = number(jac)
    right, left = (number(jac + s * STEP * along) - here for s in (1, -1))
    slopes = right / STEP, -left / STEP
    got = pushed(number, jac, along)
    torch.testing.assert_close(pulled(number, jac, along), got)
    if abs(slopes[0] - slopes[1]) < 1e-3 * (1 + abs(got)):  # no kink
        torch.testing.assert_close(got, sum(slopes) / 2, rtol=1e-3, atol=1e-3)
