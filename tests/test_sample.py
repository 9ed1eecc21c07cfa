"""Guidance, sampling of every task, the command line and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from model import DFGN, make_scheduler
from support import media
from support.checkpoint import write_index, write_unet
from support.encoders import Encoders, PatchPCA
from tests.stress.fuzz import bombs, memory

ROOT = Path(__file__).parents[1]
SETTINGS = dict(resolution=16, mixed_precision="no", guidance_scale=3.0, image_guidance_scale=1.5)


def write_model(folder, unet, encoders, scheduler, settings):
    write_unet(folder / "unet", unet, unet.state_dict())
    write_index(folder, encoders, scheduler, settings)


@pytest.fixture(scope="module")
def parts():
    """A small random network with a fitted codec at 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    codec = PatchPCA(patch_size=4, latent_channels=6)
    codec.fit(
        torch.from_numpy(rng.integers(0, 255, (30, 4, 4, 3), dtype=np.uint8))
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
    )
    encoders = Encoders(codec)
    torch.manual_seed(0)
    unet = DFGN(
        latent_channels=6,
        block_out_channels=(16, 32),
        attention_levels=(True, True),
        layers_per_block=1,
        head_width=8,
        cross_attention_dim=16,
        clip_dim=256,
        t5_dim=256,
        norm_num_groups=4,
        sti_heads=2,
        sti_head_width=8,
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval(), encoders


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_model(folder, *parts, make_scheduler(), SETTINGS)
    return folder


def given(parts, slots, is_given, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([i in is_given for i in range(slots)]).expand(batch, -1)
    return torch.randn(1, slots, 6, 4, 4, generator=g).expand(batch, -1, -1, -1, -1), mask


# --------------------------------------------------------------------------------------------------- guidance


def one_step(parts, weights, batch=2):
    unet, encoders = parts
    g = torch.Generator().manual_seed(1)
    noisy, z = (torch.randn(batch, 4, 6, 4, 4, generator=g) for _ in range(2))
    states = encoders.text(["a red heart", "a cat"] + [""] * batch)
    text, null = (tuple(x[half] for x in states) for half in (slice(batch), slice(batch, None)))

    def e(image, words):
        with torch.no_grad():
            return unet(
                noisy, z if image else torch.zeros_like(z), torch.full((batch,), 500), text if words else null
            )

    with torch.no_grad():
        return sample.guided_noise(unet, noisy, z, 500, text, null, weights), e


def test_nested_guidance_is_its_formula(parts):
    s_I, s_T = 1.7, 4.2
    guided, e = one_step(parts, sample.guidance_weights(True, True, s_I, s_T))
    formula = e(0, 0) + s_I * (e(1, 0) - e(0, 0)) + s_T * (e(1, 1) - e(1, 0))
    torch.testing.assert_close(guided, formula, rtol=1e-4, atol=1e-5)


def test_equal_scales_are_the_joint_form_in_two_passes(parts):
    weights = sample.guidance_weights(True, True, 7.5, 7.5)
    assert len(weights) == 2
    guided, e = one_step(parts, weights)
    torch.testing.assert_close(guided, e(0, 0) + 7.5 * (e(1, 1) - e(0, 0)), rtol=1e-4, atol=1e-4)


def test_passes_of_each_task():
    passes = {
        "text and image": sample.guidance_weights(True, True, 1.5, 7.5),
        "text alone": sample.guidance_weights(False, True, 1.5, 7.5),
        "image alone": sample.guidance_weights(True, False, 1.5, 7.5),
        "scales of one": sample.guidance_weights(True, True, 1, 1),
        "nothing": sample.guidance_weights(False, False, 1.5, 7.5),
    }
    assert {name: len(weights) for name, weights in passes.items()} == {
        "text and image": 3,
        "text alone": 2,
        "image alone": 2,
        "scales of one": 1,
        "nothing": 1,
    }
    for weights in passes.values():
        assert sum(weights.values()) == pytest.approx(1)
    assert passes["text alone"][False, True] == 7.5 and passes["image alone"][True, False] == 1.5


def test_schedule_is_that_of_latent_diffusion():
    scheduler = make_scheduler()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample and scheduler.config.prediction_type == "epsilon"


# --------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "slots, is_given, prompt",
    [
        (8, [], "a heart"),
        (8, [0], "a heart"),
        (8, [2], ""),
        (8, [0, 3, 6], "a heart"),
        (4, [0, 3], "a heart"),
        (8, [0, 1, 2, 3, 4], "a heart"),
        (8, [2, 3, 4, 5, 6, 7], "a heart"),
        (3, [0], "a heart"),
        (8, [], ""),
    ],
)
def test_every_task_from_one_network(parts, slots, is_given, prompt):
    z, mask = given(parts, slots, is_given)
    frames = sample.generate(*parts, [prompt], z, mask, num_inference_steps=3)
    assert frames.shape == (1, slots, 16, 16, 3) and frames.dtype == np.uint8


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(parts):
    z, mask = given(parts, 4, [0], batch=3)
    prompts, options = ["a heart", "a cat", "a heart"], dict(num_inference_steps=4)
    three = sample.generate(*parts, prompts, z, mask, **options)
    one = sample.generate(*parts, prompts[:1], z[:1], mask[:1], **options)
    assert np.abs(three[:1].astype(int) - one).max() <= 1
    assert not np.array_equal(three[0], three[2])  # the same prompt, another sample
    assert np.array_equal(three, sample.generate(*parts, prompts, z, mask, **options))
    assert not np.array_equal(three, sample.generate(*parts, prompts, z, mask, seed=1, **options))


def test_sampling_starts_from_a_clip_of_the_gaussian(monkeypatch):
    """The noisiest step still shows strong modes: noise alone would pull them towards zero."""
    unet = DFGN(
        latent_channels=6,
        block_out_channels=(16, 32),
        attention_levels=(True, True),
        layers_per_block=1,
        head_width=8,
        cross_attention_dim=16,
        clip_dim=256,
        t5_dim=256,
        norm_num_groups=4,
        sti_heads=2,
        sti_head_width=8,
        prior_side=4,
    )
    encoders, batch = Encoders(PatchPCA(patch_size=4, latent_channels=6)), 64
    monkeypatch.setattr("model.LATENT_ERROR", 1e9)  # of the network, whose part is none then
    monkeypatch.setattr(encoders.codec, "decode", lambda latents: latents)
    unet.prior.mean.fill_(4.0)
    unet.prior.modes[0] = 96**-0.5  # the mean of all latents
    unet.prior.modes[1:] = 0
    unet.prior.variance[:] = 1e-3
    unet.prior.variance[:, 0] = 96  # so its standard deviation is 1
    nothing, none = given([unet], 4, (), batch)
    clips = sample.generate(
        unet, encoders, [""] * batch, nothing, none, num_inference_steps=20, guidance_scale=1.0
    )
    means = clips.astype(float).mean(axis=(1, 2, 3, 4))
    assert means.mean() == pytest.approx(4, abs=0.3) and means.std() == pytest.approx(
        0.5, abs=0.15
    )  # 4 frames each


def test_slots_that_are_not_given_are_ignored_and_given_ones_are_not(parts):
    z, mask = given(parts, 4, [0])
    other, _ = given(parts, 4, [0], seed=1)
    options = dict(num_inference_steps=3, eta=0.0)
    first = sample.generate(*parts, [""], z, mask, **options)
    assert np.array_equal(
        first, sample.generate(*parts, [""], torch.cat([z[:, :1], other[:, 1:]], 1), mask, **options)
    )
    assert not np.array_equal(first, sample.generate(*parts, [""], other, mask, **options))


def test_negative_prompt_and_eta_matter(parts):
    z, mask = given(parts, 4, [])
    clips = [
        sample.generate(*parts, ["a heart"], z, mask, num_inference_steps=4, **options)
        for options in ({}, dict(negative_prompt="a cat"), dict(eta=0.0), dict(guidance_scale=1.0))
    ]
    assert all(not np.array_equal(clips[0], clip) for clip in clips[1:])


# ----------------------------------------------------------------------------------------------- command line


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "sample.py", *map(str, arguments)], capture_output=True, text=True
    )


