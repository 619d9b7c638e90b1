from __future__ import annotations

import pytest
import torch

from hf_edit.method.outer import Sgd, Torchs, outer_rule


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.85, True)])
def test_the_outer_step_is_torchs_sgd_bit_for_bit(momentum: float, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    params = [torch.nn.Parameter(part.clone()) for part in parts]
    sgd = torch.optim.SGD(params, lr=0.8, momentum=momentum, nesterov=nesterov)
    rule = Sgd(0.8, momentum, nesterov)
    state = rule.init(parts, offload=False)
    for _ in range(4):
        gradient = torch.randn(22, generator=generator)
        for param, grad in zip(params, state.views(gradient), strict=True):
            param.grad = grad.clone()
        sgd.step()
        anchor = rule.step(state, gradient.clone(), 0)
        for param, view in zip(params, state.views(anchor), strict=True):
            assert torch.equal(param.detach(), view)
    assert anchor is state.anchor
    assert tuple(state.tensors) == rule.tensor_names == (("momentum",) if momentum else ())


def test_no_outer_optimizer_takes_the_average() -> None:
    rule = outer_rule("none", lr=0.3, momentum=0.9)
    state = rule.init([torch.tensor([1.0, 2.0])], offload=False)
    assert rule.step(state, torch.tensor([0.5, -0.5]), 0).tolist() == [0.5, 2.5]
    assert state.tensors == {}


def test_anchor_and_momentum_are_fp32_whatever_the_model_is() -> None:
    rule = Sgd(0.8, 0.85, True)
    part = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    state = rule.init([part], offload=False)
    assert state.anchor.dtype == torch.float32
    assert state.tensors["momentum"].dtype == torch.float32
    assert state.anchor.tolist() == [1.0, 3.0]
    part.zero_()
    assert state.anchor.tolist() == [1.0, 3.0], "the anchor is a copy"


def test_a_callable_must_return_an_optimizer() -> None:
    with pytest.raises(ValueError, match=r"outer_optimizer returned int, but a torch\.optim\.Optimizer is needed"):
        outer_rule(lambda params: 3, 1.0, 0.0).init([torch.zeros(2)], offload=False)


def test_a_callable_gets_the_parameters_shapes_and_moves_the_anchor() -> None:
    shapes = []

    def outer(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        shapes.extend(p.shape for p in params)
        return torch.optim.SGD(params, lr=1.0)

    rule = Torchs(outer)
    state = rule.init([torch.ones(2, 2), torch.zeros(3)], offload=False)
    anchor = rule.step(state, torch.ones(7), 0)
    assert shapes == [(2, 2), (3,)]
    assert anchor.tolist() == [0.0] * 4 + [-1.0] * 3
