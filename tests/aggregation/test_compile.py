"""Hyper-parameters that are tensors do not recompile, and Inductor agrees with eager."""

import torch

import torchjd_func as jd
from tests.helpers import compiled
from tests.matrices import matrix


def test_hyper_parameters_as_tensors_do_not_recompile(device):
    jac = matrix("gaussian", 3, 5, device=device)
    fast, counter = compiled(lambda b: jd.upgrad(b)(jac)[0])
    for preference in torch.eye(3, dtype=torch.float64, device=device) + 0.1:
        torch.testing.assert_close(fast(preference), jd.upgrad(preference)(jac)[0])
    assert counter.graphs == 1


def test_inductor_agrees_with_eager(device):
    jac = matrix("gaussian", 4, 6, device=device)
    torch.compiler.reset()
    fast = torch.compile(lambda jac: jd.upgrad()(jac)[0], fullgraph=True)
    torch.testing.assert_close(fast(jac), jd.upgrad()(jac)[0])


def unannotated(statistic, key):
    return ()


def annotated(statistic, key) -> tuple[()]:
    return ()


def lengths(gramian, state, losses):
    return gramian.diagonal(), state


def test_rules_of_users_compile_with_and_without_annotations():
    for init in (unannotated, annotated):
        rule = jd.weighted(jd.Weighting("lengths", init, lengths))
        fast, counter = compiled(lambda jac, rule=rule: rule(jac, ()))
        jac = matrix("gaussian", 3, 5)
        assert torch.equal(fast(jac)[0], rule(jac)[0])
        assert counter.graphs == 1
