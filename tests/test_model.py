"""DFGN: size, given frames, filler, odd shapes, the identity start, text, checkpointing, what it prints."""

import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import model
from masks import NUM_FRAMES
from model import DFGN, SIZES, STI, Conv3D, FrameConv, Frames
from support.layers import print_layers, print_sizes
from support.machine import precision, prepare, recompute
from tests.toys import SMALLER, first_frames, toy_inputs, toy_unet

TEMPORAL = pytest.mark.parametrize("temporal", ["sti", "conv3d", "conv1d"])
LAYERS = pytest.mark.parametrize(
    "layer", [STI, Conv3D, partial(Conv3D, spatial=False)], ids=["sti", "conv3d", "conv1d"]
)


def small_unet(temporal="sti", alpha=1.0):
    return toy_unet(alpha, temporal=temporal, **SMALLER)


@pytest.fixture(scope="module")
def full():
    """`full` on the meta device: its shapes without its weights."""
    with torch.device("meta"):
        return DFGN(**SIZES["full"])


# ------------------------------------------------------------------------------------------------------------
# Size and names


def test_full_has_the_papers_parameters(full):
    count = sum(p.numel() for p in full.parameters())
    text = sum(p.numel() for name, p in full.named_parameters() if "projection" in name)
    assert count == 955_355_572  # 953,256,356 and 16 alphas, and the text projections
    assert count - text == 953_256_356 + 16
    assert round(count / 1e9, 2) == 0.96
    assert full.conv_in.in_channels == 8 and full.conv_out.out_channels == 4  # Table 6
    assert sum(isinstance(module, STI) for module in full.modules()) == 16


