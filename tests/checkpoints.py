"""A toy model of 16 x 16 pixels, and the folder of a finished run that holds it."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from model import make_scheduler
from support.checkpoint import write_parts, write_unet
from support.encoders import Encoders, PretrainedVAE
from support.prior import GaussianPrior
from tests.tiny_parts import make_vae
from tests.toys import WIDTH, fit_to_noise, toy_unet

SETTINGS = dict(resolution=16, mixed_precision="no")
SETTINGS |= dict(guidance_scale=3.0, image_guidance_scale=1.5, num_inference_steps=2)
CHANNELS, SIDE = 6, 4  # of its latents


@cache
def toy_vae(channels=CHANNELS):
    """A VAE of 4 pixels per latent with random weights, as if it had shipped."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_vae(folder, (8, 16, 16), channels)
        return PretrainedVAE(copy=Path(folder))


def toy_model(preconditioned=False):
    """Returns (unet, encoders): random weights and, if preconditioned, a fitted prior."""
    codec = toy_vae()
    channels = 2 * CHANNELS if preconditioned else None
    unet = toy_unet(latent_channels=CHANNELS, condition_channels=channels, sti_heads=2, sti_head_width=8)
    prior = fit_to_noise(GaussianPrior(CHANNELS, SIDE, WIDTH), 9) if preconditioned else None
    return unet, Encoders(codec=codec, prior=prior)


def write_model(folder, unet, encoders, settings=SETTINGS):
    """Writes the folder of a finished run. Returns it."""
    write_unet(folder / "unet", unet, unet.state_dict())
    write_parts(folder, unet, encoders, make_scheduler(), settings)
    return folder
