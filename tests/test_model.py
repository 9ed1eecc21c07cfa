"""DFGN: size, filler independence, odd shapes, the identity start, text masking, checkpointing, saving."""

import pytest
import torch

from masks import NUM_FRAMES
from model import DFGN, SIZES, STI, Conv3D, Frames, loss_weights, make_scheduler
from support.machine import precision

TINY = dict(
    latent_channels=4,
    block_out_channels=(32, 64),
    attention_levels=(True, True),
    layers_per_block=1,
    head_width=16,
    cross_attention_dim=24,
    clip_dim=10,
    t5_dim=12,
    norm_num_groups=8,
    sti_heads=2,
    sti_head_width=8,
)


def random_dfgn(temporal="sti", alpha=1.0, **changes):
    """All weights random, none zero, alpha given:
    at the zeros of the initialization, tests of the layers prove nothing."""
    torch.manual_seed(0)
    unet = DFGN(**{**TINY, "temporal": temporal, **changes})
    for name, parameter in unet.named_parameters():
        torch.nn.init.constant_(parameter, alpha) if name.endswith("alpha") else torch.nn.init.normal_(
            parameter, std=0.2
        )
    return unet


def random_inputs(slots=NUM_FRAMES, size=(6, 6), batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, slots, 4, *size, generator=g)
    given = torch.randn(batch, slots, 4, *size, generator=g)
    text = (
        torch.randn(batch, 5, 10, generator=g),
        torch.ones(batch, 5, dtype=torch.bool),
        torch.randn(batch, 7, 12, generator=g),
        torch.ones(batch, 7, dtype=torch.bool),
    )
    return noisy, given, torch.tensor([3, 700])[:batch], text


def first(k, batch=2):
    return (torch.arange(NUM_FRAMES) < k).expand(batch, -1)


def test_full_has_the_papers_parameters():
    with torch.device("meta"):
        unet = DFGN(**SIZES["full"])
    count = sum(p.numel() for p in unet.parameters())
    text = sum(p.numel() for name, p in unet.named_parameters() if "projection" in name)
    assert count == 955_355_572  # 953,256,356 and 16 alphas, and the text projections
    assert count - text == 953_256_356 + 16
    assert round(count / 1e9, 2) == 0.96
    assert unet.conv_in.in_channels == 8 and unet.conv_out.out_channels == 4  # Table 6
    assert sum(isinstance(module, STI) for module in unet.modules()) == 16


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_valid_frames_do_not_depend_on_filler(temporal):
    unet = random_dfgn(temporal)
    noisy, given, timestep, text = random_inputs()
    k = torch.tensor([3, 6])
    valid = torch.arange(NUM_FRAMES) < k[:, None]
    outputs, gradients = [], []
    for seed in (1, 2):
        filler = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed)) * 100
        x, z = (torch.where(valid[..., None, None, None], t, filler).requires_grad_() for t in (noisy, given))
        out = unet(x, z, timestep, text, valid)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out))[valid].sum().backward()
        assert (x.grad[~valid] == 0).all() and (z.grad[~valid] == 0).all()
        outputs.append(out.detach())
        gradients.append([p.grad.clone() for p in unet.parameters()])
        unet.zero_grad()
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert (outputs[0][~valid] == 0).all()
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
@pytest.mark.parametrize("k", [3, 4, 5, 6, 7])
def test_eight_slots_with_k_valid_equal_k_slots(temporal, k):
    unet = random_dfgn(temporal)
    noisy, given, timestep, text = random_inputs()
    with torch.no_grad():
        masked = unet(noisy, given, timestep, text, first(k))
        short = unet(noisy[:, :k], given[:, :k], timestep, text)
        whole = unet(noisy, given, timestep, text)
    torch.testing.assert_close(masked[:, :k], short, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        whole[:, :k], short, atol=1e-2
    )  # the other frames do matter where they are valid


@pytest.mark.parametrize("layer", [STI, Conv3D])
@pytest.mark.parametrize("slots", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 6)])
def test_temporal_layers_at_any_length_and_size(layer, slots, size):
    temporal = layer(32, groups=8)
    torch.nn.init.ones_(temporal.alpha)
    h = torch.randn(2 * slots, 32, *size, generator=torch.Generator().manual_seed(0))
    out = temporal(h, Frames(None, 2, slots, h.device))
    assert out.shape == h.shape and out.isfinite().all() and not torch.allclose(out, h)


def test_unet_at_odd_sizes():
    unet = random_dfgn()
    for size in ((5, 7), (9, 4)):
        noisy, given, timestep, text = random_inputs(slots=3, size=size)
        assert unet(noisy, given, timestep, text).shape == noisy.shape


