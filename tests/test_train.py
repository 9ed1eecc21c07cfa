"""The training loop: resuming, several processes, accumulation, refusals,
and the real commands at toy size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from model import SIZES
from support import media, options, pictures, stickers
from tests.toy_train import shrink

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stickers.draw_stickers(tmp_path_factory.mktemp("data") / "set", count=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(folder, cache, tmp_path, monkeypatch):
    """Calls train.main with a toy network; returns the output folder.
    Exits with an error raise SystemExit."""
    monkeypatch.setattr(options, "PRESETS", dict(options.PRESETS))
    generate = shrink(options.PRESETS, toy_sizes := dict(SIZES), pictures.generate)
    monkeypatch.setattr(pictures, "generate", generate)
    monkeypatch.setattr(train, "SIZES", toy_sizes)
    monkeypatch.setattr(options, "SIZES", toy_sizes)

    def run(name, **more):
        flags = dict(
            dict(
                data=folder,
                cache_dir=cache,
                output_dir=tmp_path / name,
                max_train_steps=6,
                train_batch_size=4,
                mixed_precision="no",
                num_workers=0,
                validation_steps=0,
                checkpointing_steps=3,
                checkpoints_total_limit=0,
                validation_prompts="a red heart bouncing",
            ),
            **more,
        )
        monkeypatch.setattr(sys, "argv", ["train.py", *flags_of(flags)])
        train.main()
        return tmp_path / name

    return run


def flags_of(flags):
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def weights(folder, part="unet"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_clock(entries):
    return [{name: value for name, value in entry.items() if name != "clips_per_second"} for entry in entries]


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises(run):
    out = run("a", validation_steps=3)
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "unet",
        "codec",
        "scheduler",
        "model_index.json",
        "log.jsonl",
        "progress.png",
        "sample.gif",
        "validation-3.png",
        "validation-6.png",
        "checkpoint-3",
        "checkpoint-6",
    }
    assert not [name for name in names if "tmp" in name]
    entry = log(out)[-1]
    assert entry["step"] == 6 and entry.keys() >= {
        "loss",
        "validation_loss",
        "learning_rate",
        "grad_norm",
        "clips_per_second",
        "p_interpolation",
        "p_prediction",
        "p_generation",
        "mean_k",
        "p_term",
        "i_term",
        "d_term",
    }
    assert entry["p_interpolation"] + entry["p_prediction"] + entry["p_generation"] == pytest.approx(1)
    assert len(media.read_clip(out / "sample.gif", 32)[0]) <= 8
    # the finished folder holds the averaged weights, and they are not the last ones
    assert_same_weights(weights(out), weights(out / "checkpoint-6", "unet_ema"), rtol=0, atol=0)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(out).values(), weights(out / "checkpoint-6").values())
    )


def test_accumulation_is_the_larger_batch(run):
    one, two = run("one"), run("two", train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_weights(weights(one), weights(two), rtol=1e-3, atol=1e-4)
    for a, b in zip(log(one), log(two), strict=True):
        assert a["mean_k"] == b["mean_k"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "flags", [dict(temporal="conv3d"), dict(ddu="off"), dict(curriculum="linear")], ids=str
)
def test_the_ablations_run(run, flags):
    out = run("a", max_train_steps=2, checkpointing_steps=2, **flags)
    assert np.isfinite(log(out)[-1]["loss"])
    if flags.get("ddu") == "off":
        assert log(out)[-1]["mean_k"] == 8


def test_old_checkpoints_go(run):
    out = run("a", checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_folder_without_captions_trains_without_text(run, folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(folder.glob("*.gif"))[:20]:
        shutil.copy(path, bare)
    (bare / "broken.gif").write_bytes(b"GIF89a")
    run("a", data=bare, max_train_steps=2)
    said = capsys.readouterr().out
    assert "training without text" in said and "broken.gif" in said


# --------------------------------------------------------------------------------------------------- refusals


def refused(run, capsys, words, name="a", **flags):
    with pytest.raises(SystemExit) as stop:
        run(name, **flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and words in message, message


def test_bad_flags_get_one_sentence(run, capsys, tmp_path):
    refused(run, capsys, "is not a folder", data=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(run, capsys, "holds no sticker", data=tmp_path / "empty")
    refused(run, capsys, "--resolution 30", resolution=30)
    refused(run, capsys, "--max_train_steps 0", max_train_steps=0)
    refused(run, capsys, "--seed -1", seed=-1)
    refused(run, capsys, "--ddu off", ddu="off", curriculum="dcl")
    refused(run, capsys, "is no checkpoint", resume_from_checkpoint=tmp_path / "nowhere")


def test_a_run_is_not_overwritten_and_keeps_its_schedule(run, capsys):
    out = run("a", max_train_steps=3)
    before = (out / "log.jsonl").read_bytes()
    refused(run, capsys, "already holds a run", max_train_steps=3)
    refused(
        run,
        capsys,
        "--learning_rate is 0.5",
        max_train_steps=3,
        learning_rate=0.5,
        resume_from_checkpoint="latest",
    )
    refused(
        run,
        capsys,
        "--train_batch_size",
        max_train_steps=3,
        train_batch_size=8,
        resume_from_checkpoint="latest",
    )
    refused(
        run, capsys, "--preset is small", max_train_steps=3, preset="small", resume_from_checkpoint="latest"
    )
    assert (out / "log.jsonl").read_bytes() == before


def test_latest_without_a_checkpoint_starts_fresh(run):
    assert log(run("a", max_train_steps=2, resume_from_checkpoint="latest"))[-1]["step"] == 2


# -------------------------------------------------------------------------------- processes and real commands


def command(*words):
    env = dict(os.environ, OMP_NUM_THREADS="1")  # more, beside other tests, wait for each other
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_train_as_one(folder, cache, tmp_path):
    """The same global batches, and the same weights but for the order of summation in fp32."""
    flags = dict(
        data=folder,
        cache_dir=cache,
        max_train_steps=5,
        mixed_precision="no",
        num_workers=0,
        validation_steps=0,
        validation_prompts="a red heart bouncing",
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command(
        *torchrun,
        2,
        "tests/toy_train.py",
        *flags_of(dict(flags, output_dir=tmp_path / "two", train_batch_size=2)),
    )
    command(
        sys.executable,
        "tests/toy_train.py",
        *flags_of(dict(flags, output_dir=tmp_path / "one", train_batch_size=4)),
    )
    one, two = (tmp_path / name for name in ("one", "two"))
    for a, b in zip(log(one), log(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["p_generation"] == pytest.approx(b["p_generation"], rel=1e-3)
    assert_same_weights(weights(one), weights(two), rtol=1e-2, atol=1e-3)


def test_the_real_commands(folder, tmp_path):
    command(
        sys.executable,
        "train.py",
        "--data",
        folder,
        "--cache_dir",
        tmp_path / "cache",
        "--output_dir",
        tmp_path / "run",
        "--max_train_steps",
        2,
        "--train_batch_size",
        2,
        "--validation_prompts",
        "a red heart",
    )
    for name, flags in {
        "text.gif": ["--prompt", "a red heart bouncing"],
        "image.webp": ["--prompt", "a red heart bouncing", "--image", f"0:{folder / '00000.gif'}"],
        "between.mp4": [
            "--image",
            f"0:{folder / '00000.gif'}",
            f"3:{folder / '00001.gif'}",
            "--num_frames",
            4,
        ],
    }.items():
        command(
            sys.executable,
            "sample.py",
            "--checkpoint",
            tmp_path / "run",
            "--num_inference_steps",
            2,
            "--output",
            tmp_path / name,
            *flags,
        )
        assert media.read_clip(tmp_path / name, 64)[0].shape[1:] == (64, 64, 3)
    command(
        sys.executable,
        "sample.py",
        "--checkpoint",
        tmp_path / "run" / "checkpoint-2",
        "--num_inference_steps",
        2,
        "--output",
        tmp_path / "sheet.png",
        "--prompt",
        "a cat",
        "--num_samples",
        2,
    )
    assert media.read_image(tmp_path / "sheet.png", 64).shape == (64, 64, 3)
