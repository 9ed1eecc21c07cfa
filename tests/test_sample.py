"""Guidance, sampling of every task, the models it finds, the command line and its refusals."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from model import make_scheduler
from support import media, outputs
from support.checkpoint import write_unet
from support.encoders import Encoders
from support.finished import SHIPPED_MODEL, CheckpointError, find_model
from support.prior import Preconditioned
from tests.checkpoints import CHANNELS, SETTINGS, SIDE, toy_model, toy_vae, write_model
from tests.stress.fuzz import bombs, memory
from tests.toys import assert_refused, given_frames


@pytest.fixture(scope="module")
def model():
    """(denoiser, encoders), a bare DFGN."""
    return toy_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("run"), *model)


def some_latents(slots, given, batch=1, seed=0):
    """Latents (batch, slots, C, h, w), equal for all clips, and a mask of the slots that are `given`."""
    latents = torch.randn(1, slots, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return latents.expand(batch, -1, -1, -1, -1), given_frames(*given, count=slots, batch=batch)


# ------------------------------------------------------------------------------------------------------------
# Guidance


def one_step(model, weights, batch=2):
    """guided_noise of one step, e(image, text), the noise under one condition in a pass of its own, and which
    frames are given."""
    denoiser, encoders = model
    g = torch.Generator().manual_seed(1)
    noisy, latents = (torch.randn(batch, 4, CHANNELS, SIDE, SIDE, generator=g) for _ in range(2))
    given, none = given_frames(0, 2, count=4), given_frames(count=4)
    states = encoders.text(["a red heart", "a cat"] + [""] * batch)
    text, null = (tuple(x[half] for x in states) for half in (slice(batch), slice(batch, None)))

    def e(image, words):
        timesteps = torch.full((batch,), 500)
        with torch.no_grad():
            return denoiser(noisy, latents, given if image else none, timesteps, text if words else null)

    with torch.no_grad():
        return sample.guided_noise(denoiser, noisy, latents, given, 500, text, null, weights), e, given


def test_nested_guidance_is_its_formula(model):
    """All conditions go through the network as one batch, and each as if alone; unknown frames are guided."""
    s_I, s_T = 1.7, 4.2
    weights = sample.guidance_weights(True, True, s_I, s_T)
    assert len(weights) == 3
    guided, e, given = one_step(model, weights)
    formula = e(0, 0) + s_I * (e(1, 0) - e(0, 0)) + s_T * (e(1, 1) - e(1, 0))
    torch.testing.assert_close(guided[~given], formula[~given], rtol=1e-4, atol=1e-5)


def test_equal_scales_are_the_joint_form_in_two_passes(model):
    weights = sample.guidance_weights(True, True, 7.5, 7.5)
    assert len(weights) == 2
    guided, e, given = one_step(model, weights)
    formula = e(0, 0) + 7.5 * (e(1, 1) - e(0, 0))
    torch.testing.assert_close(guided[~given], formula[~given], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_text, scales", [(True, (1.7, 4.2)), (True, (7.5, 7.5)), (False, (5.0, 1.0))])
def test_given_frames_are_not_guided(model, has_text, scales):
    """Whatever the scales, their noise is that of the condition that shows most."""
    guided, e, given = one_step(model, sample.guidance_weights(True, has_text, *scales))
    torch.testing.assert_close(guided[given], e(1, has_text)[given], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided[~given], e(1, has_text)[~given], rtol=1e-2)


def test_passes_of_each_task():
    weights = {
        "text and image": sample.guidance_weights(True, True, 1.5, 7.5),
        "text alone": sample.guidance_weights(False, True, 1.5, 7.5),
        "image alone": sample.guidance_weights(True, False, 1.5, 7.5),
        "scales of one": sample.guidance_weights(True, True, 1, 1),
        "nothing": sample.guidance_weights(False, False, 1.5, 7.5),
    }
    assert [len(passes) for passes in weights.values()] == [3, 2, 2, 1, 1]
    for passes in weights.values():
        assert sum(passes.values()) == pytest.approx(1)
    assert weights["text alone"][False, True] == 7.5 and weights["image alone"][True, False] == 1.5


def test_schedule_is_that_of_latent_diffusion():
    scheduler = make_scheduler()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample and scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("steps", [1, 2, 3, 25, 50, 600, 999, 1000])
def test_any_number_of_steps_starts_at_the_noisiest_timestep(steps):
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert timesteps == sorted(set(timesteps), reverse=True)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_is_that_of_diffusers_where_the_steps_divide_1000(eta):
    scheduler, (x, noise, fresh) = make_scheduler(), torch.randn(3, 2, 8, generator=torch.manual_seed(0))
    scheduler.set_timesteps(25)
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]
    for t, alpha, after in zip(scheduler.timesteps, alphas, alphas[1:]):
        theirs = scheduler.step(noise, t, x, eta=eta, variance_noise=fresh)
        ours, clean = sample.ddim_step(x, noise, alpha, after, eta, fresh)
        torch.testing.assert_close(ours, theirs.prev_sample)
        torch.testing.assert_close(clean, theirs.pred_original_sample)


@pytest.mark.parametrize("steps", [7, 25, 30, 60, 600])
def test_a_network_that_knows_the_clip_gets_just_the_noise_that_it_is_told_of(steps):
    """By the timestep that is told, the noise in x is that of the start in every step; and the clip comes
    out."""
    clip, started, scheduler = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1, 1), [], make_scheduler()

    def denoiser(noisy, latents, given, timestep, text):
        alpha = scheduler.alphas_cumprod[timestep[0]]
        noise = (noisy - alpha**0.5 * clip) / (1 - alpha) ** 0.5
        started.append(noise)
        return noise

    denoiser.device = torch.device("cpu")
    encoders = SimpleNamespace(text=lambda texts, device: (torch.zeros(len(texts), 1),) * 4)
    given, flags = torch.zeros(1, 2, dtype=torch.bool), dict(num_inference_steps=steps, eta=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "for_sampling", lambda same: same)
        patch.setattr(sample, "first_latents", lambda denoiser, scheduler, noise, *_: noise)
        made = sample.generate_latents(denoiser, encoders, [""], torch.zeros_like(clip), given, **flags)
    for noise in started:
        torch.testing.assert_close(noise, started[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made, clip, rtol=1e-3, atol=1e-3)


def test_a_model_is_run_in_a_precision_that_this_machine_has(checkpoint, monkeypatch):
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | dict(mixed_precision="bf16")))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for native, expected in ((False, "no"), (True, "bf16")):
        monkeypatch.setattr("support.machine.native_bf16", lambda: native)
        assert sample.load(checkpoint)[2]["mixed_precision"] == expected


# ------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize(
    "slots, given, prompt",
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
def test_every_task_from_one_network(model, slots, given, prompt):
    inputs = some_latents(slots, given)
    frames = sample.generate(*model, [prompt], *inputs, num_inference_steps=3)
    assert frames.shape == (1, slots, 16, 16, 3) and frames.dtype == np.uint8


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(model):
    latents, given = some_latents(4, [0], batch=3)
    prompts, options = ["a heart", "a cat", "a heart"], dict(num_inference_steps=4)
    three = sample.generate(*model, prompts, latents, given, **options)
    one = sample.generate(*model, prompts[:1], latents[:1], given[:1], **options)
    assert np.abs(three[:1].astype(int) - one).max() <= 1
    assert not np.array_equal(three[0], three[2])  # the same prompt, another sample
    assert np.array_equal(three, sample.generate(*model, prompts, latents, given, **options))
    assert not np.array_equal(three, sample.generate(*model, prompts, latents, given, seed=1, **options))


def test_sampling_starts_from_a_clip_of_the_gaussian(monkeypatch):
    """The noisiest step still shows strong modes: noise alone would pull them towards zero."""
    unet, encoders = toy_model(preconditioned=True)
    prior, batch = encoders.prior, 64
    denoiser = Preconditioned(unet, prior, make_scheduler().alphas_cumprod)
    monkeypatch.setattr("support.prior.SAMPLING_ERROR", 1e9)  # of the network, whose part is none then
    monkeypatch.setattr(unet, "forward", lambda noisy, *rest: torch.zeros_like(noisy))
    monkeypatch.setattr(encoders.codec, "decode", lambda latents: latents)
    prior.mean.fill_(4.0)
    prior.no_text.copy_(prior.features(encoders.text([""]))[0])
    prior.modes[0] = prior.mean.numel() ** -0.5  # the mean of all latents
    prior.modes[1:] = 0
    prior.variance[:] = 1e-3
    prior.variance[:, 0] = prior.mean.numel()  # so its standard deviation is 1
    prior.frames[:] = torch.eye(8)
    options = dict(num_inference_steps=20, guidance_scale=1.0)
    clips = sample.generate(denoiser, encoders, [""] * batch, *some_latents(4, (), batch), **options)
    means = clips.astype(float).mean(axis=(1, 2, 3, 4))
    assert means.mean() == pytest.approx(4, abs=0.3)
    assert means.std() == pytest.approx(0.5, abs=0.15)  # of 4 frames each


@pytest.mark.parametrize("preconditioned", [False, True])
def test_latents_that_are_not_given_are_ignored_and_given_ones_are_not(preconditioned):
    unet, encoders = toy_model(preconditioned)
    denoiser = sample.precondition(unet, encoders.prior, make_scheduler().alphas_cumprod)
    latents, given = some_latents(4, [0])
    other, _ = some_latents(4, [0], seed=1)

    def clip(latents):
        options = dict(num_inference_steps=3, eta=0.0)
        return sample.generate(denoiser, encoders, [""], latents, given, **options)

    first = clip(latents)
    for rest in (other, torch.full_like(other, float("nan"))):
        assert np.array_equal(first, clip(torch.cat([latents[:, :1], rest[:, 1:]], dim=1)))
    assert not np.array_equal(first, clip(other))


def test_negative_prompt_and_eta_matter(model):
    clips = [
        sample.generate(*model, ["a heart"], *some_latents(4, []), num_inference_steps=4, **options)
        for options in ({}, dict(negative_prompt="a cat"), dict(eta=0.0), dict(guidance_scale=1.0))
    ]
    assert all(not np.array_equal(clips[0], clip) for clip in clips[1:])


# ------------------------------------------------------------------------------------------------------------
# The model: a folder, the newest run, a hub id


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_finished_run_samples_as_the_model_that_was_saved(preconditioned, tmp_path):
    unet, encoders = toy_model(preconditioned)
    denoiser, loaded, settings = sample.load(write_model(tmp_path / "run", unet, encoders))
    assert isinstance(denoiser, Preconditioned) == preconditioned
    assert settings["resolution"] == 16 and settings["guidance_scale"] == 3
    before = sample.precondition(unet, encoders.prior, make_scheduler().alphas_cumprod)
    inputs, options = some_latents(4, [0]), dict(num_inference_steps=2)
    clips = [
        sample.generate(*pair, ["a heart"], *inputs, **options)
        for pair in ((before, encoders), (denoiser, loaded))
    ]
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1


def test_averaged_weights_come_first(model, tmp_path):
    folder, (unet, _) = write_model(tmp_path / "run", *model), model
    write_unet(folder / "unet_ema", unet, {name: 2 * x for name, x in unet.state_dict().items()})
    denoiser, *_ = sample.load(folder)
    assert torch.equal(denoiser.conv_in.weight, 2 * unet.conv_in.weight)


def test_the_newest_run_is_the_one_that_was_finished_last(tmp_path):
    for age, name in enumerate(("b", "a", "c")):
        index = tmp_path / name / "model_index.json"
        index.parent.mkdir()
        index.write_text("{}")
        os.utime(index, (1e9 - age, 1e9 - age))
    (tmp_path / "unfinished" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "unfinished" / "checkpoint-10" / "model_index.json").write_text("{}")
    assert find_model(tmp_path) == (tmp_path / "b", "the newest run")


def test_without_a_checkpoint_the_newest_run_is_taken_and_named(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "runs" / "mine", *model)
    flags = "--prompt heart --num_frames 3 --num_inference_steps 1 --output a.gif"
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split()])
    sample.main()
    assert capsys.readouterr().out.splitlines() == ["the newest run: runs/mine", "wrote a.gif"]


def test_without_any_run_the_model_that_ships_makes_a_sticker_of_that_colour(tmp_path, monkeypatch, capsys):
    """A red heart is more red than blue, a blue one the other way round, on a background that is white."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.finished.snapshot_download", None)  # nothing is fetched
    red_to_blue = []
    for colour in ("red", "blue"):
        flags = f"--num_inference_steps 6 --num_frames 4 --output {colour}.png --prompt"
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split(), f"a {colour} heart bouncing"])
        sample.main()
        found, wrote = capsys.readouterr().out.splitlines()
        assert found == f"no finished run under runs/, so the model that ships: {SHIPPED_MODEL}"
        frames = np.asarray(Image.open(f"{colour}.png").convert("RGB")).astype(int)  # (H, W, 3)
        red_to_blue.append((frames[..., 0] - frames[..., 2]).mean())
        assert (frames.min(axis=2) > 240).mean() > 0.3
    assert red_to_blue[0] > 5 and red_to_blue[1] < -5


