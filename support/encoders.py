"""
The frozen parts around the U-Net, behind one small interface ("Guidance" and Table 6 of the paper):

    codec      frames uint8 (N, R, R, 3)  <->  latents (N, C, R/f, R/f)               the paper's VAE
    clip, t5   captions -> token states (B, L, width) and a mask bool (B, L)          the paper's CLIP and T5

Unless others are named nothing is downloaded: the codec is the sticker VAE that ships, which lab/train_vae.py
made; WordVectors and NgramVectors are computed from the letters of the caption. Any VAE of the Stable
Diffusion family, any CLIP and any T5 can take their places.
"""

import hashlib
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from support.machine import exact, to_device
from support.pretrained import EncoderError, check_size, load_pretrained, load_text
from support.prior import GaussianPrior

disable_progress_bar()  # of transformers: frozen parts load in a second or two
SHIPPED_VAE = Path(__file__).parent.parent / "pretrained" / "vae"
MAX_TOKENS = 77  # text sequence length, per encoder (Table 6)
WORD = r"\w{1,64}|#"  # a token of the built-in encoders

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
    gives black pictures, and a frame is encoded only once. Latents have a standard deviation of about 1.

    source: a folder or hub id that a model records; None: the VAE that ships, or a model's `copy` of it, a
    folder"""

    PIXELS = 8 * 256**2  # at a time: in Stable Diffusion's VAE 256 x 256 take some 300 MB

    def __init__(self, source=None, device="cpu", copy=None):
        def load(source, subfolder):
            vae = AutoencoderKL.from_pretrained(
                source, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
            )
            scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
            if not (scale and math.isfinite(scale) and math.isfinite(shift)):
                raise ValueError(f"its config.json says scaling_factor = {scale}, shift_factor = {shift}")
            if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
                raise ValueError("it is not for pictures of three colours")
            vae.register_to_config(_name_or_path=None)  # where it lay is nobody's business in a copy
            return vae

        def build(folder):
            return AutoencoderKL.from_config(AutoencoderKL.load_config(folder))

        if source:
            vae = load_pretrained("--vae", source, ("vae",), load, build)
        else:
            way_out = "put its files back (`git checkout pretrained/vae`), or name a VAE with --vae"
            if copy:
                way_out = "use another copy of the model, or name the same VAE with --vae"
            vae = load_pretrained("the VAE in", copy or SHIPPED_VAE, (), load, build, way_out=way_out)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0)
        self.source = str(source) if source else None
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

    @exact()
    @torch.no_grad()
    def encode(self, frames):
        """frames uint8 (N, R, R, 3) -> posterior means, scaled: float32 (N, C, R/f, R/f)"""
        latents = []
        for part in frames.split(max(1, self.PIXELS // frames.shape[1:3].numel())):
            x = part.to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, R, R)
            latents.append((self.vae.encode(x).latent_dist.mean - self.shift) * self.scale)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents):
        """latents (N, C, h, w) -> frames uint8 (N, f h, f w, 3)"""
        frames = []
        pixels = latents.shape[2:].numel() * self.factor**2
        for part in latents.float().split(max(1, self.PIXELS // pixels)):
            x = self.vae.decode(part / self.scale + self.shift).sample  # (n, 3, R, R)
            frames.append(((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1))
        return torch.cat(frames)

    def save(self, folder):
        """Writes a copy that diffusers reads; in fp16 if nothing is lost. The files that it was read from may
        be gone by now."""
        weights = {name: weight.contiguous() for name, weight in self.vae.state_dict().items()}
        halves = {name: weight.half() for name, weight in weights.items()}
        lossless = all(halves[name].float().equal(weight) for name, weight in weights.items())
        self.vae.save_config(folder)
        save_file(halves if lossless else weights, Path(folder) / WEIGHTS, dict(format="pt"))


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
    """What is frozen in one model, as attributes: codec, the VAE that ships, clip and t5, the built-in ones,
    where no source is named; and prior, the GaussianPrior of a preconditioned model, else None.

    vae, clip, t5: folders or hub ids
    dtype: precision of the text encoders
    codec: one that is there already, in the place of `vae`
    """

    def __init__(
        self, vae=None, clip=None, t5=None, device="cpu", dtype=torch.float32, prior=None, codec=None
    ):
        self.codec = codec or PretrainedVAE(vae, device)
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
        """Saves what nobody named: the prior that was fitted, and the VAE, since a later version of the
        project may ship another. What has a source is not copied."""
        if self.codec.source is None:
            self.codec.save(Path(folder) / "vae")
        if self.prior is not None:
            self.prior.save_pretrained(Path(folder) / "prior")

    @classmethod
    def load(cls, folder, sources, device="cpu", dtype=torch.float32):
        """The encoders of a model: what `save` wrote into `folder`, and the `sources` recorded with it.

        Raises EncoderError for a part that is not there or another VAE."""
        named = {name: sources.get(name) for name in ("vae", "clip", "t5")}
        if str(sources.get("codec_identity")).startswith("PatchPCA"):
            raise EncoderError(
                f"{folder} is of an older version, which had no VAE: train anew, or use it with that version."
            )
        vae, copy, prior = named["vae"], Path(folder) / "vae", Path(folder) / "prior"
        codec = PretrainedVAE(None, device, copy) if copy.is_dir() and not vae else None
        prior = load_prior(prior) if prior.is_dir() else None
        encoders = cls(**named, device=device, dtype=dtype, prior=prior, codec=codec)
        if sources.get("codec_identity", encoders.codec.identity) != encoders.codec.identity:
            found = f"--vae {vae}" if vae else f"the VAE in {copy if codec else SHIPPED_VAE}"
            raise EncoderError(
                f"{found} is another VAE than the model was trained with: name that one with --vae."
            )
        return encoders


def load_prior(folder):
    """The GaussianPrior that save_pretrained wrote into `folder`. Raises OSError or ValueError."""
    check_size(folder, lambda folder: GaussianPrior.from_config(GaussianPrior.load_config(folder)))
    return GaussianPrior.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
