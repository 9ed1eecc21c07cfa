"""What a network is run in and stopped by: precision, layout, the processes of one machine, signals."""

import os
import signal

import pytest
import torch

from support.machine import World, device, gradient_sync, precision, prepare, stop_requests
from tests.toys import SMALLER, toy_inputs, toy_unet


@torch.no_grad()
def test_preparing_a_network_changes_no_output():
    unet = toy_unet(**SMALLER)
    inputs = toy_inputs(unet, slots=3)
    before = unet(*inputs)
    assert prepare(unet, "cpu") is unet
    torch.testing.assert_close(unet(*inputs), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_get_the_layout_that_is_asked_for(channels_last):
    weight = prepare(toy_unet(**SMALLER), "cpu", channels_last).conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last


def test_layer_norms_of_a_prepared_network_keep_their_precision():
    norm, x = torch.nn.LayerNorm(8), torch.randn(2, 8).bfloat16()
    with precision("cpu", "bf16"):
        assert norm(x).dtype == torch.bfloat16
        assert prepare(norm, "cpu")(x).dtype == torch.float32
        assert norm.bfloat16()(x).dtype == torch.bfloat16  # --low_memory: weights in bf16


@pytest.mark.parametrize("name, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_matrix_products(name, dtype):
    with precision("cpu", name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_cpu_trains_with_plain_attention_and_samples_with_the_fast_one():
    with precision("cpu", "no"):
        assert not torch.backends.cuda.flash_sdp_enabled()
    with torch.no_grad(), precision("cpu", "no"):
        assert torch.backends.cuda.flash_sdp_enabled()


def test_one_process_waits_for_nobody():
    world, unet, x = World(), torch.nn.Linear(1, 1), torch.ones(3)
    assert world.main and (world.rank, world.size) == (0, 1) and world.device.type == device().type
    assert world.sum(x) is x and world.first("x") == "x" and world.distribute(unet) is unet
    world.barrier()
    with gradient_sync(unet, last=False):
        unet(torch.ones(1)).backward()
    world.close()


def test_a_request_to_stop_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as signals:
        assert not signals
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before
