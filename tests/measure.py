"""
Measures what the README says of a model trained on the built-in stickers:

    python tests/measure.py --checkpoint runs/tiny

    colour          of the twelve fixed prompts, how many have the asked colour as the most frequent
                    one of six
    given frames    PSNR of the given frame as the network redraws it, beside the codec's own round trip
    interpolation   PSNR of the frames between given ones, beside a linear cross-fade of their
                    decoded neighbours
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import masks  # noqa: E402
import sample  # noqa: E402
import stickers  # noqa: E402
from folder import Clip, load_clip, scan_folder  # noqa: E402


def dominant_colour(frames):
    """The colour of COLOURS that most of the colourful pixels of a clip are nearest to in hue.
    frames: uint8 (F, R, R, 3)."""
    hue, saturation, value = (
        np.asarray(Image.fromarray(frames.reshape(-1, 1, 3)).convert("HSV")).reshape(-1, 3).T.astype(int)
    )
    hue = hue[(saturation > 90) & (value > 90)]
    names = list(stickers.COLOURS)
    anchors = np.asarray(Image.fromarray(np.uint8([list(stickers.COLOURS.values())])).convert("HSV"))[
        0, :, 0
    ].astype(int)
    distance = np.abs((hue[:, None] - anchors + 128) % 256 - 128)  # (pixels, 6) on the circle of hues
    return names[np.bincount(distance.argmin(axis=1), minlength=6).argmax()] if len(hue) else "none"


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean()))


def cross_fade(frames, given):
    """Linear blend, by position, of the nearest given frames before and after each frame;
    beyond the ends the nearest."""
    places = np.arange(len(frames))
    flat = frames[given].reshape(given.sum(), -1).astype(float)
    blended = [np.interp(places, places[given], column) for column in flat.T]
    return np.stack(blended, axis=1).reshape(frames.shape)


def main():
    parser = argparse.ArgumentParser(description="Measure a model trained on the built-in stickers.")
    parser.add_argument("--checkpoint", required=True, help="its folder")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips to interpolate (default 32)")
    args = parser.parse_args()
    unet, encoders, settings = sample.load(args.checkpoint)
    codec, precision = encoders.codec, settings["mixed_precision"]

    prompts = list(stickers.PROMPTS)
    side = settings["resolution"] // codec.factor
    shape = (len(prompts), masks.NUM_FRAMES, codec.latent_channels, side, side)
    clips = sample.generate(unet, encoders, prompts, torch.zeros(shape),
                            torch.zeros(shape[:2], dtype=torch.bool), progress=True,
                            guidance_scale=settings["guidance_scale"],
                            mixed_precision=precision)  # fmt: skip
    right = 0
    for prompt, clip in zip(prompts, clips):
        colour = dominant_colour(clip)
        right += colour == prompt.split()[1]
        print(f"  {prompt}: {colour}")
    print(f"colour: {right} of {len(prompts)} right (guidance {settings['guidance_scale']}, eta 1, seed 0)")

    found, _ = scan_folder(stickers.draw_stickers(stickers.default_folder()))
    held_out = [sticker for sticker in found if sticker.split == "validation"]
    clips = [(sticker, load_clip(sticker, settings["resolution"])) for sticker in held_out]
    clips = [
        (sticker, clip)
        for sticker, clip in clips
        if isinstance(clip, Clip) and masks.NUM_FRAMES in clip.key_frames
    ]
    clips = clips[: args.clips]
    real = np.stack([clip.pixels[clip.key_frames[masks.NUM_FRAMES]] for _, clip in clips])  # (B, 8, R, R, 3)
    flat = torch.from_numpy(real).flatten(0, 1)
    latents = codec.encode(flat).unflatten(0, real.shape[:2])
    round_trip = codec.decode(latents.flatten(0, 1)).numpy().reshape(real.shape)
    captions = [sticker.caption for sticker, _ in clips]
    options = dict(
        eta=0.0, guidance_scale=1.0, image_guidance_scale=1.0, mixed_precision=precision, progress=True
    )
    for name in ("G1", "I1", "I2", "I3"):
        row = next(row for row in masks.TABLE7 if row.name == name)
        given = masks.condition_mask(row, masks.NUM_FRAMES)
        is_given = torch.from_numpy(given).expand(len(clips), -1)
        made = sample.generate(unet, encoders, captions, latents, is_given, **options)
        print(f"{name}: given frames {psnr(made[:, given], real[:, given]):.2f} dB, "
              f"round trip of the codec {psnr(round_trip[:, given], real[:, given]):.2f} dB")  # fmt: skip
        if row.task == "interpolation":
            faded = np.stack([cross_fade(clip, given) for clip in round_trip])
            ours, theirs = (
                [psnr(c[~given], r[~given]) for c, r in zip(clips_, real)] for clips_ in (made, faded)
            )
            print(f"{name}: unknown frames {np.mean(ours):.2f} dB, cross-fade {np.mean(theirs):.2f} dB, "
                  f"better in {np.mean(np.array(ours) > theirs):.0%} of {len(clips)} clips "
                  "(eta 0, scales 1)")  # fmt: skip


if __name__ == "__main__":
    main()
