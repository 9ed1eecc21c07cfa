"""Every fast path against the plain one: outputs and all gradients. Frames that are not computed and gradient
checkpointing: test_model.py; shards and averages: test_full.py."""

import shutil
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import EMAModel
from torch._dynamo.testing import CompileCounter

import sample
from lab import bench
from masks import NUM_FRAMES
from model import STI, Conv3D, FrameConv, Frames
from support.machine import compile_layers, precision, prepare
from support.optim import ADAM, ALPHA_LR, EMA_DECAY, EMA_POWER, Average, make_optimizer
from tests.toys import SMALLER, first_frames, toy_inputs, toy_unet

LOSSES = 8


def random_unet(temporal="sti", channels_last=False):
    """All weights of one size, norms included, so that attention and fusion decide sharply: at the scale of
    an initialization a faulty kernel would hardly show."""
    unet = toy_unet(temporal=temporal, **SMALLER)
    torch.manual_seed(0)
    for name, weight in unet.named_parameters():
        if not name.endswith(".alpha"):
            torch.nn.init.normal_(weight, std=0.2)
    return prepare(unet, "cpu", channels_last)


def outputs_and_gradients(unet, mixed_precision="no", valid=None):
    """The output, and every weight's gradients of LOSSES random sums of it: (LOSSES, ...).

    One loss would not do. The gradient of a gate, or of a fusion's bias, is one sum over all frames and
    locations. Its terms are right to a digit of bf16, but for some losses they cancel to a hundredth and
    less, and what is left is rounding, however the fusion is computed: the branches and the gradients that
    come into it are rounded already. Sums rarely cancel for all losses, so an error counts relative to the
    norm over them all."""
    with precision("cpu", mixed_precision):
        out = unet(*toy_inputs(unet, size=(4, 6)), valid).float()
    generator = torch.Generator().manual_seed(1)
    losses = [torch.randn(out.shape, generator=generator) for _ in range(LOSSES)]
    names, weights = zip(*unet.named_parameters())
    gradients = [torch.autograd.grad(out, weights, loss, retain_graph=True) for loss in losses]
    return {"output": out.detach(), **dict(zip(names, map(torch.stack, zip(*gradients))))}


@cache
def plain_path(temporal, valid_frames):
    """The plain path: contiguous weights, torch's own choice of an attention kernel, and single precision.
    Half precision is measured against it as well: between two results in bf16 nobody knows which one is off,
    and torch's attention for CPUs is further off there than ours."""
    with patch("support.machine.sdpa_kernel", lambda _: nullcontext()):
        return outputs_and_gradients(random_unet(temporal), valid=first_frames(valid_frames))


def assert_equal(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name] - b[name]).norm() / a[name].norm()
        assert error < tolerance, f"{name}: {error:.1e} of its norm"


PRECISIONS = pytest.mark.parametrize("mixed_precision, tolerance", [("no", 5e-5), ("bf16", 0.08)])


@PRECISIONS
@pytest.mark.parametrize(
    "temporal, valid_frames", [("sti", NUM_FRAMES), ("sti", 5), ("conv3d", 5), ("conv1d", 5)]
)
def test_weights_channels_last(temporal, mixed_precision, tolerance, valid_frames):
    """The network brings its input to that layout in any case; contiguous weights let go of it at every
    convolution that prefers the other one."""
    fast = random_unet(temporal, channels_last=True)
    fast = outputs_and_gradients(fast, mixed_precision, first_frames(valid_frames))
    assert_equal(plain_path(temporal, valid_frames), fast, tolerance)