def test_without_any_model_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.finished.SHIPPED_MODEL", tmp_path / "nothing")
    words = f"no finished model under runs/ and none in {tmp_path / 'nothing'}: `python train.py` makes one"
    said = assert_refused(sample.main, ["--prompt", "x"], words, monkeypatch, capsys)
    assert "`git checkout pretrained` brings back the one that ships" in said


def test_a_model_says_how_many_steps_it_is_sampled_with(model, tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "run", *model, dict(SETTINGS, num_inference_steps=3))
    taken, clips = [], np.zeros((1, 8, 16, 16, 3), np.uint8)
    generate = lambda *_, num_inference_steps, **__: taken.append(num_inference_steps) or clips  # noqa: E731
    monkeypatch.setattr(sample, "generate", generate)
    for flags, steps in (((), 3), (("--num_inference_steps", "2"), 2)):
        argv = ["sample.py", "--checkpoint", folder, "--prompt", "x", "--output", tmp_path / "a.gif", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        sample.main()
        assert taken.pop() == steps


def test_a_hub_id_is_fetched(checkpoint, monkeypatch):
    fetched = []
    fetch = lambda name, allow_patterns: fetched.append(name) or checkpoint  # noqa: E731
    monkeypatch.setattr("support.finished.snapshot_download", fetch)
    _, _, settings = sample.load("someone/stickers")
    assert fetched == ["someone/stickers"] and settings["resolution"] == 16


def test_a_hub_id_that_cannot_be_fetched_gets_one_sentence(monkeypatch):
    def fail(name, allow_patterns):
        raise OSError("we could not\nreach the hub")

    monkeypatch.setattr("support.finished.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="someone/stickers is not a folder, nor a hub id") as error:
        sample.load("someone/stickers")
    assert "could not reach the hub" in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Command line


def picture(path, colour="red"):
    Image.new("RGB", (20, 12), colour).save(path)
    return path


def test_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    red, blue = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "blue")
    flags = ["--prompt", "a heart", "--image", f"0:{red}", f"7:{blue}", "--num_samples", "2"]
    flags += ["--num_inference_steps", "2", "--output", tmp_path / "new" / "x.gif"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", *map(str, [checkpoint, *flags])])
    sample.main()
    assert "not trained on this pattern" in capsys.readouterr().err
    for i in range(2):
        frames, durations = media.read_clip(tmp_path / "new" / f"x-{i}.gif", 16)
        assert durations.sum() == pytest.approx(1000, abs=50)  # 8 frames, 8 a second


@pytest.mark.parametrize("ddu", ["on", "condition", "loss", "off"])
def test_the_validation_sheet_shows_the_tasks_that_are_trained(model, monkeypatch, ddu):
    """Without condition masks that is image and text to video alone."""
    sheets = []
    monkeypatch.setattr("sample.sheet", lambda rows, labels, marks: sheets.append((rows, labels, marks)))
    monkeypatch.setattr("sample.SHEET_STEPS", 1)
    settings = dict(seed=0, mixed_precision="no", guidance_scale=2.0, image_guidance_scale=2.0)
    clip = SimpleNamespace(longest=8, caption="a cat", name="a.gif")
    dataset = SimpleNamespace(read=lambda clip, k: np.ones((k, CHANNELS, SIDE, SIDE), np.float32))
    args = SimpleNamespace(**settings, resolution=4 * SIDE, ddu=ddu)
    sample.validation_sheet(*model, dataset, [clip], ["a red heart"], args)
    ((rows, labels, marks),) = sheets
    tasks = ["interpolation (I3)", "prediction (P1)", "image and text to video (G1)"]
    tasks = tasks if ddu in ("on", "condition") else tasks[2:]
    assert labels == [label for task in tasks for label in ("real: a cat", task)] + ["a red heart"]
    assert marks[-2] == [True] + [False] * 7 and marks[-1] == [False] * 8
    assert len(rows) == len(marks) == len(labels) and {row.shape for row in rows} == {(8, 16, 16, 3)}


def test_several_samples_become_rows_of_a_sheet(tmp_path):
    clips, none = np.zeros((2, 3, 16, 16, 3), np.uint8), torch.zeros(3, dtype=torch.bool)
    flags = dict(output=tmp_path / "new" / "x.png", num_samples=2, transparent=False, messenger=None, fps=8)
    outputs.write(SimpleNamespace(**flags), clips, none)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.width >= 3 * 16 and picture.height >= 2 * 16


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--image 9:a.png", "--image 9:a.png"),
        ("--image a.png", "SLOT:FILE"),
        ("--image 0:absent.png", "absent.png"),
        ("--image 0:a.png 0:a.png", "more than once"),
        ("--image 0:a.png 1:a.png 2:a.png --num_frames 3", "leave one out"),
        ("--prompt x --output x.bmp", ".bmp"),
        ("--prompt x --num_frames 2", "--num_frames: 2 must"),
        ("--prompt x --interpolate 4", "--interpolate"),
        ("--prompt x --transparent --output a.mp4", "a.mp4 cannot be transparent"),
        ("--prompt x --for telegram --output a.gif", "makes a .webm file"),
        ("--prompt x --for line --num_frames 4", "--for line wants 5 frames"),
        ("--prompt x --num_inference_steps 0", "--num_inference_steps: 0 must"),
        ("--prompt x --fps inf", "--fps: inf must"),
        ("--prompt x --fps 1e-6", "--fps: 1e-6 must"),
        ("--prompt x --eta nan", "--eta: nan must"),
        ("--prompt x --guidance_scale nan", "--guidance_scale: nan must"),
        ("--prompt x --image_guidance_scale 1e9", "--image_guidance_scale"),
        ("--prompt x --output a.png/a.gif", "a.png/a.gif cannot be written"),
        ("--prompt x --output /proc/new/a.gif", "/proc/new/a.gif cannot be written"),
        ("--prompt x --output there.gif", "there.gif is a folder"),
        ("--prompt x --num_samples 2 --output new/there.gif", "there-1.gif is a folder"),
        ("--prompt x --seed 99999999999999999999", "--seed: 99999999999999999999 must"),
        ("", "--prompt"),
    ],
)
def test_bad_flags_get_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    for name in ("there.gif", "new/there-1.gif"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sample, "generate", lambda *args, **more: pytest.fail("said too late"))
    refused(checkpoint, flags.split(), words, monkeypatch, capsys)


