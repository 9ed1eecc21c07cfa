"""
Metrics that need weights you provide: nothing is downloaded, each is left out without its flag.

    --i3d FILE.pt          FVD. The usual I3D TorchScript (Kinetics-400, called with rescale, resize and
                           return_features): float (B, 3, T, H, W) of 0..255 -> (B, 400). Its T must be above
                           8, so every frame is shown twice: never compare with the paper's number, nor with
                           anybody's.
    --clip_score DIR       CLIP similarity: cosine of caption and frame, the mean over frames. The model's own
                           CLIP is refused: what a model was conditioned with is no independent measure.
    --vqa_command COMMAND  video quality by an external program (FAST-VQA, DOVER), called once for every clip,
                           an MP4 in the place of {video}; the last number that it prints is the score.

A package would do for the first (`cd-fvd` brings its own networks and downloads them); these are a few lines
instead.
"""

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPModel

from lab.metrics import frechet_distance, mean_se
from support import machine, media
from support.common import UserError
from support.pretrained import load_text

I3D_FRAMES = 16  # 8 frames, each twice
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class MetricError(UserError):
    """A metric that cannot be had, in one sentence."""


def check_files(args):
    """Are the files there? Raises MetricError."""
    if args.i3d and not Path(args.i3d).is_file():
        raise MetricError(f"--i3d {args.i3d} is not a file: give the I3D TorchScript, i3d_torchscript.pt.")
    if args.clip_score and not (Path(args.clip_score) / "config.json").is_file():
        wanted = "give a folder of a CLIPModel with its tokenizer, as save_pretrained writes it"
        raise MetricError(f"--clip_score {args.clip_score} holds no config.json: {wanted}.")
    if args.vqa_command and "{video}" not in args.vqa_command:
        raise MetricError("--vqa_command has no {video} in it: that is where the path of the MP4 goes.")


def check_clip(args, settings):
    """Raises MetricError if the CLIP to measure with is the one of the model (`settings`: its
    model_index.json)."""
    own = settings.get("clip")
    if args.clip_score and own and Path(args.clip_score).resolve() == Path(own).resolve():
        raise MetricError(f"--clip_score {args.clip_score} is the model's own CLIP: give another one.")


# ------------------------------------------------------------------------------------------------------------
# FVD


def i3d_features(i3d, clips, device="cpu", batch=8):
    """clips: list of uint8 (F, R, R, 3), F <= 16 -> float64 (N, 400), every frame repeated until there are
    16."""
    vectors = []
    for i in tqdm(range(0, len(clips), batch), "I3D", unit="batch"):
        x = torch.from_numpy(np.stack(clips[i : i + batch])).to(device)  # (B, F, R, R, 3)
        x = x.repeat_interleave(-(-I3D_FRAMES // x.shape[1]), dim=1)[:, :I3D_FRAMES]
        with torch.no_grad():
            y = i3d(x.permute(0, 4, 1, 2, 3).float(), rescale=True, resize=True, return_features=True)
        if y.ndim != 2 or len(y) != len(x):
            shape = tuple(y.shape)
            raise MetricError(f"--i3d gives features {shape} for {len(x)} clips, not (N, 400): give the I3D.")
        vectors.append(y.double().cpu().numpy())
    return np.concatenate(vectors)


def fvd(path, made, real, device="cpu"):
    """Frechet video distance of two lists of clips."""
    try:
        i3d = torch.jit.load(path, map_location=device).eval()
        return frechet_distance(i3d_features(i3d, made, device), i3d_features(i3d, real, device))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise MetricError(f"--i3d {path} cannot be used as the I3D TorchScript ({reason}).") from error


# ------------------------------------------------------------------------------------------------------------
# CLIP


def clip_similarity(folder, captions, clips, device="cpu"):
    """The mean cosine of a caption and the frames of its clip, for each pair: float (N,). Raises
    EncoderError."""
    clip, tokenizer = load_text("--clip_score", folder, (), CLIPModel, ("clip",))
    clip = clip.to(device).eval()
    side = clip.config.vision_config.image_size
    longest = clip.config.text_config.max_position_embeddings
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    scores = []
    for caption, frames in tqdm(list(zip(captions, clips)), "CLIP", unit="clip"):
        tokens = tokenizer([caption], truncation=True, max_length=longest, return_tensors="pt").to(device)
        x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255  # (F, 3, R, R)
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        words = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        with torch.no_grad():
            output = clip(**words, pixel_values=(x - mean) / std)
        scores.append(F.cosine_similarity(output.text_embeds, output.image_embeds).mean().item())
    return np.array(scores)


# ------------------------------------------------------------------------------------------------------------
# VQA


def video_quality(command, clips, fps=8):
    """Runs `command` on every clip; the last number on its standard output is the score: float (N,)."""
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for i, frames in enumerate(tqdm(clips, "video quality", unit="clip")):
            path = Path(folder) / f"{i:04d}.mp4"
            media.write_clip(path, frames, fps)
            words = [word.replace("{video}", str(path)) for word in shlex.split(command)]
            try:
                done = subprocess.run(words, capture_output=True, text=True, check=True)
            except FileNotFoundError as error:
                raise MetricError(f"--vqa_command: there is no program {words[0]}.") from error
            except subprocess.CalledProcessError as error:
                last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise MetricError(f"--vqa_command ended with status {error.returncode} ({last}).") from error
            numbers = re.findall(r"-?\d+(?:\.\d+)?(?:[eE]-?\d+)?", done.stdout)
            if not numbers:
                raise MetricError(f"--vqa_command printed no number, but {done.stdout.strip()[:100]!r}.")
            scores.append(float(numbers[-1]))
    return np.array(scores)


# ------------------------------------------------------------------------------------------------------------


def measure(args, clips):
    """What the flags ask for, of text and image samples: sections of the report. Frames that were given count
    here, as in the paper's I&T->V. clips: summary.Clips"""
    network = [clips.made["network"][i] for i in range(len(clips.items))]
    report, truth, device = {}, [clips.real[name] for name in clips.held_out], machine.device()
    for task in ("text", "image"):
        pairs = [(item, made) for item, made in zip(clips.items, network) if item.task == task]
        made, captions = [made for _, made in pairs], [item.prompt for item, _ in pairs]
        if args.i3d and len(made) > 1 and len(truth) > 1:
            distance = fvd(args.i3d, made, truth, device)
            entry = dict(fvd=distance, clips=len(made), real_clips=len(truth))
            report.setdefault("fvd", {})[task] = entry
        if args.clip_score and made:
            real = [(item.prompt, clips.real[item.clip]) for item, _ in pairs if item.clip]
            report.setdefault("clip_similarity", {})[task] = dict(
                model=mean_se(clip_similarity(args.clip_score, captions, made, device)),
                real=mean_se(clip_similarity(args.clip_score, *zip(*real), device)) if real else None,
            )
        if args.vqa_command and made:
            report.setdefault("vqa", {})[task] = dict(
                model=mean_se(video_quality(args.vqa_command, made)),
                real=mean_se(video_quality(args.vqa_command, truth)) if truth else None,
            )
    return report