@pytest.mark.parametrize("layer", [STI, Conv3D])
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


def test_semantic_branch_reaches_every_region_of_every_frame():
    torch.manual_seed(0)
    sti = STI(32, groups=8)
    frames = Frames(None, 1, 8, torch.device("cpu"))
    h = torch.randn(8, 32, 8, 8, requires_grad=True)
    sti.semantic(h, frames)[0, :, 0, 0].sum().backward()
    assert (h.grad.abs().sum(dim=1) > 0).all()  # (8, 8, 8): frames, height, width


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_at_alpha_zero_it_is_the_spatial_unet_frame_by_frame(temporal):
    fresh = DFGN(**{**TINY, "temporal": temporal})
    assert all(p.item() == 0 for name, p in fresh.named_parameters() if name.endswith("alpha"))
    unet = random_dfgn(temporal, alpha=0.0)
    noisy, given, timestep, text = random_inputs()
    with torch.no_grad():
        together = unet(noisy, given, timestep, text)
        alone = torch.cat(
            [unet(noisy[:, i : i + 1], given[:, i : i + 1], timestep, text) for i in range(NUM_FRAMES)], dim=1
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_spatial_part_has_the_names_of_stable_diffusion():
    """diffusers' own U-Net of the same shape loads into ours: only what is ours is left over."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        ours = DFGN(**SIZES["full"])
        theirs = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            in_channels=8,
        )
    shapes = {
        name: p.shape
        for name, p in ours.named_parameters()
        if ".temporal." not in name and "_projection." not in name
    }
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}


def test_loss_weights():
    assert (loss_weights(None) == 1).all()
    sigma, alpha = 0.5, make_scheduler().alphas_cumprod
    error = torch.randn(1000)  # of the clean latents, and what it makes of the noise
    of_noise = error * alpha.sqrt() / (1 - alpha).sqrt()
    snr = alpha * sigma**2 / (1 - alpha)
    torch.testing.assert_close(
        loss_weights(sigma) * of_noise.square(), (snr + 1).clamp(max=5) * (error / sigma).square()
    )


def test_padding_tokens_change_nothing():
    unet = random_dfgn()
    noisy, given, timestep, (clip, clip_mask, t5, t5_mask) = random_inputs(slots=3)
    clip_mask, t5_mask = clip_mask.clone(), t5_mask.clone()
    clip_mask[0, 2:] = False
    t5_mask[1, 1:] = False
    with torch.no_grad():
        out = unet(noisy, given, timestep, (clip, clip_mask, t5, t5_mask))
        noise = torch.where(clip_mask[..., None], clip, 50.0), torch.where(t5_mask[..., None], t5, -50.0)
        other = unet(noisy, given, timestep, (noise[0], clip_mask, noise[1], t5_mask))
        seen = unet(noisy, given, timestep, (noise[0], torch.ones_like(clip_mask), noise[1], t5_mask))
    torch.testing.assert_close(out, other)
    assert not torch.allclose(out, seen, atol=1e-2)


@pytest.mark.parametrize("temporal, mixed_precision", [("sti", "no"), ("sti", "bf16"), ("conv3d", "no")])
def test_gradient_checkpointing_changes_no_gradient(temporal, mixed_precision):
    unet = random_dfgn(temporal)
    inputs = random_inputs()
    gradients = []
    for checkpointing in (False, True):
        unet.gradient_checkpointing = checkpointing
        with precision("cpu", mixed_precision):
            out = unet(*inputs, first(5))
        out.square().mean().backward()  # outside, as in training
        gradients.append([p.grad.clone() for p in unet.parameters()])
        unet.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_save_and_load(tmp_path):
    unet = random_dfgn(temporal="conv3d").eval()  # as from_pretrained leaves it
    unet.save_pretrained(tmp_path)
    again = DFGN.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert again.config.temporal == "conv3d"
    inputs = random_inputs(slots=3)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), again(*inputs))


def test_unknown_temporal_layer():
    with pytest.raises(ValueError, match="'sti' or 'conv3d'"):
        DFGN(**{**TINY, "temporal": "lstm"})


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_layers_keep_precision_and_layout(temporal):
    """Under autocast a frame stays bf16 and channels_last through temporal layers: fp32, or another layout, would
    spread from there through the rest of the network, at twice the memory traffic."""
    unet = random_dfgn(temporal=temporal).to(memory_format=torch.channels_last)
    seen = []
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for layer in block.temporal:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        unet(*random_inputs(slots=3))
    assert seen
    for h in seen:
        assert h.dtype == torch.bfloat16
        assert h.is_contiguous(memory_format=torch.channels_last)