def refused(checkpoint, flags, words, monkeypatch, capsys):
    return assert_refused(sample.main, ["--checkpoint", checkpoint, *flags], words, monkeypatch, capsys)


def test_a_picture_that_takes_all_memory_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "bomb.mp4").write_bytes(bombs()["table.mp4"])
    before = memory("VmHWM")
    refused(checkpoint, ["--image", f"0:{tmp_path / 'bomb.mp4'}"], "bomb.mp4", monkeypatch, capsys)
    assert memory("VmHWM") - before < 1024  # MiB


def test_bad_checkpoints_get_one_sentence(model, tmp_path, monkeypatch, capsys):
    prompt = ["--prompt", "x"]
    refused(tmp_path / "absent", prompt, "is not a folder", monkeypatch, capsys)
    refused(tmp_path, prompt, "model_index.json", monkeypatch, capsys)

    other = write_model(tmp_path / "other", *model)
    unet, index = other / "unet" / "config.json", other / "model_index.json"
    config, settings = (json.loads(path.read_text()) for path in (unet, index))
    unet.write_text(json.dumps(dict(config, block_out_channels=[32, 64])))  # of another size
    refused(other, prompt, "cannot be read", monkeypatch, capsys)
    unet.write_text(json.dumps(config))
    for resolution in (18, 2, 2**12 + 1):
        index.write_text(json.dumps(dict(settings, resolution=resolution)))
        refused(other, prompt, f"resolution = {resolution}", monkeypatch, capsys)

    mixed = write_model(tmp_path / "mixed", model[0], Encoders(codec=toy_vae(5)))
    refused(mixed, prompt, f"latent_channels = {CHANNELS}, its other parts 5", monkeypatch, capsys)
