"""
The preconditioning of `tiny` and `small`: a Gaussian over clips, fitted in closed form, and a wrapper
that gives a DFGN its estimate of the clean latents. Ours, not the paper's; `full` goes without.

    GaussianPrior     variances, correlations, a regression on captions; its best estimate is a Wiener filter
    Preconditioned    DFGN with the estimate beside its inputs and mixed into its output, called as DFGN is
    loss_weights; first_latents, for_sampling    what training and sampling do otherwise with it

A frame is a point along principal components ("modes"). Modes are independent of each other; within a mode
the frames of a clip correlate, by the number of frames and by how strong the mode is. A caption moves the
mean of every frame, by a sum over its words and as a smooth function of the frame's place in the clip: what
colour a red heart has, and where something that bounces is at first, halfway and at last. The best estimate
of clean latents is then linear in the noisy frames and in the given ones. The network learns what a Gaussian
cannot say: outlines, eyes, and which of them go together.
"""

import math

import torch
import torch.nn as nn
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from support.common import even_parts
from support.machine import exact, to_device

MODES = 1024  # components that are told apart; what is left of a frame has one variance in all directions
BAND_ENDS = (8, 32, 128, 512)  # from strong modes to weak ones: a band shares the correlation of frames
WAVES = 4  # cosines over a clip, the first one constant: what a word does to a frame is a sum of them
FIT_FRAMES = 8192  # most frames that the modes are fitted to
LATENT_ERROR = 0.03  # assumed error of the network's estimate of clean latents, as a share of their variance
SAMPLING_ERROR = 0.001  # the same while sampling: the network errs by blur, the prior by grain one sees
MAX_LATENT_WEIGHT = 5.0
RIDGE = 8000  # of the regression on captions: it counts as many frames about which captions say nothing


