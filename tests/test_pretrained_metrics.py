"""Metrics that need weights: stand-ins for I3D and CLIP, programs for video quality."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from lab import pretrained_metrics
from support.pretrained import EncoderError
from tests.tiny_parts import LETTERS
from tests.toys import grey

RNG = np.random.default_rng(0)


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
        pretrained_metrics.fvd(str(tmp_path / "broken.pt"), list(grey(1, 2)[None]), list(grey(1, 2)[None]))


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
    halves = [clips[0][:4], clips[0][4:]]
    halves = [pretrained_metrics.clip_similarity(folder, ["a red cat"], [half]) for half in halves]
    assert scores[0] == pytest.approx(np.mean(halves), abs=1e-5)


def test_the_code_of_a_clip_is_not_run(tmp_path, monkeypatch):
    folder = Path(make_clip(tmp_path / "clip"))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run by it')!r})\n")
    code = dict(auto_map=dict(AutoTokenizer=["evil.Tokenizer", None]), tokenizer_class="Tokenizer")
    for name, entries in (("config.json", dict(model_type="evil")), ("tokenizer_config.json", code)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))
    with pytest.raises(EncoderError, match="--clip_score") as error:
        pretrained_metrics.clip_similarity(folder, ["a red cat"], [grey(0, 100)])
    assert "\n" not in str(error.value) and not (tmp_path / "run by it").exists()


def test_a_clip_that_describes_more_than_it_holds(tmp_path):
    folder = Path(make_clip(tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= dict(hidden_size=65536, intermediate_size=65536)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="more weights than"):
        pretrained_metrics.clip_similarity(folder, ["a red cat"], [grey(0, 100)])


def test_the_conditioners_own_clip_is_refused(tmp_path):
    args = Namespace(clip_score=str(tmp_path), i3d=None, vqa_command=None)
    with pytest.raises(pretrained_metrics.MetricError, match="own CLIP"):
        pretrained_metrics.check_clip(args, dict(clip=str(tmp_path)))
    pretrained_metrics.check_clip(args, dict(clip=None))


def test_quality_by_a_program_and_one_sentence_if_it_fails():
    clips = list(grey(0, 100, 200)[None])
    scoring = f"{sys.executable} -c 'print(\"score: -1.5e-1\")' {{video}}"
    assert pretrained_metrics.video_quality(scoring, clips) == pytest.approx([-0.15])
    failing = f"{sys.executable} -c 'raise SystemExit(3)' {{video}}"
    with pytest.raises(pretrained_metrics.MetricError, match="status 3"):
        pretrained_metrics.video_quality(failing, clips)
    with pytest.raises(pretrained_metrics.MetricError, match="printed no number"):
        pretrained_metrics.video_quality(f"{sys.executable} -c pass {{video}}", clips)
    with pytest.raises(pretrained_metrics.MetricError, match="no program"):
        pretrained_metrics.video_quality("no-such-program {video}", clips)
