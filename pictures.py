"""
What a run shows: progress.png (the log as curves) and validation sheets (real stickers above generated ones).
"""

import os

import matplotlib
import torch

import masks
import media
from checkpoint import read_log
from curriculum import TASKS
from sample import generate

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402


def plot_progress(log_path, picture_path):
    """Draws log.jsonl: loss, task probabilities, mean k, and the three terms of Eq. 4."""
    log = read_log(log_path)
    if not log:
        return
    steps = [entry["step"] for entry in log]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), dpi=100, sharex=True, layout="constrained")
    panels = {
        "loss": ["loss", "validation_loss"],
        "P(task)": [f"p_{task}" for task in TASKS],
        "mean k of the batch": ["mean_k"],
        "feedback, Eq. 4": ["p_term", "i_term", "d_term"],
    }
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            xy = [(entry["step"], entry[name]) for entry in log if name in entry]
            style = dict(marker="o", linestyle="--") if name == "validation_loss" else dict(linewidth=1)
            if xy:
                axis.plot(*zip(*xy), label=name[2:] if name[2:] in TASKS else name, **style)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    axes[0, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[1, 0].set_xlim(0, max(steps) + 1)
    writing = picture_path.with_name("progress.tmp.png")
    figure.savefig(writing)
    plt.close(figure)
    os.replace(writing, picture_path)


def model_card(unet, args, sources, summary, global_batch, step):
    """The README.md of a finished run: what the model is, what it was trained on, how to use it."""
    frozen = {name: source or "built in" for name, source in sources.items() if name in ("vae", "clip", "t5")}
    rows = dict(
        size=f"{args.preset}, {sum(p.numel() for p in unet.parameters()):,} parameters",
        data=f"{args.data or 'the built-in stickers'}: {summary}",
        frames=f"3 to 8 of {args.resolution} x {args.resolution} pixels",
        **frozen,
        steps=f"{step}, {global_batch} clips each",
        learning_rate=f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
        precision=args.mixed_precision,
        averaged_weights="yes" if args.use_ema else "no",
        curriculum=args.curriculum,
        temporal_layer=args.temporal,
        dual_masks="on" if args.ddu else "off",
        seed=args.seed,
        guidance=f"text {args.guidance_scale:g}, image {args.image_guidance_scale:g}",
    )
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items())
    prompt = "a red heart bouncing"
    return f"""---
library_name: diffusers
tags: [rdtf, animated-stickers, text-to-video]
---
# {args.output_dir.name}

An animated-sticker generator of the RDTF kind, trained with `train.py`.

```bash
python sample.py --checkpoint {args.output_dir} --prompt "{prompt}" --output sticker.gif
```

| setting | value |
|---|---|
{table}

![held-out stickers and what the model makes of them](validation-{step}.png)

![loss, task probabilities, mean k and feedback over the run](progress.png)
"""


def validation_sheet(unet, encoders, dataset, clips, prompts, args):
    """Samples the sheet: for held-out clips the real frames above interpolated, predicted and image-to-video
    ones (given frames framed), then a row per prompt. Returns (PIL.Image, {prompt: frames})."""
    settings = dict(seed=args.seed, mixed_precision=args.mixed_precision,
                    image_guidance_scale=args.image_guidance_scale,
                    guidance_scale=args.guidance_scale)  # fmt: skip
    rows, labels, marks = [], [], []
    tasks = (
        [("interpolation", "I3"), ("prediction", "P1"), ("image and text to video", "G1")] if args.ddu else []
    )
    for i, (task, name) in enumerate(tasks):
        row = next(row for row in masks.TABLE7 if row.name == name)
        candidates = [clip for clip in clips if clip.longest == masks.NUM_FRAMES] or clips
        if not candidates:
            continue
        clip = candidates[i % len(candidates)]
        k = clip.longest
        if row not in masks.admissible_rows(row.task, k):
            continue
        latents = torch.from_numpy(dataset.read(clip, k))  # (k, C, h, w)
        given = torch.from_numpy(masks.condition_mask(row, k)[:k])
        frames = generate(unet, encoders, [clip.caption], latents[None], given[None], **settings)[0]
        rows += [encoders.codec.decode(latents.to(unet.device)).cpu().numpy(), frames]
        labels += [f"real: {clip.caption or clip.name}", f"{task} ({name})"]
        marks += [[False] * k, given.tolist()]

    samples = {}
    if prompts:
        side = args.resolution // encoders.codec.factor
        nothing = torch.zeros(len(prompts), masks.NUM_FRAMES, encoders.codec.latent_channels, side, side)
        none_given = torch.zeros(len(prompts), masks.NUM_FRAMES, dtype=torch.bool)
        samples = dict(zip(prompts, generate(unet, encoders, prompts, nothing, none_given, **settings)))
        rows += samples.values()
        labels += samples.keys()
        marks += [[False] * masks.NUM_FRAMES] * len(samples)
    return media.sheet(rows, labels, marks=marks), samples