class GaussianPrior(ModelMixin, ConfigMixin):
    """latent_channels, side: C, and h = w of the latents; text_dim: width of the CLIP states; lengths:
    numbers of frames that a clip may have, without gaps. No parameters: all it holds is fitted, nothing is
    trained."""

    @register_to_config
    def __init__(self, latent_channels, side, text_dim, lengths=(3, 4, 5, 6, 7, 8)):
        super().__init__()
        self.lengths = tuple(lengths)
        size = latent_channels * side**2  # D
        modes = min(MODES, size - 1)  # M
        bands = sum(end < modes for end in BAND_ENDS) + 1
        self.register_buffer("std", torch.ones(()))  # of the latents
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("modes", torch.eye(modes, size))  # (M, D), orthonormal rows
        self.register_buffer("no_text", torch.zeros(text_dim))  # features of the empty caption
        # How far the modes move by a caption's features
        self.register_buffer("shift", torch.zeros(WAVES, text_dim, modes))
        # First for clips without text, then for those with it, whose mean is known better: variances, the
        # last one of what is left; for every number of frames 3..8 and every band, in the upper left corner,
        # correlations with a mean diagonal of one
        self.register_buffer("variance", torch.ones(2, modes + 1))
        alone = torch.eye(self.lengths[-1]).repeat(2 * len(self.lengths), bands, 1, 1)
        self.register_buffer("frames", alone)  # (12, bands, 8, 8)
        ends = (0, *BAND_ENDS[: bands - 1], modes)
        self.sizes = [end - start for start, end in zip(ends, ends[1:])]  # of the bands
        band = torch.bucketize(torch.arange(modes + 1), torch.tensor(ends[1:-1]), right=True)
        self.register_buffer("band", band, persistent=False)  # (M + 1,)
        self.known = {}  # what `along_frames` found

    def features(self, text):
        """text, as DFGN.forward takes it -> (B, text_dim): the sum of CLIP states less that of no caption"""
        states, mask = text[:2]
        return (states.float() * mask[..., None]).sum(dim=1) - self.no_text

    def waves(self, slots, length):
        """The cosines at each slot of clips of `length` frames, (B,) or one number: (B | 1, slots, WAVES)"""
        length = torch.as_tensor(length, device=self.mean.device).view(-1, 1)
        slot, wave = (torch.arange(n, device=self.mean.device) for n in (slots, WAVES))
        place = (slot / (length - 1).clamp(min=1)).clamp(max=1)  # 0 at the first frame, 1 at the last
        return torch.cos(math.pi * place[..., None] * wave)

    def shift_by(self, words, slots, length):
        """How far captions move the modes of each frame: features (B, text_dim) -> (B, slots, M)"""
        return self.waves(slots, length) @ (words @ self.shift).transpose(0, 1)

    @exact()
    @torch.no_grad()
    def fit(self, clips, texts, no_text):
        """clips: {k: latents (n, k, C, h, w) of clips that have k distinct frames} for k = 3..8, n may be 0;
        texts: {k: their captions, as DFGN.forward takes them}; no_text: the same of one empty caption.

        Three clips of four give mean, modes and what captions do, the fourth says how much clips vary around
        that: from its own mean and along its own modes a clip seems to vary less than the next one will."""
        device = self.mean.device
        self.no_text.copy_(self.features([x.to(device) for x in no_text])[0])
        clips = {k: clip.flatten(2).to(device) for k, clip in clips.items()}  # (n, k, D)
        texts = {k: self.features([x.to(device) for x in text]) for k, text in texts.items()}  # (n, text_dim)
        fourth = {k: torch.arange(len(clip), device=device) % 4 == 0 for k, clip in clips.items()}
        first = {k: ~last if len(last) > 1 else last for k, last in fourth.items()}
        x = torch.cat([clips[k][first[k]].flatten(0, 1) for k in self.lengths])  # (N, D)
        self.std.copy_(x.square().mean().sqrt())
        self.mean.copy_(x.mean(dim=0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            some = torch.linspace(0, len(x) - 1, min(len(x), FIT_FRAMES), device=device).long()
            found = min(len(self.modes), len(some))
            self.modes[:found] = torch.svd_lowrank(x[some] - self.mean, q=found, niter=2)[2].T
        self.modes[found:] = 0

        z = {k: (clip - self.mean) @ self.modes.T for k, clip in clips.items()}  # (n, k, M)
        square = product = count = 0
        for k in self.lengths:  # each frame is explained by its caption's features times each wave
            words = torch.einsum("nt,kp->nkpt", texts[k][first[k]], self.waves(k, k)[0])
            words = words.flatten(2).flatten(0, 1)  # (n k, WAVES text_dim)
            square, product = square + words.T @ words, product + words.T @ z[k][first[k]].flatten(0, 1)
            count += len(words)
        ridge = (RIDGE / count * square.diagonal().mean()).clamp(min=1e-6)
        square += ridge * torch.eye(len(square), device=device)
        self.shift.copy_(torch.linalg.solve(square, product).view_as(self.shift))

        new = torch.cat([clips[k][fourth[k]].flatten(0, 1) for k in self.lengths]) - self.mean
        rest = new.square().sum() - (new @ self.modes.T).square().sum()
        self.variance[:, -1] = rest / (len(new) * (new.shape[1] - found))
        for has_text in (0, 1):
            left = {k: z[k] - has_text * self.shift_by(texts[k], k, k) for k in self.lengths}
            along = torch.cat([left[k][fourth[k]].flatten(0, 1) for k in self.lengths])
            self.variance[has_text, :-1] = along.square().mean(dim=0)
            for i, k in enumerate(self.lengths):
                for band in range(self.frames.shape[1]):
                    strong = left[k][:, :, self.band[:-1] == band]
                    correlation = torch.einsum("nim,njm->ij", strong, strong)
                    correlation *= k / correlation.trace().clamp(min=1e-12)
                    one_more = torch.eye(k, device=device)  # as if one more clip had unrelated frames
                    correlation = (len(strong) * correlation + one_more) / (len(strong) + 1)
                    self.frames[has_text * len(self.lengths) + i, band, :k, :k] = correlation
        self.variance.clamp_(min=1e-6 * self.variance.max())
        self.known.clear()

    def along_frames(self, given, valid):
        """How frames depend on each other in a clip whose masks are `given` and `valid`, tuples of F bools:
        follow, Q, s of `conditioned`, without text and with it, (2, bands, F, F), twice, and (2, bands, F).
        There are few masks: each is computed once."""
        key = given, valid, self.device
        if key not in self.known:
            slots, length = len(valid), max(sum(valid) - self.lengths[0], 0)
            g, v = (torch.tensor(mask, device=self.device)[:, None].float() for mask in (given, valid))
            g, u = g * v, (1 - g) * v  # (F, 1)
            T = self.frames.unflatten(0, (2, -1))[:, length, :, :slots, :slots]  # (2, bands, F, F)
            among_given = T * g * g.mT + torch.diag_embed(1 - g.squeeze(1))
            follow = u * torch.linalg.solve(among_given, T * g).mT
            left = T * u * u.mT - follow @ (T * g * u.mT)
            s, Q = torch.linalg.eigh((left + left.mT) / 2)
            self.known[key] = follow + torch.diag_embed(g.squeeze(1)), Q, s
        return self.known[key]

    def conditioned(self, given, valid, text):
        """What captions and given frames say before any noisy frame is seen. given, valid: bool (B, F); those
        in the CPU's memory make no GPU wait

        Returns
        shift (B, F, M): of the modes by the caption; and for every band
        follow (B, bands, F, F): how a frame follows the given ones, which have no noise
        Q (B, bands, F, F): the eigenvectors over frames of how the others still vary
        variance (B, F, M + 1): along those, of each mode and of the rest
        """
        words = self.features(text)
        has_text = (words.norm(dim=1) > 0.05 * self.no_text.norm()).long()  # (B,)
        length = to_device(valid.sum(dim=1), self.device)
        shift = self.shift_by(words, valid.shape[1], length) * has_text[:, None, None]

        clips = zip(map(tuple, given.tolist()), map(tuple, valid.tolist()))
        found = map(torch.stack, zip(*(self.along_frames(*masks) for masks in clips)))
        which = torch.arange(len(has_text), device=self.device), has_text
        follow, Q, s = (x[which] for x in found)
        variance = s.clamp(min=0).mT[:, :, self.band] * self.variance[has_text][:, None]
        return shift, follow, Q, variance

    def in_bands(self, function, x, shift, amount):
        """Calls function(x of a band, band, its amount) for the modes of each band, less `shift`, and for
        what is left. x: (B, F, D); shift: (B, F, M), or 0; amount: (B, F, M + 1); returns (B, F, D)"""
        z = x @ self.modes.T
        rest = x - z @ self.modes
        parts = zip((z - shift).split(self.sizes, dim=2), amount[:, :, :-1].split(self.sizes, dim=2))
        z = torch.cat([function(part, band, some) for band, (part, some) in enumerate(parts)], dim=2) + shift
        return z @ self.modes + function(rest, -1, amount[:, :, -1:])

    @exact()
    def forward(self, noisy, latents, given, alpha, text, valid=None):
        """The best linear estimate of the clean latents, and how far off it will be.

        noisy: (B, F, C, h, w), x_t; latents, given: clean latents and bool (B, F), which of them are given
        alpha: (B,) cumulative; text: as DFGN.forward takes it; valid: bool (B, F)
        Returns estimate (B, F, C, h, w), exact in given frames, and error (B, F), the root mean square of its
        error that is to be expected. In slots that hold no frame both mean nothing.
        """
        shape = noisy.shape[2:]
        if valid is None:
            valid = torch.ones_like(given)
        shift, follow, Q, variance = self.conditioned(given, valid, text)
        noise = ((1 - alpha) / alpha)[:, None, None]  # variance of the noise in x_t / sqrt(alpha)
        gain = variance / (variance + noise)

        def without_noise(z, band, gain):
            known = follow[:, band] @ z
            return known + Q[:, band] @ (gain * (Q[:, band].mT @ (z - known)))

        given, valid = (to_device(mask, noisy.device)[:, :, None] for mask in (given, valid))  # (B, F, 1)
        truth = latents.flatten(2)  # (B, F, D)
        x = torch.where(given, truth, noisy.flatten(2) / alpha.sqrt()[:, None, None])
        x = torch.where(valid, x - self.mean, 0)
        x = self.mean + self.in_bands(without_noise, x, shift, gain)
        x = torch.where(given, truth, x)

        share = torch.ones_like(gain) / x.shape[2]  # of each mode, and of the rest, in a frame's mean square
        share[:, :, -1] *= x.shape[2] - len(self.modes)
        left = gain * noise * share  # posterior variances along the eigenvectors Q
        left = left.new_zeros(*left.shape[:2], Q.shape[1]).index_add(2, self.band, left)  # (B, F, bands)
        error = torch.einsum("bnfj,bjn->bf", Q.square(), left).clamp(min=0).sqrt()
        return x.unflatten(2, shape), torch.where(given.squeeze(2), 0.0, error)  # rounding leaves no zeros

    @exact()
    def draw(self, noise, latents, given, text):
        """A clip of this Gaussian, made from standard normal `noise` (B, F, C, h, w), exact in given frames.
        latents, given, text: as in `forward`; every slot holds a frame. A clip of more than 8 frames is
        several of this Gaussian, from the same noise. Returns (B, F, C, h, w)."""
        if given.shape[1] > (most := self.lengths[-1]):
            sizes = even_parts(given.shape[1], most)
            parts = zip(*(x.split(sizes, dim=1) for x in (latents, given)))
            clips = [self.draw(noise[:, : g.shape[1]], z, g, text) for z, g in parts]
            return torch.cat(clips, dim=1)
        is_given, truth = to_device(given, noise.device)[:, :, None], latents.flatten(2)  # (B, F, 1 | D)
        shift, follow, Q, variance = self.conditioned(given, torch.ones_like(given), text)
        x = torch.where(is_given, truth - self.mean, 0)
        x = self.mean + self.in_bands(lambda z, band, _: follow[:, band] @ z, x, shift, variance)
        x = x + self.in_bands(lambda n, band, v: Q[:, band] @ (v.sqrt() * n), noise.flatten(2), 0, variance)
        return torch.where(is_given, truth, x).unflatten(2, noise.shape[2:])


# ------------------------------------------------------------------------------------------------------------
# The wrapper, and what follows from it


class Preconditioned(nn.Module):
    """A denoiser that is called as DFGN is and returns what it returns, with a DFGN inside whose last layer
    estimates the clean latents, in units of their standard deviation.

    Clean latents have few degrees of freedom, noise has all of them, and a narrow network cannot carry it
    from input to output (Li and He, "Back to Basics: Let Denoising Generative Models Denoise"). The prior's
    estimate is one more input, and is mixed with the network's by the errors of both; the noise follows from
    x_t. Given frames are shown to all frames of their clip (`nearest_given`).

    unet: DFGN with condition_channels = 2 C, or a wrapper of it; prior: a fitted GaussianPrior
    alphas_cumprod: float (timesteps,), of the noise schedule
    latent_error: assumed error of the network's estimate, as a share of the variance of latents
    """

    def __init__(self, unet, prior, alphas_cumprod, latent_error=LATENT_ERROR):
        super().__init__()
        self.unet, self.prior, self.latent_error = unet, prior, latent_error
        self.register_buffer("alphas_cumprod", alphas_cumprod.to(prior.device), persistent=False)

    @property
    def device(self):
        return self.prior.device

    def forward(self, noisy, latents, given, timestep, text, valid=None):
        """As DFGN.forward, with latents of C channels."""
        alpha, std = self.alphas_cumprod[timestep], self.prior.std  # (B,)
        estimate, error = self.prior(noisy, latents, given, alpha, text, valid)
        alpha = alpha[:, None, None, None, None]

        c_in = (alpha * std**2 + 1 - alpha).rsqrt()
        condition = torch.cat([nearest_given(latents, given), estimate], dim=2) / std  # (B, F, 2C, h, w)
        out = self.unet(c_in * noisy, condition, torch.ones_like(given), timestep, text, valid).float()

        c_out = error.square() / (error.square() + self.latent_error * std**2)  # (B, F), 0 in given frames
        clean = torch.lerp(estimate, std * out, c_out[:, :, None, None, None])
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        if valid is None:
            return noise
        return torch.where(to_device(valid, noisy.device)[:, :, None, None, None], noise, 0.0)


def nearest_given(latents, given):
    """For each frame the latents of the given frame that is nearest to it, the earlier of two; zeros where
    none is given. latents (B, F, C, h, w), given bool (B, F) -> (B, F, C, h, w)

    A given frame is its own nearest. The others see beside their noise what they probably look like: to copy
    what stands still takes a network one convolution then, and not attention between frames."""
    slots = torch.arange(given.shape[1], device=given.device)
    distance = (slots[:, None] - slots).abs() + len(slots) * ~given[:, None]  # (B, F, F), from row to column
    nearest = to_device(distance.argmin(dim=2), latents.device)[:, :, None, None, None]
    some = to_device(given.any(dim=1), latents.device)[:, None, None, None, None]
    return torch.where(some, latents.take_along_dim(nearest, dim=1), 0.0)


def precondition(unet, prior, alphas_cumprod):
    """The denoiser of a model: Preconditioned, or `unet` itself where there is no prior (None)."""
    return unet if prior is None else Preconditioned(unet, prior, alphas_cumprod)


def balanced_weights(latent_std, alphas_cumprod):
    """The weight of the noise's squared error at each timestep under which the error of the clean latents, of
    standard deviation `latent_std`, counts with min(snr + 1, 5): float32 (timesteps,). Under Eq. 1 the large
    timesteps, at which subject, colour and place are decided, would weigh next to nothing."""
    snr = alphas_cumprod * latent_std**2 / (1 - alphas_cumprod)
    return (snr + 1).clamp(max=MAX_LATENT_WEIGHT) / snr


def loss_weights(denoiser, alphas_cumprod):
    """How much the squared error of the noise weighs at each timestep: float32 (timesteps,). Ones for a bare
    DFGN, as in Eq. 1; balanced_weights for a preconditioned one."""
    if not isinstance(denoiser, Preconditioned):
        return torch.ones_like(alphas_cumprod)
    return balanced_weights(float(denoiser.prior.std), alphas_cumprod)


def for_sampling(denoiser):
    """The denoiser that sampling calls: a preconditioned one with SAMPLING_ERROR, a bare DFGN as it is."""
    if not isinstance(denoiser, Preconditioned):
        return denoiser
    return Preconditioned(denoiser.unet, denoiser.prior, denoiser.alphas_cumprod, SAMPLING_ERROR)


def first_latents(denoiser, scheduler, noise, clip_noise, latents, given, text):
    """What sampling starts from: (B, F, C, h, w). `noise` for a bare DFGN.

    Even the noisiest timestep shows the strongest modes of a clip, its colour above all: with noise alone a
    preconditioned network would see those of no clip in particular. It starts from a clip of its prior, made
    from `clip_noise` and noised with `noise`. latents, given, text: as DFGN.forward takes them."""
    if not isinstance(denoiser, Preconditioned):
        return noise
    clean = denoiser.prior.draw(clip_noise, latents, given, text)
    return scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
