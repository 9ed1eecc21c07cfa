"""Muon: what a step of it is, and that AdamW does the rest."""

from copy import deepcopy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.overrides import TorchFunctionMode

from support.optim import ADAM, ALPHA_LR, MUON_LR, align_moments, make_optimizer, orthogonal
from tests.toys import SMALLER, toy_inputs, toy_unet


@pytest.mark.parametrize("shape", [(20, 20), (20, 24), (16, 150), (150, 16)], ids=str)
def test_singular_values_become_equal_and_their_vectors_stay(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    made = u.mT @ orthogonal(matrices) @ v.mT  # diagonal, if the vectors are the same
    values = made.diagonal(dim1=1, dim2=2)
    large = s > 0.05 * s.amax(dim=1, keepdim=True)  # five steps do not reach the smallest ones
    assert (0.6 < values[large]).all() and (values < 1.3).all()
    torch.testing.assert_close(made, torch.diag_embed(values), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 24), (16, 150)], ids=str)
def test_they_are_computed_in_full_precision(shape):
    """TF32 and autocast, which a training on a GPU has, would spoil them; both were on before and after."""
    found = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__):
                found.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return function(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16), Look():
            assert orthogonal(torch.randn(2, *shape)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found and set(found) == {("highest", False)}


def steps(unet, optimizer, count):
    for i in range(count):
        optimizer.zero_grad()
        unet(*toy_inputs(unet, seed=i)).square().mean().backward()
        optimizer.step()


def test_matrices_inside_are_turned_and_the_rest_is_adamw():
    unet, plain = toy_unet(**SMALLER), toy_unet(**SMALLER)
    optimizer = make_optimizer(unet, 1e-3, muon=True)
    before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    steps(unet, optimizer, 1)
    gates = [p for name, p in plain.named_parameters() if name.endswith(".alpha")]
    rest = [p for name, p in plain.named_parameters() if not name.endswith(".alpha")]
    groups = [dict(params=rest), dict(params=gates, lr=ALPHA_LR * 1e-3, weight_decay=0.0)]
    steps(plain, torch.optim.AdamW(groups, lr=1e-3, fused=True, **ADAM), 1)

    by_muon = {id(weight) for weight in optimizer.param_groups[2]["params"]}
    others = dict(plain.named_parameters())
    for name, weight in unet.named_parameters():
        if id(weight) not in by_muon:
            assert torch.equal(weight, others[name]), name
            continue
        change = (weight - before[name] * (1 - MUON_LR * 1e-3 * ADAM["weight_decay"])).flatten(1)
        size = change.square().mean().sqrt() / (MUON_LR * 1e-3)  # of AdamW's about 1
        assert 0.005 < size < 0.3 and weight.ndim > 1, name  # less of gradients of few ranks
    assert len(by_muon) > 20
    edges = ("conv_in", "conv_out", "clip_projection", "t5_projection", "fusion")
    assert not any(id(p) in by_muon for name, p in unet.named_parameters() if any(e in name for e in edges))


def test_a_resumed_run_goes_on_bit_for_bit():
    unet, again = toy_unet(**SMALLER), toy_unet(**SMALLER)
    optimizer = make_optimizer(unet, 1e-3, muon=True)
    steps(unet, optimizer, 2)
    moments = get_optimizer_state_dict(unet, optimizer)
    another = make_optimizer(again, 1e-3, muon=True)
    again.load_state_dict(unet.state_dict())
    set_optimizer_state_dict(again, another, deepcopy(moments))
    align_moments(another)
    steps(unet, optimizer, 2)
    steps(again, another, 2)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters()))


@pytest.mark.parametrize("muon", [False, True])
def test_every_weight_is_in_one_group(muon):
    unet = toy_unet(**SMALLER)
    groups = make_optimizer(unet, 1e-3, muon=muon).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, unet.parameters()))
    assert any(group.get("muon") for group in groups) == muon