@PRECISIONS
def test_attention_kernel(mixed_precision, tolerance):
    fast = outputs_and_gradients(random_unet(), mixed_precision)
    assert_equal(plain_path("sti", NUM_FRAMES), fast, tolerance)


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
    fast, plain = random_unet(), random_unet()
    gates = [p for name, p in plain.named_parameters() if name.endswith("alpha")]
    others = [p for name, p in plain.named_parameters() if not name.endswith("alpha")]
    groups = [dict(params=others), dict(params=gates, lr=ALPHA_LR * 1e-3, weight_decay=0.0)]
    one_by_one = torch.optim.AdamW(groups, lr=1e-3, foreach=False, fused=False, **ADAM)
    optimizers = make_optimizer(fast, 1e-3), one_by_one
    warm_up = dict(decay=EMA_DECAY, use_ema_warmup=True, power=EMA_POWER)
    average, ema = Average(fast), EMAModel(plain.parameters(), foreach=False, **warm_up)
    for _ in range(3):
        for unet, optimizer in zip((fast, plain), optimizers):
            unet.zero_grad()
            unet(*toy_inputs(unet)).square().mean().backward()
            optimizer.step()
        average.step(fast)
        ema.step(plain.parameters())
    for a, b in zip(fast.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(average.ema.shadow_params, ema.shadow_params):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_conditions_as_one_batch():
    unet = random_unet()
    noisy, latents, given, _, text = toy_inputs(unet)
    null_text = tuple(torch.zeros_like(x) if x.dtype != torch.bool else x for x in text)
    weights = sample.guidance_weights(True, True, 3.0, 7.5)
    assert len(weights) == 3
    arguments = unet, noisy, latents, given, 400, text, null_text, weights
    together = sample.guided_noise(*arguments)
    with patch.object(unet, "forward", bench.one_by_one(unet.forward)):
        one_by_one = sample.guided_noise(*arguments)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_gradients_of_layer_norm_in_half_precision():
    """torch's own are further off on a CPU, where autocast leaves the layer in bf16."""
    norms = [module for module in random_unet().modules() if isinstance(module, torch.nn.LayerNorm)]
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
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2], device=device)
    return dict(frames=Frames(valid, 2, 4, device))


def some_text(device):
    mask = torch.arange(5, device=device) < torch.arange(1, 7, device=device)[:, None].clamp(max=5)
    states = torch.randn(6, 5, 16, device=device)
    return dict(encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=False)


def some_step(device):
    return dict(temb=torch.randn(6, 16, device=device))


HEADS = dict(num_attention_heads=2, attention_head_dim=16)
TEXT = dict(cross_attention_dim=16, norm_num_groups=4, use_linear_projection=True)
LAYERS = {
    "residual layer": (ResnetBlock2D, dict(in_channels=32, temb_channels=16, groups=4), some_step),
    "transformer": (Transformer2DModel, dict(in_channels=32, **HEADS, **TEXT), some_text),
    "STI": (STI, dict(width=32, heads=2, head_width=8, groups=4), some_frames),
    "Conv3D": (Conv3D, dict(width=32, groups=4), some_frames),
    "Conv3D, along frames": (Conv3D, dict(width=32, groups=4, spatial=False), some_frames),
}


@pytest.mark.slow
def test_a_compiled_layer_has_few_graphs_for_all_batches_of_a_run():
    """Without and with filler, with and without gradients, one clip or several: no more for other numbers of
    clips and frames, and all layers of a network stay below the limit."""
    counter = CompileCounter()
    layer = STI(32, heads=2, head_width=8, groups=4)
    compile_layers(SimpleNamespace(layers=lambda: [(layer, None, None)]), backend=counter)
    seen = []
    for lengths in ([8], [3], [5, 3], [8, 8], [8, 3, 4, 8], [6, 6, 6], [7, 3, 3, 3, 3]):
        valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        frames = Frames(valid, *valid.shape, "cpu")
        for learns in (True, False):
            with torch.set_grad_enabled(learns):
                layer(torch.randn(len(frames.index), 32, 4, 4), frames)
        seen.append(counter.frame_count)
    assert seen[-1] == seen[4] <= 8
    assert 40 * seen[-1] < torch._dynamo.config.accumulated_recompile_limit


COMPILED = ("STI", "transformer")  # the others take a minute more, of compiling: with -m slow


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="no compiler")
@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS]
)
def test_compiled_layers(name):
    """bf16 and channels_last under torch.compile: gradients of GroupNorm's weights were wrong there in some
    releases (pytorch issue 140913)."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make, config, conditions = LAYERS[name]
    layer = prepare(make(**config), device)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    h = torch.randn(6, 32, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    conditions = conditions(device)

    def run(call):
        layer.zero_grad()
        h.grad = None
        with torch.autocast(device, torch.bfloat16):
            out = call(h, **conditions)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        return {"output": out.detach().float(), "h": h.grad.clone(), **gradients}

    plain = run(layer)
    with patch.object(torch._dynamo.config, "suppress_errors", False):
        assert_equal(plain, run(torch.compile(layer)), 0.05)