def picture(path, colour="red"):
    Image.new("RGB", (20, 12), colour).save(path)
    return path


def test_command_line(checkpoint, tmp_path):
    red, blue = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "blue")
    result = run(
        "--checkpoint",
        checkpoint,
        "--prompt",
        "a heart",
        "--image",
        f"0:{red}",
        f"7:{blue}",
        "--num_samples",
        2,
        "--num_inference_steps",
        2,
        "--output",
        tmp_path / "new" / "x.gif",
    )
    assert result.returncode == 0, result.stderr
    assert "not trained on this pattern" in result.stderr
    for i in range(2):
        frames, durations = media.read_clip(tmp_path / "new" / f"x-{i}.gif", 16)
        assert durations.sum() == pytest.approx(1000, abs=50)  # 8 frames, 8 a second


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--image", "9:a.png"], "--image 9:a.png"),
        (["--image", "a.png"], "SLOT:FILE"),
        (["--image", "0:absent.png"], "absent.png"),
        (["--image", "0:a.png", "0:a.png"], "more than once"),
        (["--prompt", "x", "--output", "x.bmp"], ".bmp"),
        (["--prompt", "x", "--num_frames", "2"], "--num_frames 2"),
        (["--prompt", "x", "--num_inference_steps", "0"], "--num_inference_steps 0"),
        (["--prompt", "x", "--fps", "inf"], "--fps inf"),
        (["--prompt", "x", "--fps", "1e-6"], "--fps 1e-06"),
        (["--prompt", "x", "--eta", "nan"], "--eta nan"),
        (["--prompt", "x", "--guidance_scale", "nan"], "--guidance_scale nan"),
        (["--prompt", "x", "--image_guidance_scale", "1e9"], "--image_guidance_scale"),
        (
            ["--prompt", "x", "--num_inference_steps", "1", "--output", "a.png/a.gif"],
            "a.png/a.gif cannot be written",
        ),
        ([], "--prompt"),
    ],
)
def test_bad_flags_get_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    refused(monkeypatch, capsys, ["--checkpoint", str(checkpoint), *arguments], words)