def test_spatial_part_has_the_names_of_stable_diffusion(full):
    """diffusers' own U-Net of the same shape loads into ours: only what is ours is left over."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            in_channels=8,
        )
    ours = {name: p.shape for name, p in full.named_parameters()}
    ours = {name: shape for name, shape in ours.items() if not re.search(r"\.temporal\.|_projection\.", name)}
    assert ours == {name: p.shape for name, p in theirs.named_parameters()}


@TEMPORAL
def test_save_and_load(tmp_path, temporal):
    unet = small_unet(temporal)
    unet.save_pretrained(tmp_path)
    again = DFGN.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert again.config.temporal == temporal
    inputs = toy_inputs(unet, slots=3)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), again(*inputs))


@pytest.mark.parametrize("change", [dict(temporal="lstm"), dict(sti_gamma=0), dict(sti_gamma="2")])
def test_a_wrong_temporal_layer_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        DFGN(**(SIZES["toy"] | SMALLER | change))


# ------------------------------------------------------------------------------------------------------------
# Given frames


@torch.no_grad()
def test_only_latents_of_given_frames_are_looked_at():
    unet = small_unet()
    noisy, latents, given, *rest = toy_inputs(unet)
    out = unet(noisy, latents, given, *rest)
    for other in (torch.randn_like(latents), torch.full_like(latents, float("nan"))):
        shown = torch.where(given[..., None, None, None], latents, other)
        assert torch.equal(unet(noisy, shown, given, *rest), out)
    assert not torch.allclose(unet(noisy, -latents, given, *rest), out, atol=1e-2)


@torch.no_grad()
def test_where_nothing_is_given_zeros_stand_beside_the_noisy_latents():
    unet = small_unet()
    noisy, latents, given, *rest = toy_inputs(unet)
    none = torch.zeros_like(given)
    zeros = unet(noisy, torch.zeros_like(latents), ~none, *rest)
    assert torch.equal(unet(noisy, latents, none, *rest), zeros)


def test_the_condition_may_have_more_channels_than_the_latents():
    unet = toy_unet(condition_channels=9, **SMALLER)
    noisy, latents, *rest = toy_inputs(unet, slots=3)
    assert latents.shape[2] == 9 and unet(noisy, latents, *rest).shape == noisy.shape


# ------------------------------------------------------------------------------------------------------------
# Frames and filler


@TEMPORAL
def test_valid_frames_do_not_depend_on_filler(temporal):
    unet = small_unet(temporal)
    noisy, latents, given, timestep, text = toy_inputs(unet)
    given = torch.ones_like(given)  # filler too: whatever its mask says, it is not looked at
    valid = torch.arange(NUM_FRAMES) < torch.tensor([[3], [6]])
    outputs, gradients = [], []
    for seed in (1, 2):
        filler = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed)) * 100
        x, z = (
            torch.where(valid[..., None, None, None], t, filler).requires_grad_() for t in (noisy, latents)
        )
        out = unet(x, z, given, timestep, text, valid)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out))[valid].sum().backward()
        assert (x.grad[~valid] == 0).all() and (z.grad[~valid] == 0).all()
        outputs.append(out.detach())
        gradients.append([p.grad.clone() for p in unet.parameters()])
        unet.zero_grad()
    assert torch.equal(*outputs) and (outputs[0][~valid] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])


@TEMPORAL
@pytest.mark.parametrize("k", [3, 4, 5, 6, 7])
@torch.no_grad()
def test_eight_slots_with_k_valid_equal_k_slots(temporal, k):
    unet = small_unet(temporal)
    noisy, latents, given, timestep, text = toy_inputs(unet)
    masked = unet(noisy, latents, given, timestep, text, first_frames(k))
    short = unet(noisy[:, :k], latents[:, :k], given[:, :k], timestep, text)
    whole = unet(noisy, latents, given, timestep, text)
    torch.testing.assert_close(masked[:, :k], short, rtol=1e-4, atol=1e-4)
    # the other frames do matter where they are valid
    assert not torch.allclose(whole[:, :k], short, atol=1e-2)


def test_frames_are_packed_and_come_back_to_their_places():
    valid = torch.tensor([[True, True, False], [True, False, True]])
    frames = Frames(valid, 2, 3, "cpu")
    x = torch.arange(6.0).view(2, 3)
    assert frames.pack(x).tolist() == [0, 1, 3, 5] and frames.clip.tolist() == [0, 0, 1, 1]
    assert frames.unpack(frames.pack(x)).tolist() == [[0, 1, 0], [3, 0, 5]]


# ------------------------------------------------------------------------------------------------------------
# Temporal layers


@LAYERS
@pytest.mark.parametrize("slots", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 6)])
def test_temporal_layers_at_any_length_and_size(layer, slots, size):
    temporal = layer(32, groups=8)
    torch.nn.init.ones_(temporal.alpha)
    h = torch.randn(2 * slots, 32, *size, generator=torch.Generator().manual_seed(0))
    out = temporal(h, Frames(None, 2, slots, h.device))
    assert out.shape == h.shape and out.isfinite().all() and not torch.allclose(out, h)


@pytest.mark.parametrize("size", [(5, 7), (9, 4)])
def test_unet_at_odd_sizes(size):
    unet = small_unet()
    noisy, *rest = toy_inputs(unet, slots=3, size=size)
    assert unet(noisy, *rest).shape == noisy.shape


@LAYERS
def test_frames_see_each_other_and_order_matters(layer):
    torch.manual_seed(0)
    temporal = layer(32, groups=8)
    torch.nn.init.ones_(temporal.alpha)
    frames = Frames(None, 1, 4, torch.device("cpu"))
    h = torch.randn(4, 32, 4, 4)
    changed = h.clone()
    changed[3] = torch.randn(32, 4, 4)
    out, other = temporal(h, frames), temporal(changed, frames)
    assert not torch.allclose(out[2], other[2], atol=1e-3)
    assert not torch.allclose(temporal(h.flip(0), frames).flip(0), out, atol=1e-3)


def random_clips(valid, size=(5, 6), seed=0):
    """(Frames, h (N, 32, *size)) of the valid frames of some clips; valid: bool (B, F)"""
    frames = Frames(valid, *valid.shape, "cpu")
    return frames, torch.randn(len(frames.index), 32, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [(4,), (5, 3)])
def test_conv3d_is_a_three_dimensional_convolution(lengths):
    """Each clip by itself, over its valid frames alone: forwards and backwards."""
    torch.manual_seed(0)
    layer = FrameConv(32, groups=8, spatial=True)
    frames, h = random_clips(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    h.requires_grad_()
    ours, theirs = layer(h, frames), []
    assert layer.conv.weight.shape == (32, 32, 3, 3, 3) and ours.shape == h.shape
    for clip in h.split(lengths):
        x = F.silu(layer.norm(clip)).transpose(0, 1)[None]  # (1, d, k, H, W)
        theirs.append(F.conv3d(x, layer.conv.weight, layer.conv.bias, padding=1)[0].transpose(0, 1))
    theirs = torch.cat(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), [h, *layer.parameters()]) for y in (ours, theirs))
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_conv3d_has_two_real_convolutions_and_conv1d_four_along_frames():
    for spatial, count, shape in ((True, 2, (32, 32, 3, 3, 3)), (False, 4, (32, 32, 3, 1))):
        weights = [conv.conv.weight for conv in Conv3D(32, groups=8, spatial=spatial).convs]
        assert [tuple(weight.shape) for weight in weights] == count * [shape]
    layers = {
        temporal: [layer for *_, layer in small_unet(temporal).layers() if layer is not None]
        for temporal in ("conv3d", "conv1d")
    }
    for temporal, count in (("conv3d", 2), ("conv1d", 4)):
        assert all(isinstance(layer, Conv3D) for layer in layers[temporal])
        assert {len(layer.convs) for layer in layers[temporal]} == {count}


@pytest.mark.parametrize("spatial", [True, False])
def test_a_convolution_reaches_one_frame_on_and_neighbouring_locations_if_spatial(spatial):
    """Where the gradient of one output location goes, behind the norm, which mixes a whole frame."""
    torch.manual_seed(0)
    layer = FrameConv(32, groups=8, spatial=spatial)
    layer.norm = torch.nn.Identity()
    frames, h = random_clips(torch.ones(1, 5, dtype=torch.bool))
    h.requires_grad_()
    layer(h, frames)[2, :, 2, 3].sum().backward()
    expected = torch.zeros(5, 5, 6, dtype=torch.bool)  # (F, H, W)
    if spatial:
        expected[1:4, 1:4, 2:5] = True
    else:
        expected[1:4, 2, 3] = True
    assert torch.equal(h.grad.abs().sum(dim=1) > 0, expected)


@LAYERS
@torch.no_grad()
def test_beside_a_longer_clip_a_short_one_is_what_it_is_alone(layer):
    torch.manual_seed(0)
    temporal = layer(32, groups=8)
    torch.nn.init.ones_(temporal.alpha)
    frames, h = random_clips(torch.arange(6) < torch.tensor([[3], [6]]))
    together = temporal(h, frames)
    alone = [temporal(clip, Frames(None, 1, len(clip), "cpu")) for clip in h.split((3, 6))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    other = temporal(torch.cat([h[:3], -h[3:]]), frames)  # neither does the neighbour matter
    torch.testing.assert_close(other[:3], together[:3])


def test_semantic_branch_reaches_every_region_of_every_frame():
    torch.manual_seed(0)
    sti = STI(32, groups=8)
    frames = Frames(None, 1, 8, torch.device("cpu"))
    h = torch.randn(8, 32, 8, 8, requires_grad=True)
    sti.semantic(h, frames)[0, :, 0, 0].sum().backward()
    assert (h.grad.abs().sum(dim=1) > 0).all()  # (8, 8, 8): frames, height, width


@TEMPORAL
@torch.no_grad()
def test_at_alpha_zero_it_is_the_spatial_unet_frame_by_frame(temporal):
    fresh = DFGN(**(SIZES["toy"] | SMALLER), temporal=temporal)
    assert all(p.item() == 0 for name, p in fresh.named_parameters() if name.endswith("alpha"))
    unet = small_unet(temporal, alpha=0.0)
    noisy, latents, given, timestep, text = toy_inputs(unet)
    together = unet(noisy, latents, given, timestep, text)
    frames = zip(*(x.split(1, dim=1) for x in (noisy, latents, given)))
    alone = torch.cat([unet(*frame, timestep, text) for frame in frames], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@TEMPORAL
def test_layers_keep_precision_and_layout(temporal):
    """Under autocast a frame stays bf16 and channels_last through temporal layers: fp32, or another layout,
    would spread from there through the rest of the network, at twice the memory traffic."""
    unet, seen = prepare(small_unet(temporal), "cpu"), []
    for _, _, layer in unet.layers():
        if layer is not None:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        unet(*toy_inputs(unet, slots=3))
    assert len(seen) == 7  # one after each of the transformers
    for h in seen:
        assert h.dtype == torch.bfloat16
        assert h.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------
# Text, and gradient checkpointing


@torch.no_grad()
def test_padding_tokens_change_nothing():
    unet = small_unet()
    *rest, (clip, clip_mask, t5, t5_mask) = toy_inputs(unet, slots=3)
    clip_mask, t5_mask = clip_mask.clone(), t5_mask.clone()
    clip_mask[0, 2:] = False
    t5_mask[1, 1:] = False
    out = unet(*rest, (clip, clip_mask, t5, t5_mask))
    clip, t5 = torch.where(clip_mask[..., None], clip, 50.0), torch.where(t5_mask[..., None], t5, -50.0)
    other = unet(*rest, (clip, clip_mask, t5, t5_mask))
    seen = unet(*rest, (clip, torch.ones_like(clip_mask), t5, t5_mask))
    torch.testing.assert_close(out, other)
    assert not torch.allclose(out, seen, atol=1e-2)


@pytest.mark.parametrize(
    "temporal, mixed_precision", [("sti", "no"), ("sti", "bf16"), ("conv3d", "no"), ("conv1d", "no")]
)
def test_gradient_checkpointing_changes_no_gradient(temporal, mixed_precision):
    unet = prepare(small_unet(temporal), "cpu")
    inputs, gradients, calls = toy_inputs(unet), [], []

    def counted(function, *args):
        calls.append(args)
        return recompute(function, *args)

    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing(counted)
        with precision("cpu", mixed_precision):
            out = unet(*inputs, first_frames(5))
        out.square().mean().backward()  # outside, as in training
        gradients.append([p.grad.clone() for p in unet.parameters()])
        unet.zero_grad()
    assert len(calls) == len(unet.layers())
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_it_follows_the_conventions_of_diffusers():
    """Gradient checkpointing as of any of its models, once per layer; attention processors; adapters."""
    unet = small_unet("sti").train()
    inputs = toy_inputs(unet)
    plain = torch.autograd.grad(unet(*inputs).square().mean(), unet.conv_in.weight)[0]
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in list(unet.modules())[1:])
    again = torch.autograd.grad(unet(*inputs).square().mean(), unet.conv_in.weight)[0]
    torch.testing.assert_close(plain, again)
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing

    used = []

    class Counting(AttnProcessor2_0):
        def __call__(self, *args, **more):
            used.append(1)
            return super().__call__(*args, **more)

    unet.set_attn_processor(Counting())
    unet(*inputs)
    assert len(used) == len(unet.attn_processors) > 0
    assert callable(unet.add_adapter) and callable(unet.load_lora_adapter)


# ------------------------------------------------------------------------------------------------------------
# python model.py


def numbers(line):
    return [float(number) for number in re.findall(r"(?<= )[\d.]+(?= |$)", line.replace(",", ""))]


def test_what_python_model_prints_adds_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    sizes, layers = re.split(r"\nfull: .*\n", capsys.readouterr().out)

    rows = {line.split()[0]: numbers(line) for line in sizes.splitlines()[3:] if line}
    assert rows.keys() == SIZES.keys() and rows["full"][-1] == 955.4
    for *parts, total in rows.values():
        assert len(parts) == 5 and sum(parts) == pytest.approx(total, abs=0.3)  # each is rounded to 0.1

    *lines, total = layers.strip().splitlines()[1:]
    counts, operations = zip(*(numbers(line)[-2:] for line in lines))
    assert numbers(total)[0] == sum(counts) == 955_355_572
    assert numbers(total)[1] == pytest.approx(sum(operations), rel=0.05)


def test_each_weight_counts_for_one_part(capsys):
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(999, 1000) for name in ("a", "b", "ab")})
    print_sizes(dict(net=layers), {"first": "a", "second": "b"})
    title, row = capsys.readouterr().out.splitlines()[-2:]
    assert title.split() == ["first", "second", "other", "all"]
    assert numbers(row) == [1, 2, 0, 3]  # million


def test_operations_are_multiplications_and_additions(capsys):
    conv = torch.nn.Sequential(torch.nn.Conv2d(50, 100, kernel_size=3, padding=1, bias=False))
    conv = torch.nn.ModuleDict(dict(conv=conv))
    conv.forward = lambda x: conv["conv"](x)
    with torch.device("meta"):
        print_layers(conv.to("meta"), (torch.zeros(4, 50, 100, 100),))
    layer, total = capsys.readouterr().out.splitlines()[-2:]
    operations = 2 * 4 * (100 * 100) * 100 * 50 * 3 * 3
    assert layer.split() == ["conv", *"(4, 100, 100, 100)".split(), "45,000", f"{operations / 1e9:.1f}"]
    assert numbers(total) == [45_000, round(operations / 1e9, 1)]
