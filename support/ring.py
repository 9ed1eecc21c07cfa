"""
Clips without an end, from a network that was trained on clips with one.
"""

import numpy as np
import torch

from support.common import even_parts


class Ring:
    """A denoiser whose clips, of any number of frames, have no first frame: for every timestep it cuts them
    open at a place drawn anew, and into windows of at most `most` frames. The last frame then is followed by
    the first as any frame by the next ("latent shift" of Mobius, arXiv 2502.20307)."""

    def __init__(self, denoiser, most, seed):
        self.denoiser, self.most, self.seed, self.device = denoiser, most, seed, denoiser.device

    def __call__(self, noisy, latents, given, timestep, text):
        """As DFGN.forward, with as many frames as there are. Returns the noise (B, F, C, h, w)."""
        count = given.shape[1]
        turn = int(np.random.default_rng((self.seed, int(timestep[0]))).integers(count))
        turned = (x.roll(turn, dims=1) for x in (noisy, latents, given))
        windows = zip(*(x.split(even_parts(count, self.most), dim=1) for x in turned))
        noise = [self.denoiser(*window, timestep, text) for window in windows]
        return torch.cat(noise, dim=1).roll(-turn, dims=1)
