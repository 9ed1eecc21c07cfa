"""What several test files build: the toy network, what it is called with, a prior fitted to noise, a codec,
clips."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masks import LENGTHS, NUM_FRAMES
from model import DFGN, SIZES
from support import media, stickers

WIDTH = 256  # of the built-in text encoders
# Changes to toy_unet that make it smaller still, with text encoders of two widths.
SMALLER = dict(clip_dim=10, t5_dim=12, sti_heads=2, sti_head_width=8)


def toy_unet(alpha=1.0, **changes):
    """The network of `--preset toy` with random weights, its zero layers included, and open gates: at
    alpha = 0 nothing about the temporal layers would be tested. Seeded; `changes` are fields of its
    config."""
    torch.manual_seed(0)
    config = dict(SIZES["toy"], latent_channels=4, clip_dim=WIDTH, t5_dim=WIDTH)
    unet = DFGN(**(config | changes))
    for name, weight in unet.named_parameters():
        if name.endswith(".alpha"):
            weight.data.fill_(alpha)
        elif not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()


def trainable(network):
    """{name: weight} of what learns."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def given_frames(*slots, count=NUM_FRAMES, batch=2):
    """A condition mask, bool (B, count), with these frames given."""
    mask = torch.zeros(batch, count, dtype=torch.bool)
    mask[:, list(slots)] = True
    return mask


def first_frames(k, batch=2):
    """The loss mask of clips of k frames: bool (B, 8)."""
    return (torch.arange(NUM_FRAMES) < k).expand(batch, -1)


def toy_inputs(unet, slots=NUM_FRAMES, size=(6, 6), batch=2, seed=0):
    """What a call of `unet` takes but `valid`: (noisy, latents, given, timestep, text). The first and the
    third frame are given."""
    g, config = torch.Generator().manual_seed(seed), unet.config
    noisy = torch.randn(batch, slots, config.latent_channels, *size, generator=g)
    channels = config.condition_channels or config.latent_channels
    latents = torch.randn(batch, slots, channels, *size, generator=g)
    text = (
        torch.randn(batch, 5, config.clip_dim, generator=g),
        torch.ones(batch, 5, dtype=torch.bool),
        torch.randn(batch, 7, config.t5_dim, generator=g),
        torch.ones(batch, 7, dtype=torch.bool),
    )
    given = given_frames(0, 2, count=slots, batch=batch)
    return noisy, latents, given, torch.tensor([3, 700])[:batch], text


def as_text(states):
    """Features (B, width) as text of one token each: (states, mask), the half that a prior reads."""
    return states[:, None], torch.ones(len(states), 1, dtype=torch.bool)


def fit_to_noise(prior, clips, scale=1.0):
    """Fits a GaussianPrior to random latents and captions: `clips` of 3 and of 4 frames, half as many longer
    ones."""
    config = prior.config
    shape, width = (config.latent_channels, config.side, config.side), config.text_dim
    latents = {k: scale * torch.randn(clips if k < 5 else clips // 2, k, *shape) for k in LENGTHS}
    texts = {k: as_text(torch.randn(len(x), width)) for k, x in latents.items()}
    prior.fit(latents, texts, as_text(torch.randn(1, width)))
    return prior


class FakeCodec:
    """What a VAE is called with, at no cost: the mean colour of each square of factor x factor pixels."""

    source = "somewhere"

    def __init__(self, factor=8, latent_channels=6, identity="fake"):
        self.factor, self.latent_channels, self.identity = factor, latent_channels, identity

    def encode(self, frames):
        colours = F.avg_pool2d(frames.permute(0, 3, 1, 2) / 127.5 - 1, self.factor)  # (N, 3, R/f, R/f)
        return colours.repeat(1, self.latent_channels, 1, 1)[:, : self.latent_channels]

    def decode(self, latents):
        colours = F.interpolate(latents[:, :3], scale_factor=self.factor)
        return ((colours + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def assert_refused(main, arguments, words, monkeypatch, capsys):
    """Calls a program's main with these arguments: it ends with status 2 and one sentence on stderr, which
    has `words` in it."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert words in message.splitlines()[-1]
    return message


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
