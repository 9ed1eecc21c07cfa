"""lab.evaluate: the whole command at a toy scale, interrupted and unbroken; what it refuses."""

import gc
import json
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from lab import ablate, bench, evaluate, items, judge, metrics, pictures, pretrained_metrics
from lab.items import CONDITIONED
from lab.rivals import EXCESS
from model import make_scheduler
from support import stickers
from support.checkpoint import write_parts, write_unet
from support.common import UserError
from support.encoders import Encoders
from support.prior import GaussianPrior
from tests.checkpoints import CHANNELS, toy_vae
from tests.test_pretrained_metrics import stand_in_i3d
from tests.toys import WIDTH, fit_to_noise, toy_unet

SCALE = "--num_prompts 6 --num_clips 3 --num_samples 2 --loss_draws 4 --num_inference_steps 4"
SCALE += " --batch_size 4 --num_workers 0"

# ------------------------------------------------------------------------------------------------------------
# The whole command


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """lab.evaluate in this process on a random network of 16 x 16 pixels, a folder of stickers, a third of
    them held out, and an untrained judge: call(output_dir, *flags) returns its report."""
    root = tmp_path_factory.mktemp("evaluate")
    folder = stickers.draw_stickers(root / "stickers", count=24, seed=3)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["split"] = "validation" if i % 3 == 0 else "train"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    unet = toy_unet(latent_channels=CHANNELS, condition_channels=2 * CHANNELS)
    prior = fit_to_noise(GaussianPrior(CHANNELS, 16 // toy_vae().factor, WIDTH), 4)
    write_unet(root / "run" / "unet", unet, unet.state_dict())
    settings = dict(resolution=16, mixed_precision="no", guidance_scale=3.0, image_guidance_scale=1.5)
    write_parts(root / "run", unet, Encoders(codec=toy_vae(), prior=prior), make_scheduler(), settings)

    def call(output_dir, *flags):
        words = ["--checkpoint", root / "run", "--data", folder, "--cache_dir", root / "cache"]
        words += ["--output_dir", output_dir, *SCALE.split(), *flags]
        return evaluate.evaluate(evaluate.parse_args([str(word) for word in words]))

    shares = dict.fromkeys(judge.ATTRIBUTES, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SIDE", 32)
        patch.setattr(evaluate, "get_judge", lambda *_: judge.Judge(width=16))
        patch.setattr(evaluate, "examine", lambda *_: {"clips": 0, "raw": shares, "round trip": shares})
        patch.setattr(pretrained_metrics.subprocess, "run", run_here)
        for name in ("plot_heat_maps", "plot_timesteps"):  # slow, and what test_report.py looks at
            patch.setattr(pictures, name, lambda loss: Image.new("RGB", (1, 1)))
        gc.freeze()  # imageio collects garbage after every MP4: not through all that was imported
        yield call
        gc.unfreeze()


def run_here(words, **_):
    """In the place of a program for each clip, which would take a second to start."""
    assert words[2].endswith(".mp4") and Path(words[2]).stat().st_size > 0
    return Namespace(stdout="score of True 0.25")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return ["--i3d", stand_in_i3d(tmp_path_factory.mktemp("i3d")), "--vqa_command", "python vqa.py {video}"]


@pytest.fixture(scope="module")
def unbroken(call, flags, tmp_path_factory):
    """(output_dir, report) of a call that nothing interrupted."""
    torch.manual_seed(0)  # of the judge
    output_dir = tmp_path_factory.mktemp("unbroken")
    return output_dir, call(output_dir, *flags)


def test_interrupted_evaluation_ends_as_the_unbroken_one(call, flags, unbroken, tmp_path, monkeypatch):
    real, calls = sample.generate, []

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", generate)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path, *flags)
        assert not (tmp_path / "report.json").exists()
    torch.manual_seed(0)
    assert call(tmp_path, *flags) == unbroken[1]
    # two text batches, one for each other task, one more where two samples are asked for; nothing twice
    assert len(calls) == 5 + 2 + 2
    for name in ("report.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (unbroken[0] / name).read_bytes()


def test_what_is_measured_on_built_in_stickers(unbroken):
    output_dir, report = unbroken
    page = (output_dir / "report.md").read_text()
    assert "4 DDIM steps, eta 1, text guidance 3, image guidance 1.5" in page
    assert "2 DDIM steps, eta 0, text guidance 1, image guidance 1" in page
    assert report["quality"]["prediction"]["unknown"].keys() == {"model", *metrics.BASELINES}
    assert report["text"]["held out"]["colour"]["count"] == report["text"]["trained"]["colour"]["count"] == 3
    assert set(report["loss"]["Eq. 1"]["cells"]) == {"interpolation", "prediction", "generation"}
    rivals = ["network", "mean of 2 samples", "Gaussian", "Gaussian's mean", "nearest given frame"]
    assert list(report["rivals"]["interpolation"]) == [*rivals, "cross-fade", "real clips"]
    assert list(report["rivals"]["text"]) == ["network", "Gaussian", "real clips"]
    for task in report["rivals"]:
        real = report["rivals"][task]["real clips"]
        assert all(real[measure]["mean"] == pytest.approx(0, abs=1e-9) for measure in EXCESS)
    assert report["given frames"]["loss"]["Eq. 1"].keys() == CONDITIONED.keys()
    for entry in report["given frames"]["loss"]["balanced"].values():
        ratio = entry["frames"]["mean"] / entry["nothing"]["mean"]
        assert entry["alone"]["mean"] == pytest.approx(ratio) and entry["both"] != entry["frames"]
    alone = report["given frames"]["Gaussian's loss"]["Eq. 1"]
    assert alone.keys() == CONDITIONED.keys()
    for task, entry in report["given frames"]["loss"]["Eq. 1"].items():
        assert all(entry[name] != alone[task][name] for name in entry)
    assert report["fvd"]["text"]["fvd"] > 0 and report["vqa"]["image"]["model"]["mean"] == 0.25


def test_every_cell_of_the_loss_has_the_same_timesteps(unbroken):
    """One in each quarter of 0..999."""
    cells = [dict(np.load(path)) for path in sorted((unbroken[0] / "items").glob("loss-*.npz"))]
    assert len(cells) == 24 + 8  # 8 of the Gaussian alone
    assert all(np.array_equal(arrays["timestep"], cells[0]["timestep"]) for arrays in cells)
    assert sorted(cells[0]["timestep"] * 4 // 1000) == list(range(4))


def test_samples_of_other_settings_are_refused(call, flags, unbroken, tmp_path):
    shutil.copy(unbroken[0] / "settings.json", tmp_path)
    with pytest.raises(UserError, match="another loss_draws"):
        call(tmp_path, *flags, "--loss_draws", 7)


def test_a_model_without_condition_masks_is_asked_for_text_and_image(call, tmp_path):
    report = call(tmp_path, "--ddu", "off")
    assert list(report["about"]["sampler"]) == list(report["rivals"]) == ["text", "image"]
    assert set(report["quality"]) == set(report["given frames"]["loss"]["Eq. 1"]) == {"image"}
    assert "cells" not in report["loss"]["Eq. 1"]


# ------------------------------------------------------------------------------------------------------------
# Refusals


EVALUATE, ABLATE = [evaluate, "--checkpoint"], [ablate, "--table", "3", "--output_dir", "x"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([*EVALUATE, "no/such/folder"], "--checkpoint no/such/folder is not a folder"),
        ([*EVALUATE, ".", "--i3d", "nowhere.pt"], "--i3d nowhere.pt is not a file"),
        ([*EVALUATE, ".", "--clip_score", "nowhere"], "--clip_score nowhere"),
        ([*EVALUATE, ".", "--vqa_command", "vqa"], "no {video} in it"),
        ([*EVALUATE, ".", "--num_prompts", "1"], "--num_prompts: 1 must be at least 2"),
        ([*EVALUATE, ".", "--guidance_scale", "nan"], "--guidance_scale: nan must lie in"),
        ([*EVALUATE, ".", "--image_guidance_scale", "-1001"], "--image_guidance_scale: -1001"),
        ([*EVALUATE, ".", "--eta", "nan"], "--eta: nan must lie in 0..1"),
        ([*EVALUATE, ".", "--fvd"], "unrecognized arguments: --fvd"),
        ([*EVALUATE, "."], "holds no model_index.json"),
        ([*ABLATE, "--jobs", "0"], "--jobs: 0 must be at least 1"),
        ([*ABLATE, "--data", "nowhere"], "--data nowhere is not a folder"),
        ([*ABLATE, "--rows", "best"], "invalid choice: 'best'"),
        ([bench, "speed"], "speed: WHAT must be one of unet, train"),
    ],
)
def test_bad_input_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    program, *flags = words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program.__name__, *flags])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(program.__name__) and message.count("\n") == 1 and said in message
    assert not list(tmp_path.iterdir())


def test_a_folder_with_broken_words_is_one_without(tmp_path):
    subject, colour, motion = stickers.COMBINATIONS[0]
    entry = dict(file_name="a.gif", subject=subject, colour=colour, motion=motion)
    (tmp_path / "stickers.json").write_text("{}")
    for line in ({}, None, [], dict(entry, file_name=["a.gif"]), dict(entry, motion="standing")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
        assert items.word_table(tmp_path, ["a.gif"]) == {}
    (tmp_path / "metadata.jsonl").write_text("{\n" + json.dumps(entry))
    assert items.word_table(tmp_path, ["a.gif"]) == {"a.gif": (colour, subject, motion)}
    assert items.word_table(tmp_path, ["a.gif", "b.gif"]) == {}  # b.gif has no entry


@pytest.mark.parametrize("state", ["{}", "[]", "{", '{"schedule": 1}'])
def test_a_state_without_a_word_on_dual_masks(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match="give --ddu"):
        evaluate.has_dual_masks(Namespace(ddu=None, checkpoint=tmp_path))
    assert evaluate.has_dual_masks(Namespace(ddu="on", checkpoint=tmp_path))


@pytest.mark.parametrize("name", ["evaluate", "ablate", "bench"])
def test_help_of_a_program_that_is_run_as_a_module(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"lab.{name}")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"lab.{name}", run_name="__main__", alter_sys=True)
    assert not ended.value.code and f"usage: python -m lab.{name} " in capsys.readouterr().out
