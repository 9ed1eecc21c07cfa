"""A toy model of 16 x 16 pixels, and the folder of a finished run that holds it."""

import torch

from model import make_scheduler
from support.checkpoint import write_parts, write_unet
from support.encoders import Encoders, PatchPCA
from support.prior import GaussianPrior
from tests.toys import WIDTH, fit_to_noise, toy_unet

SETTINGS = dict(resolution=16, mixed_precision="no", guidance_scale=3.0, image_guidance_scale=1.5)
CHANNELS, SIDE = 6, 4  # of its latents


def toy_model(preconditioned=False):
    """Returns (unet, encoders): random weights, a fitted codec and, if preconditioned, a fitted prior."""
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (30, 4, 4, 3), dtype=torch.uint8, generator=g)
    codec = PatchPCA(patch_size=4, latent_channels=CHANNELS)
    codec.fit(frames.repeat_interleave(4, 1).repeat_interleave(4, 2))
    channels = 2 * CHANNELS if preconditioned else None
    unet = toy_unet(latent_channels=CHANNELS, condition_channels=channels, sti_heads=2, sti_head_width=8)
    prior = fit_to_noise(GaussianPrior(CHANNELS, SIDE, WIDTH), 9) if preconditioned else None
    return unet, Encoders(codec, prior=prior)


def write_model(folder, unet, encoders, settings=SETTINGS):
    """Writes the folder of a finished run. Returns it."""
    write_unet(folder / "unet", unet, unet.state_dict())
    write_parts(folder, encoders, make_scheduler(), settings)
    return folder