def test_a_picture_that_takes_all_memory_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "bomb.mp4").write_bytes(bombs()["table.mp4"])
    before = memory("VmHWM")
    refused(
        monkeypatch,
        capsys,
        ["--checkpoint", str(checkpoint), "--image", f"0:{tmp_path / 'bomb.mp4'}"],
        "bomb.mp4",
    )
    assert memory("VmHWM") - before < 1024  # MiB


def refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        sample.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert words in message.splitlines()[-1]


def test_bad_checkpoints_get_one_sentence(checkpoint, parts, tmp_path, monkeypatch, capsys):
    refused(
        monkeypatch, capsys, ["--checkpoint", str(tmp_path / "absent"), "--prompt", "x"], "is not a folder"
    )
    refused(monkeypatch, capsys, ["--checkpoint", str(tmp_path), "--prompt", "x"], "model_index.json")

    other = tmp_path / "other"  # the configuration of another size
    write_model(other, *parts, make_scheduler(), SETTINGS)
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(dict(config, block_out_channels=[32, 64])))
    refused(monkeypatch, capsys, ["--checkpoint", str(other), "--prompt", "x"], "cannot be read")

    for resolution in (18, 2, 2**12 + 1):
        index = json.loads((checkpoint / "model_index.json").read_text())
        (other / "model_index.json").write_text(json.dumps(dict(index, resolution=resolution)))
        (other / "unet" / "config.json").write_text(json.dumps(config))
        refused(
            monkeypatch, capsys, ["--checkpoint", str(other), "--prompt", "x"], f"resolution = {resolution}"
        )

    mixed = tmp_path / "mixed"
    write_model(
        mixed,
        parts[0],
        Encoders(PatchPCA(patch_size=4, latent_channels=5)),
        make_scheduler(),
        SETTINGS,
    )
    refused(monkeypatch, capsys, ["--checkpoint", str(mixed), "--prompt", "x"], "latent channels")
