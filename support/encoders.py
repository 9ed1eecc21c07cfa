"""
The frozen parts around the U-Net, behind one small interface ("Guidance" and Table 6 of the paper):

    codec      frames uint8 (N, R, R, 3)  <->  latents (N, C, R/f, R/f)               the paper's VAE
    clip, t5   captions -> token states (B, L, width) and a mask bool (B, L)          the paper's CLIP and T5

The built-in ones need no download and no pre-trained weights: PatchPCA is fitted to the stickers at hand in
closed form and saved with the checkpoint; WordVectors and NgramVectors are computed from the letters of the
caption. A real VAE, CLIP or T5 has to offer the same attributes and calls.
"""

import hashlib
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from support.machine import exact, to_device
from support.pretrained import EncoderError, check_size, load_pretrained, load_text
from support.prior import GaussianPrior

disable_progress_bar()  # of transformers: frozen parts load in a second or two
MAX_TOKENS = 77  # text sequence length, per encoder (Table 6)
WORD = r"\w{1,64}|#"  # a token of the built-in encoders

# ------------------------------------------------------------------------------------------------------------
# The codec


class PatchPCA(ModelMixin, ConfigMixin):
    """Linear codec: principal components of image patches in, ridge regression from 3 x 3 codes out.

    The cousin of a VAE that can be fitted in seconds: `encode` cuts a frame into patches and keeps the
    `latent_channels` strongest components of each; `decode` predicts the pixels of a patch from its own code
    and the eight around it, which recovers a part of what the components drop and hides the seams between
    patches.

    patch_size: f, pixels per latent along each side; the resolution must be a multiple of it
    latent_channels: C
    """

    # Components are scaled by std ** -WHITENING: 1 makes all equally loud, 0 keeps the spectrum of pixels.
    WHITENING = 0.5
    # Standard deviation of the latents, that of a VAE's: the noise schedule is made for it. At 0.2 a sticker
    # drowned within the first 40 of 1000 timesteps, and all its details had to be drawn in two of 50 sampling
    # steps.
    STD = 1.0

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
        """Fits both directions in closed form to `frames`, uint8 (N, R, R, 3): a thousand are plenty."""
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
    """One token, and one fixed random vector, per word: in the place of CLIP. Unrelated words are nearly
    orthogonal."""

    width = 256

    def vector(self, word):
        return hashed_vector(word, self.width)

    def __call__(self, captions):
        """captions: B strings -> states float32 (B, L, width), mask bool (B, L), L that of the longest.

        The first token is a start token, so that an empty caption still gives attention something to look at.
        The rest are the words and the "#" signs; what is beyond MAX_TOKENS is cut."""
        tokens = [["<start>", *re.findall(WORD, caption.lower())][:MAX_TOKENS] for caption in captions]
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
# Pre-trained ones: any VAE of the Stable Diffusion family, any CLIP text model, any T5 encoder


