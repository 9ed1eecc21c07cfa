"""What full size needs: pre-trained parts in the real programs, a Stable Diffusion start, less memory."""

import json
import shutil
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel

import data
import sample
import train
from model import DFGN, SIZES
from support.encoders import MAX_TOKENS, PretrainedCLIP
from support.optim import Average, averaged, make_optimizer
from support.pretrained import EncoderError, start_from_spatial
from tests.runs import NO_PICTURES, QUICK, run_here, same_end, train_here
from tests.tiny_parts import make_unet

# The toy network, between parts of tests/tiny_parts.py
WIDTHS = dict(SIZES["toy"], latent_channels=4, clip_dim=32, t5_dim=24, cross_attention_dim=32)

# Pre-trained parts


def test_latents_that_data_py_encoded_are_those_that_train_py_reads(parts, folder, run, tmp_path, capsys):
    cache = tmp_path / "cache"
    flags = ["--encode", "--vae", parts["vae"], "--resolution", 16, "--cache_dir", cache, "--num_workers", 0]
    run_here(data.main, folder, *flags)
    assert "24 clips" in capsys.readouterr().out
    encoded = {path: path.stat().st_mtime_ns for path in cache.glob("latents-*/*") if path.is_file()}
    run(vae=parts["vae"], cache_dir=cache, max_train_steps=1)
    after = {path: path.stat().st_mtime_ns for path in cache.glob("latents-*/*") if path.is_file()}
    assert encoded and after == encoded


@pytest.fixture(scope="module")
def with_parts(parts, folder, cache, tmp_path_factory):
    """A finished run of four steps with pre-trained parts."""
    out = tmp_path_factory.mktemp("full") / "run"
    with mock.patch.multiple(train, **QUICK, **NO_PICTURES):
        return train_here(out, data=folder, cache_dir=cache, max_train_steps=4, **parts)


def test_a_run_with_pre_trained_parts_names_them(parts, with_parts):
    index = json.loads((with_parts / "model_index.json").read_text())
    assert index["vae"] == str(parts["vae"]) and index["codec_identity"].startswith("AutoencoderKL")
    assert not (with_parts / "vae").exists()
    card = (with_parts / "README.md").read_text()
    assert str(parts["t5"]) in card and "progress.png" in card and "validation-4.png" in card
    assert DFGN.from_pretrained(with_parts / "unet").config.t5_dim == 24


