"""Metrics against known values, the judge on wrong stickers, resuming, stand-ins for I3D and CLIP."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

import sample
from lab import ablate, evaluate, heldout, judge, metrics, pretrained_metrics
from model import DFGN, make_scheduler
from support import stickers
from support.checkpoint import write_index, write_unet
from support.encoders import Encoders, PatchPCA
from support.pretrained import EncoderError
from tests.tiny_parts import LETTERS

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)


def flat(*levels, side=16):
    """A clip whose frames are grey, of the given levels."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


# ----------------------------------------------------------------------------------- frames against the truth


def test_psnr_by_hand():
    a, b = flat(100, 100), flat(110, 100)
    assert metrics.psnr(a, b) == pytest.approx([10 * np.log10(255**2 / 100), 100])  # error 10; equal
    assert metrics.psnr(flat(0), flat(255)) == pytest.approx([0])


def test_ssim_known_values():
    noise = RNG.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    assert metrics.ssim(noise, noise) == pytest.approx([1, 1])
    c1 = (0.01 * 255) ** 2  # of constant frames only the term of the means is left
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert metrics.ssim(flat(100), flat(150)) == pytest.approx([expected])
    assert abs(metrics.ssim(noise[:1], noise[1:])[0]) < 0.2  # unrelated
    assert metrics.ssim(noise[:1], 255 - noise[:1])[0] < -0.5  # inverted


def test_ssim_of_a_window_by_hand():
    """Of 11 x 11 pixels one window fits: weighted moments with the outer product of two Gaussians."""
    a, b = (RNG.integers(0, 256, (1, 11, 11, 3), dtype=np.uint8) for _ in range(2))
    w = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(w, w) / w.sum() ** 2
    expected = []
    for channel in range(3):
        x, y = a[0, ..., channel].astype(float), b[0, ..., channel].astype(float)
        mx, my = (w * x).sum(), (w * y).sum()
        vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        expected.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert metrics.ssim(a, b) == pytest.approx([np.mean(expected)])


def test_baselines_by_hand():
    clip = flat(0, 10, 20, 60, 40, 50)
    given = np.array([False, True, False, False, True, False])
    level = lambda frames: frames[:, 0, 0, 0].tolist()
    assert level(metrics.repeat_nearest(clip, given)) == [10, 10, 10, 40, 40, 40]
    assert level(metrics.cross_fade(clip, given)) == [10, 10, 20, 30, 40, 40]  # ends repeat
    assert level(metrics.copy_first(clip, given)) == [10] * 6
    tie = np.array([True, False, True, False, False, False])
    assert level(metrics.repeat_nearest(clip, tie))[:3] == [0, 0, 20]  # of two equally near the earlier


def test_baselines_never_see_unknown_frames():
    clip = RNG.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    given = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    blind = clip * given[:, None, None, None]
    for baseline in metrics.BASELINES.values():
        assert np.array_equal(baseline(clip, given), baseline(blind, given))


# ------------------------------------------------------------------------------------------------- movement


def test_motion_by_hand():
    clip = flat(0, 10, 40)
    assert metrics.motion(clip) == 20 and metrics.motion(clip, block=8) == 20
    assert metrics.distinct_frames(flat(0, 0, 10, 0)) == 2 and metrics.distinct_frames(clip) == 3
    board = (np.indices((16, 16)).sum(0) % 2 * 100).astype(np.uint8)[..., None].repeat(3, -1)
    grain = np.stack([board, 100 - board])
    assert metrics.motion(grain) == 100 and metrics.motion(grain, block=8) == 0  # flicker is no motion


# ------------------------------------------------------------------------------------------ Frechet distance


