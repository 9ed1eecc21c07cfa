"""What several test files build: the toy network, clips."""

import numpy as np
import torch

from model import DFGN, SIZES
from support import media, stickers

WIDTH = 256  # of the built-in text encoders


def toy_unet(**changes):
    """The network of `--preset toy` with random weights, its zero layers and gates included: alpha = 1, since
    at alpha = 0 nothing about the temporal layers would be tested. Seeded; `changes` are fields of its
    config."""
    torch.manual_seed(0)
    config = dict(SIZES["toy"], latent_channels=4, clip_dim=WIDTH, t5_dim=WIDTH)
    unet = DFGN(**(config | changes))
    for name, weight in unet.named_parameters():
        if name.endswith(".alpha"):
            weight.data.fill_(1.0)
        elif not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()


def grey(*levels, side=16):
    """A clip whose frames are grey, of the given levels: uint8 (F, side, side, 3)"""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def drawn_clips(combinations, seed, side):
    """A new built-in sticker of eight frames for each (subject, colour, motion).
    Returns (clips uint8 (N, 8, side, side, 3), [(colour, subject, motion)])."""
    clips = []
    for i, words in enumerate(combinations):
        pictures, _ = stickers.draw_clip(*words, np.random.default_rng((seed, i)), num_frames=8)
        clips.append([media.on_white(picture, side) for picture in pictures])
    return np.array(clips), [(colour, subject, motion) for subject, colour, motion in combinations]