def test_a_resumed_run_remembers_its_parts(with_parts, run, tmp_path):
    shutil.copytree(with_parts / "checkpoint-3", tmp_path / "a" / "checkpoint-3")
    shutil.copy(with_parts / "log.jsonl", tmp_path / "a")
    assert same_end(with_parts, run("a", max_train_steps=4, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("named_anew", [False, True])
def test_a_model_with_pre_trained_parts_is_sampled(parts, with_parts, folder, tmp_path, named_anew):
    flags = ["--prompt", "a red heart", "--num_inference_steps", 2, "--output", tmp_path / "a.gif"]
    flags += ["--vae", parts["vae"], "--image", f"0:{folder / '00000.gif'}"] if named_anew else []
    run_here(sample.main, "--checkpoint", with_parts, *flags)
    assert (tmp_path / "a.gif").stat().st_size > 200


def test_text_is_cut_at_77_tokens(parts):
    states, mask = PretrainedCLIP(parts["clip"])(["a " * 1000])
    assert states.shape[1] == MAX_TOKENS and mask.all()


# A Stable Diffusion start


@pytest.mark.parametrize("slots", [3, 8])
def test_init_unet_is_that_unet_frame_by_frame(tmp_path, slots):
    torch.manual_seed(0)
    make_unet(tmp_path / "sd" / "unet")
    unet = DFGN(**WIDTHS)
    start_from_spatial(unet, tmp_path / "sd")
    spatial = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet", low_cpu_mem_usage=False)
    noisy, latents = torch.randn(2, slots, 4, 8, 8), torch.randn(2, slots, 4, 8, 8)
    given = torch.ones(2, slots, dtype=torch.bool)
    clip, t5 = torch.randn(2, 5, 32), torch.randn(2, 4, 24)
    clip_mask, t5_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    timestep = torch.tensor([3, 700])
    with torch.no_grad():
        ours = unet(noisy, latents, given, timestep, (clip, clip_mask, t5, t5_mask))
        states = torch.cat([clip, unet.t5_projection(t5)], dim=1)  # CLIP's pass unchanged
        theirs = torch.stack([spatial(noisy[:, i], timestep, states).sample for i in range(slots)], dim=1)
    assert ours.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_init_unet_that_does_not_fit(tmp_path):
    make_unet(tmp_path / "wide", widths=(32, 32))
    with pytest.raises(EncoderError, match="--init_unet .*conv_in.weight"):
        start_from_spatial(DFGN(**WIDTHS), tmp_path / "wide")


def test_init_unet_that_is_none(tmp_path):
    with pytest.raises(EncoderError, match="--init_unet"):
        start_from_spatial(DFGN(**WIDTHS), tmp_path)


# Less memory


def test_average_on_the_cpu_and_over_bf16_weights_is_the_plain_one():
    averages = []
    for on_cpu, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        torch.manual_seed(0)
        unet = DFGN(**WIDTHS).to(dtype)
        average = Average(unet, on_cpu)
        for _ in range(3):
            with torch.no_grad():
                for p in unet.parameters():
                    p.add_(0.25)
            average.step(unet)
        before = [p.clone() for p in unet.parameters()]
        with averaged(unet, average):
            averages.append([p.detach().float().clone() for p in unet.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters()))
        assert all(shadow.dtype == torch.float32 for shadow in average.ema.shadow_params)
    for plain, on_cpu, bf16 in zip(*averages):
        assert torch.equal(plain, on_cpu)
        torch.testing.assert_close(plain, bf16, rtol=2e-2, atol=2e-2)


def test_every_tenth_step_gives_the_plain_average_nearly():
    """Within two hundredths of how far the weights went, over weights that drift and shake."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    start, plain, rare = layer.weight.detach().clone(), Average(layer), Average(layer, on_cpu=True)
    copied = []
    for step in range(1, 1001):
        with torch.no_grad():
            layer.weight.add_(0.01 + 0.01 * torch.randn(64, 64))
        plain.step(layer)
        before = rare.ema.shadow_params[0].clone()
        rare.step(layer)
        copied.append(not before.equal(rare.ema.shadow_params[0]))
        if step in (100, 555, 1000):
            went = (plain.weights(layer)["weight"] - start).norm()
            assert (plain.weights(layer)["weight"] - rare.weights(layer)["weight"]).norm() < 0.02 * went
    assert sum(copied[:100]) == 100 and sum(copied[100:]) == 90


def test_averages_of_bf16_weights_are_saved_and_loaded_in_single_precision():
    unet = DFGN(**WIDTHS).to(torch.bfloat16)
    average = Average(unet, on_cpu=True)
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    average.step(unet)
    average.ema.shadow_params[0].add_(1e-5)  # less than bf16 holds
    weights, again = average.weights(unet), Average(unet, on_cpu=True)
    again.load(unet, weights, 1)
    for a, b in zip(average.ema.shadow_params, again.ema.shadow_params, strict=True):
        assert a.dtype == torch.float32 and a.equal(b)


@pytest.mark.parametrize("low_memory", [False, True], ids=["8bit", "low_memory"])
def test_8_bit_adam_learns_as_adam_does(low_memory):
    pytest.importorskip("torchao", reason="optional: pip install torchao")
    final = []
    for small in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(128, 128)
        if small and low_memory:
            layer.to(torch.bfloat16)
        optimizer = make_optimizer(layer, 1e-3, eight_bit=small, low_memory=small and low_memory)
        x = torch.randn(64, 128)
        for _ in range(60):
            loss = (layer(x.to(layer.weight.dtype)).float() - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        final.append(loss.item())
    assert final[1] == pytest.approx(final[0], rel=0.05)
