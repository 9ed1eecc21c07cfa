"""lab/train_vae.py and its pictures, in small; and the VAE that ships."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lab import train_vae, vae_pictures
from lab.metrics import psnr
from support.encoders import PretrainedVAE
from support.stickers import draw_clip
from tests.runs import run_here, same, weights

SHIPPED = Path(__file__).parents[1] / "pretrained" / "vae"


@pytest.fixture(scope="module", autouse=True)
def toy():
    """A VAE of few channels, on few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "CHANNELS", (8, 8, 8, 8))
        patch.setattr(train_vae, "SIZE", 32)
        patch.setattr(train_vae, "SCALE_PICTURES", 16)
        patch.setattr(train_vae, "WARM_UP", 1)
        patch.setattr(vae_pictures, "COUNTS", dict(stickers=24, drawn=3))
        yield


@pytest.fixture(scope="module")
def vae_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


def train_toy(out, cache, steps=2, **flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    run_here(
        train_vae.main, "--output_dir", out, "--cache_dir", cache, "--steps", steps, "--batch_size", 2, *words
    )


@pytest.fixture(scope="module")
def toy_run(vae_cache, tmp_path_factory):
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("vae") / "run"
    train_toy(out, vae_cache)
    return out


# ------------------------------------------------------------------------------------------------------------
# Pictures


def test_a_picture_depends_on_its_seed_and_index_alone():
    first, second, again = (vae_pictures.draw_picture(0, i) for i in (1, 2, 1))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, second)


def test_a_sample_depends_on_its_step_and_place_alone(vae_cache):
    banks = vae_pictures.banks(vae_cache)
    two, four, other = (vae_pictures.batch(banks, 0, step, n) for step, n in ((7, 2), (7, 4), (8, 2)))
    assert two.shape == (2, 3, 64, 64) and two.min() >= -1 and two.max() <= 1
    assert torch.equal(two, four[:2]) and not torch.equal(two, other)


def test_nothing_is_trained_on_that_the_scores_are_measured_on(vae_cache):
    trained, held_out = (vae_pictures.sticker_frames(vae_cache, split) for split in ("train", "validation"))
    assert len(held_out) and not {x.tobytes() for x in held_out} & {x.tobytes() for x in trained}


def test_every_real_sticker_has_its_licence():
    licences = (vae_pictures.REAL / "LICENSES.md").read_text()
    kinds = {path.stem.split("_")[0] for path in vae_pictures.REAL.glob("*.gif")}
    assert kinds and all(f"`{kind}_*`" in licences for kind in kinds)


def test_stickers_that_were_trained_on_are_not_measured(tmp_path):
    for path in sorted(vae_pictures.REAL.glob("pixelart_*.gif"))[:2]:
        shutil.copy(path, tmp_path / path.name)
        shutil.copy(path, tmp_path / f"other_{path.name}")
    frames = train_vae.read_stickers(tmp_path)
    assert list(frames) == ["other"] and frames["other"].shape == (2, 128, 128, 3)


# ------------------------------------------------------------------------------------------------------------
# Training


def test_until_the_rate_falls_the_number_of_steps_makes_no_difference():
    early = range(1000)
    assert [train_vae.rate(i, 2000) for i in early] == [train_vae.rate(i, 9000) for i in early]
    assert 0 < train_vae.rate(1999, 2000) < 0.01


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(toy_run, vae_cache, tmp_path, monkeypatch):
    take_step = train_vae.Training.take_step

    def interrupted(training, *args):
        if training.step == 1:
            raise KeyboardInterrupt
        return take_step(training, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_vae, "MINUTES", 0)
        patch.setattr(train_vae.Training, "take_step", interrupted)
        train_toy(tmp_path / "run", vae_cache)
    train_toy(tmp_path / "run", vae_cache)
    states = [torch.load(run / "state.pt", weights_only=True) for run in (toy_run, tmp_path / "run")]
    assert states[0]["step"] == 2 and same(*states)
    assert same(*(weights(run, "vae") for run in (toy_run, tmp_path / "run")))


def test_a_run_with_another_seed_is_not_gone_on_with(toy_run, vae_cache, tmp_path, refused):
    copy = shutil.copytree(toy_run, tmp_path / "run")
    refused("--seed 0", train_toy, copy, vae_cache, seed=1)


def test_a_step_makes_the_loss_smaller(vae_cache):
    training, banks = train_vae.Training(seed=0), vae_pictures.banks(vae_cache)
    losses = [training.take_step(banks, batch_size=4, steps=10**6) for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


# ------------------------------------------------------------------------------------------------------------
# What it leaves


def test_diffusers_reads_what_was_saved(toy_run):
    vae = AutoencoderKL.from_pretrained(toy_run / "vae")
    assert all(weight.dtype == torch.float16 for weight in weights(toy_run, "vae").values())
    assert vae.config.latent_channels == 16 and (toy_run / "reconstructions.png").stat().st_size


def test_latents_have_a_standard_deviation_of_one(toy_run, vae_cache):
    codec, x = PretrainedVAE(toy_run / "vae"), vae_pictures.batch(vae_pictures.banks(vae_cache), 5, 0, 16)
    latents = codec.encode(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    assert codec.factor == 8 and latents.shape == (16, 16, 8, 8) and 0.7 < latents.std() < 1.4


def test_train_py_takes_it(toy_run, run):
    out = run(vae=toy_run / "vae", max_train_steps=1)
    assert (out / "unet").is_dir() and not (out / "vae").exists()


def test_measuring_prints_a_table_and_draws_a_picture(toy_run, vae_cache, tmp_path, capsys):
    arguments = ["--evaluate", toy_run / "vae", "--cache_dir", vae_cache, "--picture", tmp_path / "vae.png"]
    shutil.copy(next(vae_pictures.REAL.glob("gopher_*.gif")), tmp_path / "some_gopher.gif")
    run_here(train_vae.main, *arguments, "--stickers", tmp_path)
    said = capsys.readouterr().out
    assert "| held-out drawn frames, 32 pixels |" in said and "| some, 128 pixels | 1 |" in said
    assert (tmp_path / "vae.png").stat().st_size


def test_the_vae_that_ships_is_small_and_gives_stickers_back():
    files = list(SHIPPED.iterdir())
    assert sum(path.stat().st_size for path in files) <= 6e6
    frames, _ = draw_clip("cat", "blue", "blinking", np.random.default_rng(0), num_frames=4)
    frames = train_vae.in_size(np.stack([vae_pictures.media.on_white(frame, 128) for frame in frames]), 64)
    codec = PretrainedVAE(SHIPPED)
    latents = codec.encode(torch.from_numpy(frames))
    assert latents.shape == (4, 16, 8, 8) and 0.5 < latents.std() < 2
    assert psnr(codec.decode(latents).numpy(), frames).mean() > 27