class PretrainedVAE:
    """The paper's codec: an AutoencoderKL, with the scaling factor of its own config (diffusers).

    It computes in fp32 whatever the training does: fp16 overflows in the decoders of some of the family and
    gives black pictures, and a frame is encoded only once. Latents have a standard deviation of about 1."""

    STD = 1.0
    BATCH = 8  # frames at a time: the activations of a 256 x 256 frame take some 300 MB

    def __init__(self, source, device="cpu"):
        def load(source, subfolder):
            vae = AutoencoderKL.from_pretrained(
                source, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
            )
            scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
            if not (scale and math.isfinite(scale) and math.isfinite(shift)):
                raise ValueError(f"its config.json says scaling_factor = {scale}, shift_factor = {shift}")
            return vae

        def build(folder):
            return AutoencoderKL.from_config(AutoencoderKL.load_config(folder))

        vae = load_pretrained("--vae", source, ("vae",), load, build)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0)
        self.source = str(source)
        state = hashlib.sha256(repr((self.scale, self.shift)).encode())
        for name, tensor in self.vae.state_dict().items():
            state.update(name.encode())
            state.update(tensor.contiguous().cpu().numpy().tobytes())
        self.identity = "AutoencoderKL-" + state.hexdigest()[:16]  # other weights or scale, other latents

    @property
    def latent_channels(self):
        return self.vae.config.latent_channels

    @property
    def factor(self):
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, frames):
        """frames uint8 (N, R, R, 3) -> posterior means, scaled: float32 (N, C, R/f, R/f)"""
        latents = []
        for part in frames.split(self.BATCH):
            x = part.to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, R, R)
            latents.append((self.vae.encode(x).latent_dist.mean - self.shift) * self.scale)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents):
        """latents (N, C, h, w) -> frames uint8 (N, f h, f w, 3)"""
        frames = []
        for part in latents.float().split(self.BATCH):
            x = self.vae.decode(part / self.scale + self.shift).sample  # (n, 3, R, R)
            frames.append(((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1))
        return torch.cat(frames)


class PretrainedText:
    """A frozen text encoder with its tokenizer (transformers). Its subclasses are the paper's two."""

    def __init__(self, source, device="cpu", dtype=torch.float32):
        model, self.tokenizer = load_text(
            self.FLAG, source, self.SUBFOLDERS, self.MODEL, self.MODEL_TYPES, dtype
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.source, self.width = str(source), model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions):
        """captions: B strings -> states float32 (B, 77, width), zeros where padded; mask bool (B, 77).
        The first token always counts: an empty caption must leave attention something to look at."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens.attention_mask.bool()  # (B, 77)
        mask[:, 0] = True
        states = self.model(tokens.input_ids, attention_mask=mask.long()).last_hidden_state.float()
        return states * mask[..., None], mask


class PretrainedCLIP(PretrainedText):
    FLAG, MODEL, MODEL_TYPES = "--clip", CLIPTextModel, ("clip_text_model", "clip")
    SUBFOLDERS = ("text_encoder",)


class PretrainedT5(PretrainedText):
    FLAG, MODEL, MODEL_TYPES = "--t5", T5EncoderModel, ("t5",)
    SUBFOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


# ------------------------------------------------------------------------------------------------------------
# Together


class Encoders:
    """What is frozen in one model, as attributes: codec, clip, t5, the built-in ones where no source is
    named; and prior, the GaussianPrior of a preconditioned model, else None.

    codec: a fitted PatchPCA, or None for the VAE of `vae`
    vae, clip, t5: folders or hub ids
    dtype: precision of the text encoders
    """

    def __init__(
        self, codec=None, vae=None, clip=None, t5=None, device="cpu", dtype=torch.float32, prior=None
    ):
        self.codec = PretrainedVAE(vae, device) if vae else codec.to(device)
        self.clip = PretrainedCLIP(clip, device, dtype) if clip else WordVectors()
        self.t5 = PretrainedT5(t5, device, dtype) if t5 else NgramVectors()
        self.prior = None if prior is None else prior.to(device)

    def text(self, captions, device="cpu"):
        """captions: B strings -> (clip, clip_mask, t5, t5_mask) on `device`, as DFGN.forward takes them.

        Never under autocast: transformers keeps a T5 in fp16 from overflowing by layers that stay in fp32."""
        captions = [caption.encode(errors="replace").decode() for caption in captions]  # argv: any bytes
        with exact():
            return tuple(to_device(x, device) for encode in (self.clip, self.t5) for x in encode(captions))

    def sources(self):
        """{"vae" | "clip" | "t5": the folder or hub id of a pre-trained part, else None}, and the codec's
        identity."""
        parts = dict(vae=self.codec, clip=self.clip, t5=self.t5)
        named = {name: getattr(part, "source", None) for name, part in parts.items()}
        return dict(named, codec_identity=self.codec.identity)

    def save(self, folder):
        """Saves what cannot be found elsewhere, what was fitted here. Pre-trained parts are not copied."""
        fitted = dict(codec=self.codec if isinstance(self.codec, PatchPCA) else None, prior=self.prior)
        for name, part in fitted.items():
            if part is not None:
                part.save_pretrained(Path(folder) / name)

    @classmethod
    def load(cls, folder, sources, device="cpu", dtype=torch.float32):
        """The encoders of a model: what `save` wrote into `folder`, and the `sources` recorded with it.

        Raises EncoderError for a part that is not there or another VAE, OSError without a codec."""
        named = {name: sources.get(name) for name in ("vae", "clip", "t5")}
        codec = None if named["vae"] else load_fitted(PatchPCA, Path(folder) / "codec")
        has_prior = (Path(folder) / "prior").is_dir()
        prior = load_fitted(GaussianPrior, Path(folder) / "prior") if has_prior else None
        encoders = cls(codec, **named, device=device, dtype=dtype, prior=prior)
        expected = sources.get("codec_identity", encoders.codec.identity)
        if encoders.codec.identity != expected:
            raise EncoderError(
                f"--vae {named['vae']} is another VAE than the model was trained with: name the one that its "
                "model_index.json records."
            )
        return encoders


def load_fitted(part, folder):
    """A PatchPCA or GaussianPrior that save_pretrained wrote into `folder`. Raises OSError or ValueError."""
    check_size(folder, lambda folder: part.from_config(part.load_config(folder)))
    return part.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
