"""Every fast path against the plain one: outputs and every gradient (frames that are not computed and gradient
checkpointing: test_model.py; shards and averages: test_full.py)."""

import shutil
from unittest.mock import patch

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import EMAModel

import sample
from lab import bench
from model import STI, Conv3D, FrameConv, Frames
from support.machine import as_weights, precision
from support.optim import ADAM, Average, make_optimizer
from tests.test_model import first, random_dfgn, random_inputs


def outputs_and_gradients(unet, mixed_precision="no", ours=True, valid=None):
    unet.zero_grad()
    context = (
        precision("cpu", mixed_precision) if ours else torch.autocast("cpu", enabled=mixed_precision != "no")
    )
    with context:
        out = unet(*random_inputs(), valid)
    out.float().square().mean().backward()
    return {"output": out.detach().float(), **{name: p.grad.clone() for name, p in unet.named_parameters()}}


def assert_equal(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.1e} of its norm"


@pytest.mark.parametrize("valid", [None, first(5)], ids=["8 frames", "5 of 8"])
# bf16: the gradient of a fusion's bias is a sum whose terms cancel to a thousandth, which leaves it few digits.
@pytest.mark.parametrize("mixed_precision, tolerance", [("no", 1e-4), ("bf16", 0.2)])
@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_weights_channels_last(temporal, mixed_precision, tolerance, valid):
    """The network brings its input to that layout in any case; contiguous weights let go of it at every convolution
    that prefers the other one."""
    plain = outputs_and_gradients(random_dfgn(temporal), mixed_precision, valid=valid)
    fast = random_dfgn(temporal).to(memory_format=torch.channels_last)
    assert_equal(plain, outputs_and_gradients(fast, mixed_precision, valid=valid), tolerance)


@pytest.mark.parametrize("mixed_precision, tolerance", [("no", 1e-4), ("bf16", 0.1)])
def test_attention_kernel(mixed_precision, tolerance):
    unet = random_dfgn()
    plain = outputs_and_gradients(unet, mixed_precision, ours=False)
    assert_equal(plain, outputs_and_gradients(unet, mixed_precision), tolerance)


def test_frame_convolution_is_the_three_dimensional_one():
    torch.manual_seed(0)
    layer = FrameConv(16, groups=4)
    h = torch.randn(2 * 5, 16, 4, 6, requires_grad=True)  # two clips of five frames
    fast = layer(h, Frames(None, 2, 5, "cpu"))
    x = torch.nn.functional.silu(layer.norm(h)).unflatten(0, (2, 5)).transpose(1, 2)  # (B, d, F, H, W)
    plain = torch.nn.functional.conv3d(x, layer.conv.weight[..., None], layer.conv.bias, padding=(1, 0, 0))
    plain = plain.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(fast, plain)
    weights = [h, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (fast, plain))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adamw_and_averages_over_all_weights_at_once():
    fast, plain = random_dfgn(), random_dfgn()
    gates = [p for name, p in plain.named_parameters() if name.endswith("alpha")]
    others = [p for name, p in plain.named_parameters() if not name.endswith("alpha")]
    optimizers = (
        make_optimizer(fast, 1e-3),
        torch.optim.AdamW(
            [{"params": others}, {"params": gates, "lr": 3e-2, "weight_decay": 0.0}],
            lr=1e-3,
            foreach=False,
            fused=False,
            **ADAM,
        ),
    )
    average, ema = (
        Average(fast),
        EMAModel(plain.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=False),
    )
    for _ in range(3):
        for unet, optimizer in zip((fast, plain), optimizers):
            outputs_and_gradients(unet)
            optimizer.step()
        average.step(fast)
        ema.step(plain.parameters())
    for a, b in zip(fast.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(average.ema.shadow_params, ema.shadow_params):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_conditions_as_one_batch():
    unet = random_dfgn().eval()
    noisy, given, _, text = random_inputs()
    null_text = tuple(torch.zeros_like(x) if x.dtype != torch.bool else x for x in text)
    weights = sample.guidance_weights(True, True, 3.0, 7.5)
    assert len(weights) == 3
    arguments = unet, noisy, given, 400, text, null_text, weights
    together = sample.guided_noise(*arguments)
    with patch.object(unet, "forward", bench.one_by_one(unet.forward)):
        one_by_one = sample.guided_noise(*arguments)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_gradients_of_layer_norm_in_half_precision():
    """torch's own are further off on a CPU, where autocast leaves the layer in bf16."""
    norms = [module for module in random_dfgn().modules() if isinstance(module, torch.nn.LayerNorm)]
    norms = {module.weight.shape: module for module in norms}.values()
    assert norms
    for norm in norms:
        x, grad = torch.randn(2, 8192, *norm.weight.shape).bfloat16()

        def gradients(x, mixed_precision):
            with precision("cpu", mixed_precision):
                out = norm(x)
            return torch.autograd.grad((out * (grad.float() + 0.5)).sum(), norm.parameters())

        for half, exact in zip(gradients(x, "bf16"), gradients(x.float(), "no")):
            assert (half - exact).norm() < 0.01 * exact.norm()


def some_frames(device):
    """Four frames of one clip, two of another."""
    return dict(
        frames=Frames(torch.tensor([[True] * 4, [True] * 2 + [False] * 2], device=device), 2, 4, device)
    )


def some_text(device):
    mask = torch.arange(5, device=device) < torch.arange(1, 7, device=device)[:, None].clamp(max=5)
    return dict(
        encoder_hidden_states=torch.randn(6, 5, 16, device=device),
        encoder_attention_mask=mask,
        return_dict=False,
    )


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="no compiler")
@pytest.mark.parametrize(
    "make, conditions",
    [
        (
            lambda: ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=4),
            lambda device: dict(temb=torch.randn(6, 16, device=device)),
        ),
        (
            lambda: Transformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=32,
                cross_attention_dim=16,
                norm_num_groups=4,
                use_linear_projection=True,
            ),
            some_text,
        ),
        (lambda: STI(32, heads=2, head_width=8, groups=4), some_frames),
        (lambda: Conv3D(32, groups=4), some_frames),
    ],
    ids=["residual layer", "transformer", "STI", "Conv3D"],
)
def test_compiled_layers(make, conditions):
    """bf16 and channels_last under torch.compile: gradients of GroupNorm's weights were wrong there in some releases
    (pytorch issue 140913)."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = make().to(device, memory_format=torch.channels_last)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    for module in layer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(as_weights)  # as in DFGN
    h = torch.randn(6, 32, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    conditions = conditions(device)

    def run(call):
        layer.zero_grad()
        h.grad = None
        with torch.autocast(device, torch.bfloat16):
            out = call(h, **conditions)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()
        return {
            "output": out.detach().float(),
            "h": h.grad.clone(),
            **{name: p.grad.clone() for name, p in layer.named_parameters()},
        }

    plain = run(layer)
    with patch.object(torch._dynamo.config, "suppress_errors", False):
        assert_equal(plain, run(torch.compile(layer)), 0.05)