def exactly(mean, covariance, count=50):
    """Vectors whose sample mean and covariance are the given ones."""
    x = RNG.standard_normal((count, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_in_closed_form():
    a = exactly([0, 0], np.diag([4.0, 1.0]))
    b = exactly([3, 4], np.diag([1.0, 9.0]))
    # diagonal covariances: |mean|^2 + sum (sigma_a - sigma_b)^2 = 25 + (2 - 1)^2 + (1 - 3)^2
    assert metrics.frechet_distance(a, b) == pytest.approx(30)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(30)  # symmetric
    one = exactly([1.0], np.array([[4.0]])), exactly([3.0], np.array([[25.0]]))
    assert metrics.frechet_distance(*one) == pytest.approx(4 + 9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    A, B = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    # the trace of the root of a 2 x 2 matrix M is sqrt(trace M + 2 sqrt(det M))
    M = A @ B
    expected = np.trace(A + B) - 2 * np.sqrt(np.trace(M) + 2 * np.sqrt(np.linalg.det(M)))
    assert metrics.frechet_distance(exactly([0, 0], A), exactly([0, 0], B)) == pytest.approx(expected)


def test_our_features_tell_frozen_and_blurred_clips_from_real_ones():
    words = judge.combinations(False)[::5][:60]  # of many subjects and motions
    clips, _ = judge.draw_clips([words[i] for i in np.random.default_rng(0).permutation(60)], 5, 32)
    features = lambda x: [metrics.features(clip) for clip in x]
    real, rest = features(clips[:30]), clips[30:]
    same = metrics.standardized_frechet(features(rest), real)
    frozen = metrics.standardized_frechet(features(rest[:, :1].repeat(8, 1)), real)
    blocks = rest.reshape(30, 8, 8, 4, 8, 4, 3).mean(axis=(3, 5)).astype(np.uint8)
    blurred = metrics.standardized_frechet(features(blocks.repeat(4, 2).repeat(4, 3)), real)
    assert same < 0.5 * frozen and same < 0.5 * blurred
    keep = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    assert len(metrics.features(clips[0], keep)) == 5  # the pairs without slot 2


# -------------------------------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def small_judge():
    """A judge of few words, trained in seconds, and clips it has not seen: (judge, clips, words)."""
    words = [
        (subject, colour, motion)
        for subject in ("heart", "fish", "moon")
        for colour in stickers.COLOURS
        for motion in ("bouncing", "spinning", "growing")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SIDE", 32)
        patch.setattr(judge, "BATCH", 16)
        patch.setattr(judge, "SPOILED", 0.4)
        trained = judge.train_judge(*judge.draw_clips(words * 6, 7, 32), epochs=24, width=32)
        yield trained, *judge.draw_clips(words, 8, 32)


def share_right(trained, clips, words):
    return judge.accuracy(trained.read(clips), words)


def test_judge_is_right_on_real_stickers(small_judge):
    right = share_right(*small_judge)
    assert right["colour"] == 1 and right["subject"] > 0.9 and right["motion"] > 0.8


def test_judge_fails_recoloured_stickers(small_judge):
    trained, clips, words = small_judge
    right = share_right(trained, np.roll(clips, 1, axis=-1), words)  # red as green, green as blue, ...
    assert right["colour"] == 0 and right["subject"] > 0.9 and right["motion"] > 0.8  # the rest is as it was


def test_judge_fails_frozen_stickers(small_judge):
    trained, clips, words = small_judge
    frozen = clips[:, 4:5].repeat(8, axis=1)
    assert share_right(trained, frozen, words)["motion"] < 0.1
    assert np.mean([motion == judge.NONE for *_, motion in trained.read(frozen)]) > 0.9


def test_judge_fails_shuffled_stickers(small_judge):
    trained, clips, words = small_judge
    shuffled = np.stack([clip[np.random.default_rng(i).permutation(8)] for i, clip in enumerate(clips)])
    right, real = share_right(trained, shuffled, words), share_right(trained, clips, words)
    assert right["motion"] < 0.5 * real["motion"] and right["subject"] > 0.9


def test_judge_fails_another_subject(small_judge):
    trained, clips, words = small_judge
    others = {"heart": "fish", "fish": "moon", "moon": "heart"}
    wrong = [(colour, others[subject], motion) for colour, subject, motion in words]
    right = share_right(trained, clips, wrong)
    assert right["subject"] < 0.1 and right["colour"] == 1


def test_judge_sees_no_colour_where_there_is_none():
    assert judge.read_colour(flat(255, 128, 0)) == judge.NONE


def test_judge_is_trained_on_training_combinations_only():
    assert not any(stickers.is_held_out(*words) for words in judge.combinations(False))
    assert all(stickers.is_held_out(*words) for words in judge.combinations(True))
    assert len(judge.combinations(False)) + len(judge.combinations(True)) == len(stickers.COMBINATIONS)


# ----------------------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random network of 16 x 16 pixels and a folder of stickers, a third of them held out: (checkpoint,
    stickers, cache)."""
    root = tmp_path_factory.mktemp("evaluate")
    folder = stickers.draw_stickers(root / "stickers", count=36, seed=3)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["split"] = "validation" if i % 3 == 0 else "train"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    frames, _ = judge.draw_clips(judge.combinations(False)[:20], 9, 16)
    codec = PatchPCA(patch_size=4, latent_channels=6)
    codec.fit(torch.from_numpy(frames).flatten(0, 1))
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
    write_unet(root / "run" / "unet", unet, unet.state_dict())
    settings = dict(resolution=16, mixed_precision="no", guidance_scale=3.0, image_guidance_scale=1.5)
    write_index(root / "run", Encoders(codec), make_scheduler(), settings)
    return root / "run", folder, root / "cache"


@pytest.fixture
def call(run, small_judge, monkeypatch):
    """evaluate.py in this process, at a toy scale, with the small judge; returns its report."""
    checkpoint, folder, cache = run
    monkeypatch.setattr(evaluate, "get_judge", lambda *_: small_judge[0])
    full = dict(zip(judge.ATTRIBUTES, (1.0, 1.0, 1.0)))
    monkeypatch.setattr(evaluate, "examine", lambda *_: {"clips": 0, "raw": full, "round trip": full})

    def call(output_dir, *flags):
        argv = ["evaluate.py", "--checkpoint", checkpoint, "--data", folder, "--cache_dir", cache]
        argv += ["--output_dir", output_dir, "--num_prompts", 6, "--num_clips", 3, "--loss_draws", 6]
        argv += ["--num_inference_steps", 2, "--batch_size", 4, "--num_workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        return evaluate.evaluate(evaluate.parse_args())

    return call


def test_interrupted_evaluation_ends_as_the_unbroken_one(call, tmp_path, monkeypatch):
    flags = ["--i3d", stand_in_i3d(tmp_path), "--vqa_command", "python vqa.py {video}"]
    monkeypatch.setattr(pretrained_metrics.subprocess, "run", run_here)
    report = call(tmp_path / "unbroken", *flags)
    real, calls = sample.generate, []

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", generate)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "broken", *flags)
        assert not (tmp_path / "broken" / "report.json").exists()
    assert call(tmp_path / "broken", *flags) == report
    assert len(calls) == 5 + 2  # two text batches and one for each other task; nothing was sampled twice
    for name in ("report.json", "report.html"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    with pytest.raises(evaluate.UserError, match="another loss_draws"):
        call(tmp_path / "broken", "--loss_draws", 7)

    # what the report says
    page = (tmp_path / "unbroken" / "report.html").read_text()
    assert "<script" not in page and "http" not in page and page.count("data:image/png;base64,") >= 6
    assert "2 DDIM steps, eta 1, text guidance 3, image guidance 1.5" in page
    assert "2 DDIM steps, eta 0, text guidance 1, image guidance 1" in page
    assert report["quality"]["prediction"]["unknown"].keys() == {"model", *metrics.BASELINES}
    assert report["text"]["held out"]["colour"]["count"] == report["text"]["trained"]["colour"]["count"] == 3
    assert set(report["loss"]["Eq. 1"]["cells"]) == {"interpolation", "prediction", "generation"}
    assert report["fvd"]["text"]["fvd"] > 0 and report["vqa"]["image"]["model"]["mean"] == 0.25

    # every cell of the loss has the same timesteps, one in each sixth of 0..999
    cells = [dict(np.load(path)) for path in sorted((tmp_path / "broken" / "items").glob("loss-*.npz"))]
    assert len(cells) == 19
    assert all(np.array_equal(arrays["timestep"], cells[0]["timestep"]) for arrays in cells)
    assert sorted(cells[0]["timestep"] * 6 // 1000) == list(range(6))


def run_here(words, **_):
    """In the place of a program for each clip, which would take a second to start."""
    assert words[2].endswith(".mp4") and Path(words[2]).stat().st_size > 0
    return Namespace(stdout="score of True 0.25")


def test_a_model_without_dual_masks_is_asked_for_text_alone(call, tmp_path):
    report = call(tmp_path / "text", "--ddu", "off")
    assert list(report["about"]["sampler"]) == ["text"] and report["quality"] == {}
    assert "cells" not in report["loss"]["Eq. 1"]


def test_order_of_difficulty_is_counted_draw_by_draw():
    timestep = np.array([100, 300, 500, 700])
    level = lambda task, k: {"interpolation": 1, "prediction": 2, "generation": 3}[task] + 0.1 * k
    cells = {("text", 8): 1.0}
    cells |= {(t, k): level(t, k) for t in heldout.TASKS for k in heldout.LENGTHS}
    cells["prediction", 5] = 0.5  # one that is out of order
    arrays = {
        cell: dict(loss=v + timestep / 100, unknown=v + timestep / 100, timestep=timestep)
        for cell, v in cells.items()
    }
    entry = heldout.summarize_loss(arrays, 1.0)["Eq. 1"]
    wrong = [(c["easier"], c["harder"]) for c in entry["order of tasks"] if not c["holds"]]
    assert wrong == [(["interpolation", 5], ["prediction", 5])]  # timesteps differ by far more, and drop out
    wrong = [(c["easier"], c["harder"]) for c in entry["order of lengths"] if c["refuted"]]
    assert wrong == [(["prediction", 4], ["prediction", 5])]


# ------------------------------------------------------------------------------------- pre-trained metrics


class StandInI3D(torch.nn.Module):
    """The call and the shapes of the usual I3D TorchScript."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        assert x.dim() == 5 and x.shape[1] == 3 and x.shape[2] == 16  # as I3D, which fails on short clips
        v = torch.nn.functional.adaptive_avg_pool3d(x / 127.5 - 1, [4, 2, 2]).flatten(1)  # (B, 48)
        return v.repeat(1, 9)[:, :400]


def stand_in_i3d(folder):
    path = folder / "i3d_torchscript.pt"
    torch.jit.script(StandInI3D()).save(str(path))
    return path


def test_fvd_with_a_stand_in(tmp_path):
    i3d = str(stand_in_i3d(tmp_path))
    clips = list(RNG.integers(0, 256, (6, 8, 16, 16, 3), dtype=np.uint8))
    x = pretrained_metrics.i3d_features(torch.jit.load(i3d), clips, batch=4)
    assert x.shape == (6, 400)
    assert pretrained_metrics.fvd(i3d, clips, clips) == pytest.approx(0, abs=1e-6)
    brighter = [(clip // 2 + 120).astype(np.uint8) for clip in clips]
    assert pretrained_metrics.fvd(i3d, brighter, clips) > 1
    # every frame twice: the first quarter of the time is that of the first two frames
    expected = torch.from_numpy(clips[0][:2]).float().mean() / 127.5 - 1
    first = x[0, [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35]]
    assert first.mean() == pytest.approx(expected.item(), abs=1e-5)


def test_fvd_refuses_another_network(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a TorchScript")
    with pytest.raises(pretrained_metrics.MetricError, match="cannot be used as the I3D"):
        pretrained_metrics.fvd(str(tmp_path / "broken.pt"), list(flat(1, 2)[None]), list(flat(1, 2)[None]))


def make_clip(folder):
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_clip_similarity_with_a_tiny_clip(tmp_path):
    folder = make_clip(tmp_path / "clip")
    clips = list(RNG.integers(0, 256, (2, 8, 24, 24, 3), dtype=np.uint8))
    scores = pretrained_metrics.clip_similarity(folder, ["a red cat", "a blue heart " * 60], clips)
    assert scores.shape == (2,) and (np.abs(scores) <= 1).all()
    # the mean over frames: that of both halves
    score = lambda frames: pretrained_metrics.clip_similarity(folder, ["a red cat"], [frames])[0]
    halves = [score(clips[0][:4]), score(clips[0][4:])]
    assert scores[0] == pytest.approx(np.mean(halves), abs=1e-5)


def test_the_code_of_a_clip_is_not_run(tmp_path, monkeypatch):
    folder = Path(make_clip(tmp_path / "clip"))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run by it')!r})\n")
    code = dict(auto_map=dict(AutoTokenizer=["evil.Tokenizer", None]), tokenizer_class="Tokenizer")
    for name, entries in (("config.json", dict(model_type="evil")), ("tokenizer_config.json", code)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))
    with pytest.raises(EncoderError, match="--clip_score") as error:
        pretrained_metrics.clip_similarity(folder, ["a red cat"], [flat(0, 100)])
    assert "\n" not in str(error.value) and not (tmp_path / "run by it").exists()


def test_a_clip_that_describes_more_than_it_holds(tmp_path):
    folder = Path(make_clip(tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= dict(hidden_size=65536, intermediate_size=65536)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="more weights than"):
        pretrained_metrics.clip_similarity(folder, ["a red cat"], [flat(0, 100)])


def test_the_conditioners_own_clip_is_refused(tmp_path):
    args = Namespace(clip_score=str(tmp_path), i3d=None, vqa_command=None)
    with pytest.raises(pretrained_metrics.MetricError, match="conditioned with"):
        pretrained_metrics.check_clip(args, dict(clip=str(tmp_path)))
    pretrained_metrics.check_clip(args, dict(clip=None))


def test_quality_by_a_program_and_one_sentence_if_it_fails():
    clips = list(flat(0, 100, 200)[None])
    scoring = f"{sys.executable} -c 'print(\"score: -1.5e-1\")' {{video}}"
    assert pretrained_metrics.video_quality(scoring, clips) == pytest.approx([-0.15])
    failing = f"{sys.executable} -c 'raise SystemExit(3)' {{video}}"
    with pytest.raises(pretrained_metrics.MetricError, match="status 3"):
        pretrained_metrics.video_quality(failing, clips)
    with pytest.raises(pretrained_metrics.MetricError, match="printed no number"):
        pretrained_metrics.video_quality(f"{sys.executable} -c pass {{video}}", clips)
    with pytest.raises(pretrained_metrics.MetricError, match="no program"):
        pretrained_metrics.video_quality("no-such-program {video}", clips)


# ---------------------------------------------------------------------------------------------- the ablation


def fake_report(value, dual=True):
    report = dict(about=dict(dual_masks=dual, loss_draws=6, sampler={}))
    report["loss"] = {"balanced": {"text only, k = 8": dict(mean=value)}}
    if dual:
        report["quality"] = {"prediction": {"unknown": {"model": {"psnr": dict(mean=10 * value)}}}}
    return report


def test_ablation_table_by_hand():
    reports = {
        ("none", 0): fake_report(1.0),
        ("none", 1): fake_report(3.0),
        ("dcl", 0): fake_report(2.0),
        ("dcl", 1): fake_report(5.0),
        ("sti", 0): fake_report(9.0, dual=False),
    }
    result = ablate.summarize(reports, {key: [] for key in reports})
    none = result["rows"]["none"]["metrics"]
    assert none["loss, text only"] == dict(mean=2.0, std=pytest.approx(2**0.5), count=2)
    assert result["rows"]["sti"]["metrics"]["prediction, dB"] is None
    pair = result["differences"]["dcl - none"]["loss, text only"]  # 1 and 2, seed by seed
    assert pair == dict(mean=1.5, se=pytest.approx(0.5), seeds=2)
    text = ablate.markdown(result, "about", ["end"])
    assert "| DFGN w/ DDU, no curriculum | 2 | 2.0000 ± 1.4142 |" in text and "20.00" in text
    assert "| DFGN | 1 | 9.0000 | - |" in text  # one seed, no given frames
    assert "+1.5000 ± 0.5000" in text


def test_finished_runs_of_an_ablation_are_not_repeated(tmp_path, monkeypatch):
    """train.py and evaluate.py are called once per run, with the flags of its row, and never again."""
    called = []

    def program(name, flags, log, quiet):
        called.append((name, flags))
        folder = Path(flags[flags.index("--output_dir" if name == "train.py" else "--checkpoint") + 1])
        if name == "train.py":
            folder.mkdir()
            (folder / "model_index.json").write_text("{}")
            (folder / "log.jsonl").write_text("")
        else:
            (folder / "evaluation").mkdir()
            dual = flags[flags.index("--ddu") + 1] == "on"
            (folder / "evaluation" / "report.json").write_text(json.dumps(fake_report(1.0, dual)))

    monkeypatch.setattr(ablate, "run", program)
    argv = ["ablate.py", "--output_dir", str(tmp_path / "a"), "--rows", "conv3d", "dcl", "--seeds", "0", "1"]
    for times in range(2):
        monkeypatch.setattr(sys, "argv", argv)
        ablate.ablate(ablate.parse_args())
        assert len(called) == 8
    assert called[0][1][-4:] != called[2][1][-4:] and "conv3d" in called[0][1]
    assert all("latest" in flags for name, flags in called if name == "train.py")
    assert "dcl" in called[2][1] and (tmp_path / "a" / "ablation.md").is_file()
    monkeypatch.setattr(sys, "argv", [*argv, "--max_train_steps", "7"])
    with pytest.raises(evaluate.UserError, match="--max_train_steps is 7"):
        ablate.ablate(ablate.parse_args())


# ------------------------------------------------------------------------------------------------- refusals


EVALUATE, ABLATE = [evaluate, "--checkpoint"], [ablate, "--output_dir", "x"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([*EVALUATE, "nowhere"], "is not a folder"),
        ([*EVALUATE, ".", "--i3d", "nowhere.pt"], "--i3d nowhere.pt is not a file"),
        ([*EVALUATE, ".", "--clip_score", "nowhere"], "--clip_score nowhere"),
        ([*EVALUATE, ".", "--vqa_command", "vqa"], "no {video} in it"),
        ([*EVALUATE, ".", "--num_prompts", "1"], "--num_prompts 1"),
        ([*EVALUATE, ".", "--guidance_scale", "nan"], "--guidance_scale nan"),
        ([*EVALUATE, ".", "--image_guidance_scale", "-1000"], "--image_guidance_scale -1000"),
        ([*EVALUATE, ".", "--eta", "nan"], "--eta nan"),
        ([*EVALUATE, ".", "--fvd"], "unrecognized arguments: --fvd"),
        ([*EVALUATE, "."], "holds no model_index.json"),
        ([*ABLATE, "--jobs", "0"], "--jobs 0"),
        ([*ABLATE, "--data", "nowhere"], "--data nowhere is not a folder"),
        ([*ABLATE, "--rows", "best"], "invalid choice: 'best'"),
    ],
)
def test_bad_input_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    program, *flags = words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_with_broken_words_is_one_without(tmp_path):
    subject, colour, motion = stickers.COMBINATIONS[0]
    entry = dict(file_name="a.gif", subject=subject, colour=colour, motion=motion)
    (tmp_path / "stickers.json").write_text("{}")
    for line in ({}, None, [], dict(entry, file_name=["a.gif"]), dict(entry, motion="standing")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
        assert evaluate.word_table(tmp_path, ["a.gif"]) == {}
    (tmp_path / "metadata.jsonl").write_text("{\n" + json.dumps(entry))
    assert evaluate.word_table(tmp_path, ["a.gif"]) == {"a.gif": (colour, subject, motion)}
    assert evaluate.word_table(tmp_path, ["a.gif", "b.gif"]) == {}  # b.gif has no entry


@pytest.mark.parametrize("state", ["{}", "[]", "{", '{"schedule": 1}'])
def test_a_state_without_a_word_on_dual_masks(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(evaluate.UserError, match="give --ddu"):
        evaluate.has_dual_masks(Namespace(ddu=None, checkpoint=tmp_path))
    assert evaluate.has_dual_masks(Namespace(ddu="on", checkpoint=tmp_path))


def test_a_missing_checkpoint_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "--checkpoint", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "nowhere is not a folder" in done.stderr
