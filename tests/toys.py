"""What several test files build: the toy network, latents and texts for it."""

import torch

from model import DFGN, SIZES

WIDTH = 256  # of the built-in text encoders


def toy_unet(**changes):
    """The network of `--preset toy` with random weights, its zero layers and gates included: alpha = 1, since at
    alpha = 0 nothing about the temporal layers would be tested. Seeded; `changes` are fields of its config."""
    torch.manual_seed(0)
    config = dict(SIZES["toy"], latent_channels=4, clip_dim=WIDTH, t5_dim=WIDTH)
    unet = DFGN(**(config | changes))
    for name, weight in unet.named_parameters():
        if name.endswith(".alpha"):
            weight.data.fill_(1.0)
        elif not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()
