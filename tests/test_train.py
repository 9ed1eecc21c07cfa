"""A run of train.py from its flags to what it leaves, alone and with sample.py after it."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import curriculum
import data
import masks
import sample
import train
from model import DFGN
from support import media
from tests.clips import fill, scan
from tests.runs import FEW_STEPS, FLAGS, NO_PICTURES, ROOT, log, run_here, same, weights, words

# What a run leaves


def test_a_run_leaves_what_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"unet", "vae", "prior", "scheduler", "model_index.json", "README.md", "log.jsonl"}
    assert names >= {"progress.png", "sample.gif", "validation-3.png", "validation-6.png"}
    assert names >= {"checkpoint-3", "checkpoint-6"}
    assert not [name for name in names if "tmp" in name]


def test_the_log_says_what_was_trained(trained):
    entries = log(trained)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "validation_loss" in entry] == [3, 6]
    shares = {f"p_{task}" for task in masks.TASKS}
    for entry in entries:
        assert entry.keys() >= {"loss", "learning_rate", "grad_norm", "skipped", "mean_k"}
        assert entry.keys() >= {"p_term", "i_term", "d_term", "set_point", "aim", "difficulty"}
        assert all(0 < entry[name] < 1 for name in ("set_point", "aim", "difficulty"))
        assert sum(entry[name] for name in shares) == pytest.approx(1)
    assert [entry["set_point"] for entry in entries] == pytest.approx(np.linspace(0.05, 0.95, 6).tolist())


def test_the_log_says_what_the_curriculum_drew_from(trained):
    """In each entry what led to the probabilities of that very step."""
    for entry in log(trained):
        assert entry["aim"] == pytest.approx(entry["set_point"])  # a horizon of one step: P* is its mean
        static = curriculum.static_probabilities((entry["step"] - 1) / 5)
        P = curriculum.balance(static, curriculum.difficulty_map(entry["aim"]))
        assert entry["difficulty"] == pytest.approx((P * curriculum.DIFFICULTY).sum())
        assert [entry[f"p_{task}"] for task in masks.TASKS] == pytest.approx(P.sum(axis=1).tolist())


def test_the_sticker_of_the_sheet_is_a_clip(trained):
    assert len(media.read_clip(trained / "sample.gif", 32)[0]) <= masks.NUM_FRAMES


def test_the_finished_model_has_the_averaged_weights(trained):
    assert same(weights(trained), weights(trained / "checkpoint-6", "unet_ema"))
    assert not same(weights(trained), weights(trained / "checkpoint-6"))


def test_old_checkpoints_go(run):
    out = run(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


# What flags change


def test_accumulation_is_the_larger_batch(trained, run):
    """Equal but for the order of summation. Adam turns a gradient that is all rounding into a step of full
    size, so a few weights may differ by a step."""
    halves = run(train_batch_size=2, gradient_accumulation_steps=2)
    for a, b in zip(log(trained), log(halves), strict=True):
        assert a["mean_k"] == b["mean_k"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert weights(trained).keys() == weights(halves).keys()
    a, b = (torch.cat([w.flatten() for _, w in sorted(weights(out).items())]) for out in (trained, halves))
    assert (a - b).norm() < 1e-3 * a.norm() and ((a - b).abs() > 1e-3).float().mean() < 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        dict(temporal="conv3d", ddu="off"),
        dict(temporal="conv1d", ddu="loss"),
        dict(ddu="condition"),
        dict(curriculum="linear"),
    ],
    ids=str,
)
def test_the_ablations_run(run, flags):
    out = run(max_train_steps=2, **flags)
    entries = log(out)
    assert all(np.isfinite(entry["loss"]) for entry in entries)
    eight = [entry["mean_k"] == masks.NUM_FRAMES for entry in entries]
    assert all(eight) if flags.get("ddu") in ("off", "condition") else not any(eight)
    if "ddu" in flags:  # and no curriculum: all levels alike
        assert entries[-1]["difficulty"] == pytest.approx(0.5)
    if "temporal" in flags:
        assert sample.load(out)[0].unet.config.temporal == flags["temporal"]


def test_without_prior_the_network_is_the_papers_alone(run):
    out = run(max_train_steps=2, prior=False)
    assert np.isfinite(log(out)[-1]["loss"])
    assert not (out / "prior").exists() and not (out / "checkpoint-2" / "prior").exists()
    denoiser, encoders, _ = sample.load(out)
    assert encoders.prior is None and isinstance(denoiser, DFGN)
    assert denoiser.config.condition_channels == encoders.codec.latent_channels


@pytest.mark.parametrize("ddu", ["on", "off"])
def test_it_trains_on_as_many_clips_as_are_asked_for(run, monkeypatch, capsys, ddu):
    """Evenly chosen of those that are not held out, which stay; without loss mask some may be too short."""
    seen, real = [], train.train
    monkeypatch.setattr(train, "train", lambda fixed, *rest: (seen.append(fixed), real(fixed, *rest)))
    run(max_train_steps=1, max_train_samples=5, ddu=ddu)
    (fixed,) = seen
    every, held_out = fixed.dataset.split("train"), fixed.dataset.split("validation")
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, 5).astype(int)]
    assert len(every) > 15 and held_out and len(data.usable(chosen, "on")) == 5
    assert fixed.clips == data.usable(chosen, ddu) and fixed.held_out == data.usable(held_out, ddu)
    printed = f"{len(fixed.clips)} clips to train on, {len(fixed.held_out)} held out"
    assert printed in capsys.readouterr().out


def test_a_folder_without_captions_trains_without_text(run, folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(folder.glob("*.gif"))[:12]:
        shutil.copy(path, bare)
    (bare / "broken.gif").write_bytes(b"GIF89a")
    (bare / "a.tgs").touch()
    run(data=bare, max_train_steps=2)
    printed = capsys.readouterr().out
    assert "training without text" in printed and "11 clips to train on, 1 held out, 1 dropped" in printed
    assert "\n  note: files with a suffix that is not read: .tgs\n  dropped broken.gif: " in printed


@pytest.mark.parametrize("flags", [{}, dict(ddu="off")], ids=str)
def test_without_captions_and_held_out_clips_one_sticker_is_drawn(run, folder, tmp_path, monkeypatch, flags):
    """Five files without captions: there is no prompt, and no clip for a row of the sheet."""
    bare = tmp_path / "bare"
    bare.mkdir()
    long = [path for path in sorted(folder.glob("*.gif")) if len(media.read_clip(path, 16)[0]) >= 8]
    for path in long[:5]:
        shutil.copy(path, bare)
    monkeypatch.setattr("train.validation_sheet", sample.validation_sheet)
    monkeypatch.setattr("sample.SHEET_STEPS", FEW_STEPS)
    out = run(data=bare, max_train_steps=1, validation_prompts=None, **flags)
    assert len(media.read_clip(out / "sample.gif", 16)[0]) >= 1 and (out / "validation-1.png").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_a_folder_too_small_to_hold_out_anything_trains(run, folder, tmp_path, monkeypatch, count):
    """To overfit: the sheet shows what it is trained on."""
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.glob("*.gif"))[:count]:
        shutil.copy(path, few)
        (few / path.name).with_suffix(".txt").write_text(f"number {path.stem}")
    sheet, prompts = NO_PICTURES["validation_sheet"], []
    monkeypatch.setattr("train.validation_sheet", lambda *shown: prompts.extend(shown[4]) or sheet())
    out = run(data=few, max_train_steps=1, validation_prompts=None)
    assert prompts == [f"number {i:05}" for i in range(min(count, 6))]
    assert (out / "model_index.json").exists() and (out / "checkpoint-1").is_dir()


def test_latest_without_a_checkpoint_starts_fresh_and_says_so(run, capsys):
    assert log(run(max_train_steps=1, resume_from_checkpoint="latest"))[-1]["step"] == 1
    assert "holds no checkpoint: the run starts at its beginning" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    "said, flags",
    [
        ("--resolution 30", dict(resolution=30)),
        ("--max_train_steps: 0 must", dict(max_train_steps=0)),
        ("--seed: -1 must", dict(seed=-1)),
        ("--seed: 99999999999999999999 must", dict(seed=99999999999999999999)),
        ("--ddu off leaves no task", dict(ddu="off", curriculum="dcl")),
        ("--ddu loss leaves no task", dict(ddu="loss", curriculum="dcl")),
        ("--ddu condition leaves no task", dict(ddu="condition", curriculum="linear")),
        ("is not a folder", dict(data="absent")),
        ("is no checkpoint", dict(resume_from_checkpoint="nowhere")),
        ("--data: must not be empty", dict(data="")),  # a variable of the shell that is not set
        ("torchrun", dict(shard=True)),
        ("--low_memory", dict(low_memory=True, mixed_precision="fp16")),
    ],
    ids=str,
)
def test_bad_flags_get_one_sentence(run, refused, said, flags):
    refused(said, run, **flags)


@pytest.mark.parametrize("flag", ["vae", "init_unet"])
def test_a_folder_that_is_no_part_gets_one_sentence(run, refused, tmp_path, flag):
    refused(f"--{flag}", run, **{flag: tmp_path})


def test_the_vae_that_ships_is_missing(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("support.encoders.SHIPPED_VAE", tmp_path / "absent")
    assert "name a VAE with --vae" in refused(f"the VAE in {tmp_path / 'absent'} cannot be loaded", run)


def test_an_output_folder_among_the_stickers_is_passed_over_and_refused_in_their_place(
    trained, run, refused, tmp_path
):
    place = fill(tmp_path / "a", "a.gif")
    shutil.copytree(trained, place / "finished")
    shutil.copytree(trained, place / "begun")
    (place / "begun" / "model_index.json").unlink()
    assert set(scan(place)[0]) == {"a.gif"}
    refused("is the folder of the stickers: choose another", run, "a", data=place)


def test_an_empty_folder_gets_one_sentence(run, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("holds no sticker", run, data=tmp_path / "empty")


@pytest.mark.parametrize(
    "said, flags",
    [
        ("already holds a run", dict()),
        ("--learning_rate is 0.5", dict(learning_rate=0.5, resume_from_checkpoint="latest")),
        ("--train_batch_size", dict(train_batch_size=8, resume_from_checkpoint="latest")),
        ("--preset is tiny", dict(preset="tiny", resume_from_checkpoint="latest")),
    ],
    ids=str,
)
def test_a_run_is_not_overwritten_and_keeps_its_schedule(trained, run, refused, said, flags):
    before = (trained / "log.jsonl").read_bytes()
    refused(said, run, trained, **flags)
    assert (trained / "log.jsonl").read_bytes() == before


# sample.py after it


@pytest.mark.parametrize(
    "output, flags",
    [
        ("image.webp", ["--prompt", "a red heart", "--image", "0:{folder}/00000.gif"]),
        ("between.mp4", ["--image", "0:{folder}/00000.gif", "3:{folder}/00001.gif", "--num_frames", 4]),
        ("two.png", ["--prompt", "a cat", "--num_samples", 2]),
    ],
    ids=["webp", "mp4", "png"],
)
def test_its_checkpoints_can_be_sampled(trained, folder, tmp_path, output, flags):
    flags = [str(flag).format(folder=folder) for flag in flags]
    steps = ["--num_inference_steps", 2, "--output", tmp_path / output]
    run_here(sample.main, "--checkpoint", trained / "checkpoint-6", *steps, *flags)
    read = media.read_image if output.endswith("png") else lambda path, side: media.read_clip(path, side)[0]
    assert read(tmp_path / output, 64).shape[-3:] == (64, 64, 3)


def test_the_real_commands(folder, cache, tmp_path):
    """As a user types them, one after the other, and a sticker is there: in a folder whose name has a space
    and letters that the locale lacks."""
    place = tmp_path / "мои стикеры"
    place.mkdir()

    def command(program, *flags):
        line = [sys.executable, ROOT / program, *map(str, flags)]
        env = dict(os.environ, OMP_NUM_THREADS="1")  # more, beside other tests, wait for each other
        env |= dict(LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
        result = subprocess.run(line, capture_output=True, text=True, cwd=place, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    flags = dict(data=folder, cache_dir=cache, max_train_steps=2, output_dir="runs/бег")
    command("train.py", *words(FLAGS | flags))
    card = (place / "runs" / "бег" / "README.md").read_text(encoding="utf-8")
    assert "--checkpoint 'runs/бег'" in card
    said = command("sample.py", "--prompt", "a red heart bouncing", "--num_inference_steps", 2)
    assert "the newest run: runs/" in said and "wrote sticker.gif" in said
    assert media.read_clip(place / "sticker.gif", 64)[0].shape[1:] == (64, 64, 3)
