"""
The frozen parts around the U-Net, behind one small interface (section 3.2 and Table 6 of the paper):

    codec      frames uint8 (N, R, R, 3)  <->  latents (N, C, R/f, R/f)               the paper's VAE
    clip, t5   captions -> token states (B, L, width) and a mask bool (B, L)          the paper's CLIP and T5

The built-in ones need no download and no pre-trained weights: PatchPCA is fitted to the stickers at hand in
closed form and saved with the checkpoint; WordVectors and NgramVectors are computed from the letters of the
caption. A real VAE, CLIP or T5 has to offer the same attributes and calls.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding

MAX_TOKENS = 77  # text sequence length, per encoder (Table 6)

# ------------------------------------------------------------------------------------------------------------
# The codec


class PatchPCA(ModelMixin, ConfigMixin):
    """Linear codec: principal components of image patches in,
    ridge regression from 3 x 3 neighbouring codes out.

    The cousin of a VAE that can be fitted in seconds: `encode` cuts a frame into patches and keeps the
    `latent_channels` strongest components of each; `decode` predicts the pixels of a patch from its own code
    and the eight around it, which recovers a part of what the components drop and hides the seams between
    patches.

    patch_size: f, pixels per latent along each side; the resolution must be a multiple of it
    latent_channels: C
    """

    # Components are scaled by std ** -WHITENING: 1 makes all equally loud, 0 keeps the spectrum of pixels.
    WHITENING = 0.5
    # Standard deviation of the latents. Below 1, because neighbouring patches and frames say the same thing
    # many times over: at 1 the colour of a sticker shines through the noise of the last diffusion step, and
    # the network reads it there instead of in the text.
    STD = 0.15

    @register_to_config
    def __init__(self, patch_size=8, latent_channels=32):
        super().__init__()
        pixels = 3 * patch_size**2
        self.register_buffer("encoder_weight", torch.zeros(latent_channels, pixels, 1, 1))
        self.register_buffer("encoder_bias", torch.zeros(latent_channels))
        self.register_buffer("decoder_weight", torch.zeros(pixels, latent_channels, 3, 3))
        self.register_buffer("decoder_bias", torch.zeros(pixels))

    @property
    def latent_channels(self):
        return self.config.latent_channels

    @property
    def factor(self):
        """Pixels per latent along each side."""
        return self.config.patch_size

    @property
    def identity(self):
        """A name that changes with the latents that this codec produces: a part of the latent cache's key."""
        weights = torch.cat([buffer.flatten() for buffer in self.buffers()])
        return "PatchPCA-" + hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()[:16]

    def _patches(self, frames):
        """frames uint8 (N, R, R, 3) -> (N, 3 f f, R/f, R/f) in [-1, 1]"""
        x = frames.to(self.encoder_bias.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, R, R)
        return F.pixel_unshuffle(x, self.config.patch_size)

    @torch.no_grad()
    def fit(self, frames):
        """Fits both directions to `frames`, uint8 (N, R, R, 3), in closed form.
        A thousand frames are plenty."""
        patches = self._patches(frames)  # (N, P, h, w)
        x = patches.permute(0, 2, 3, 1).flatten(0, 2).double()  # (N h w, P)
        mean = x.mean(dim=0)
        variance, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
        top = variance.flip(0)[: self.latent_channels].clamp_min(1e-6)
        weight = (
            vectors.flip(1)[:, : self.latent_channels].T * top.pow(-self.WHITENING / 2)[:, None]
        )  # (C, P)
        weight *= self.STD / ((x - mean) @ weight.T).square().mean().sqrt().clamp_min(1e-6)
        self.encoder_weight.copy_(weight[:, :, None, None])
        self.encoder_bias.copy_(-weight @ mean)

        codes = F.conv2d(patches, self.encoder_weight, self.encoder_bias)  # (N, C, h, w)
        context = F.unfold(F.pad(codes, (1, 1, 1, 1), mode="replicate"), kernel_size=3)  # (N, 9 C, h w)
        a = context.transpose(1, 2).flatten(0, 1).double()  # (N h w, 9 C)
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        ridge = 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        solution = torch.linalg.solve(a.T @ a + ridge, a.T @ x)  # (9 C + 1, P)
        self.decoder_weight.copy_(solution[:-1].T.unflatten(1, (self.latent_channels, 3, 3)))
        self.decoder_bias.copy_(solution[-1])

    @torch.no_grad()
    def encode(self, frames):
        """frames uint8 (N, R, R, 3) -> latents float32 (N, C, R/f, R/f), of about STD"""
        return F.conv2d(self._patches(frames), self.encoder_weight, self.encoder_bias)

    @torch.no_grad()
    def decode(self, latents):
        """latents (N, C, h, w) -> frames uint8 (N, f h, f w, 3)"""
        codes = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        patches = F.conv2d(codes, self.decoder_weight, self.decoder_bias)  # (N, P, h, w)
        pixels = F.pixel_shuffle(patches, self.config.patch_size)  # (N, 3, R, R)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------------
# The text encoders


@lru_cache(maxsize=1 << 16)
def hashed_vector(key, width):
    """A fixed random direction for a string: float32 (width,), unit variance, the same on every machine."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(width, dtype=np.float32)


class WordVectors:
    """One token per word, one fixed random vector per word: in the place of CLIP.
    Unrelated words are nearly orthogonal."""

    width = 256

    def vector(self, word):
        return hashed_vector(word, self.width)

    def __call__(self, captions):
        """captions: B strings -> states float32 (B, L, width), mask bool (B, L);
        L is that of the longest caption.

        The first token is a start token, so that an empty caption still gives attention something to look at.
        The rest are the words and the "#" signs; what is beyond MAX_TOKENS is cut."""
        tokens = [["<start>", *re.findall(r"\w+|#", caption.lower())][:MAX_TOKENS] for caption in captions]
        length = max(map(len, tokens))
        states = torch.zeros(len(tokens), length, self.width)
        mask = torch.zeros(len(tokens), length, dtype=torch.bool)
        for b, words in enumerate(tokens):
            states[b, : len(words)] = torch.from_numpy(np.stack([self.vector(word) for word in words]))
            mask[b, : len(words)] = True
        order = get_timestep_embedding(torch.arange(length), self.width)  # a hint of word order
        return (states + 0.3 * order) * mask[..., None], mask


class NgramVectors(WordVectors):
    """One token per word, the normalized sum over its character n-grams: in the place of T5. Words that share
    a stem ("bouncing", "bounces") get similar vectors, so that wording generalizes."""

    SIZES = (3, 4, 5)

    def vector(self, word):
        padded = f"^{word}$"
        ngrams = [padded[i : i + n] for n in self.SIZES for i in range(len(padded) - n + 1)] or [padded]
        return sum(hashed_vector("ngram:" + ngram, self.width) for ngram in ngrams) / len(ngrams) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# The three together


class Encoders:
    """codec, clip and t5 of one model, as attributes."""

    def __init__(self, codec):
        self.codec, self.clip, self.t5 = codec, WordVectors(), NgramVectors()

    def text(self, captions, device="cpu"):
        """captions: B strings -> (clip, clip_mask, t5, t5_mask) on `device`, as DFGN.forward takes them."""
        return tuple(x.to(device) for encoder in (self.clip, self.t5) for x in encoder(captions))

    def save(self, folder):
        self.codec.save_pretrained(Path(folder) / "codec")

    @classmethod
    def load(cls, folder, device="cpu"):
        """Reads what `save` wrote. OSError if there is no codec in `folder`."""
        return cls(PatchPCA.from_pretrained(Path(folder) / "codec", low_cpu_mem_usage=False).to(device))
