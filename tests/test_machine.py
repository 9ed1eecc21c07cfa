"""What a network is run in and stopped by: precision, layout, the processes of one machine, signals."""

import os
import signal

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch.overrides import TorchFunctionMode

from model import STI, Conv3D
from support.common import UserError
from support.machine import (
    World,
    device,
    exact,
    gradient_sync,
    hook_norms,
    native_precision,
    precision,
    prepare,
    stop_requests,
    to_device,
)
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
    """They compute in single precision, and return what autocast has the layers around them work in."""
    norm, computed = prepare(torch.nn.LayerNorm(8), "cpu"), []
    norm.register_forward_hook(lambda _, inputs, output: computed.append(output.dtype), prepend=True)
    x = torch.randn(2, 8).bfloat16()
    with precision("cpu", "bf16"):
        assert norm(x).dtype == norm.bfloat16()(x).dtype == torch.bfloat16  # the second: --low_memory
    assert computed == [torch.float32, torch.bfloat16]
    assert prepare(torch.nn.LayerNorm(8), "cpu")(torch.randn(2, 8)).dtype == torch.float32


class RulesOfCuda(TorchFunctionMode):
    """Has a CPU's autocast do what a GPU's does: what torch's list "CUDA Ops that can autocast to float32"
    names, of that what the network uses, computes in single precision and returns it."""

    NAMES = {"layer_norm", "group_norm", "softmax", "interpolate"}  # the last is not in the list, but does

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ not in self.NAMES or not torch.is_autocast_enabled("cpu"):
            return function(*args, **(kwargs or {}))
        args = [x.float() if torch.is_tensor(x) else x for x in args]
        kwargs = {name: x.float() if torch.is_tensor(x) else x for name, x in (kwargs or {}).items()}
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)


@pytest.mark.parametrize("temporal", ["sti", "conv3d", "conv1d"])
def test_under_a_gpus_autocast_every_layer_gets_and_gives_half_precision(temporal):
    """Between layers, what is added up and kept for the backward pass; and into each convolution and linear
    layer, but for the first ones, which see what comes from outside."""
    unet, seen = hook_norms(toy_unet(temporal=temporal, **SMALLER)), {}
    outside = "conv_in", "time_embedding", "clip_projection", "t5_projection"

    def note(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).extend(x.dtype for x in (inputs[0], output) if torch.is_tensor(x))

        return hook

    cast_at_once = "upsamplers.0.conv"  # what diffusers' upsampling gives
    kinds = (ResnetBlock2D, Transformer2DModel, STI, Conv3D, Downsample2D, Upsample2D)
    kinds += (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
    for name, module in unet.named_modules():
        if isinstance(module, kinds) and not (name.startswith(outside) or name.endswith(cast_at_once)):
            module.register_forward_hook(note(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), RulesOfCuda():
        unet(*toy_inputs(unet))
    assert len(seen) > 60
    wrong = {name: dtypes for name, dtypes in seen.items() if set(dtypes) != {torch.bfloat16}}
    assert not wrong


def test_a_recorded_precision_is_no_order(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for native in (False, True):
        monkeypatch.setattr("support.machine.native_bf16", lambda: native)
        assert native_precision("bf16") == ("bf16" if native else "no")
        assert native_precision("fp16") == native_precision("no") == "no"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert native_precision("fp16") == "fp16"


def test_exact_computes_in_single_precision_whatever_is_around_it():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with precision("cpu", "bf16"), exact():
            assert torch.get_float32_matmul_precision() == "highest"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


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


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--nproc_per_node 2 .* which are 1: .*CUDA_VISIBLE_DEVICES= "):
        World()


def test_a_compiler_can_trace_the_way_to_a_gpu():
    compiled = torch.compile(lambda x: to_device(x, "cuda"), backend=lambda graph, _: graph, fullgraph=True)
    try:
        compiled(torch.ones(2))
    except (RuntimeError, AssertionError) as error:  # without a GPU the copy itself fails, and no sooner
        assert not torch.cuda.is_available() and "pin_memory" not in str(error)
