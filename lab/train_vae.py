"""
Trains the sticker VAE that ships as pretrained/vae, and measures it: diffusers' AutoencoderKL in small,
eight pixels per latent, 16 channels; `train.py --vae` takes it like any of the Stable Diffusion family.

    python -m lab.train_vae                                 # hours on one core; goes on where it was stopped
    python -m lab.train_vae --evaluate pretrained/vae       # PSNR on held-out frames, a picture
    python -m lab.train_vae --evaluate pretrained/vae --stickers DIR     # and on the stickers of a folder

A run's folder holds state.pt (all that it needs to go on), log.jsonl, and, every few minutes anew, the
averaged weights as vae/ and reconstructions.png: real frames above what the VAE makes of them.
"""

import json
import shutil
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from torch import nn
from tqdm import tqdm

from lab import vae_pictures
from lab.metrics import psnr
from support.checkpoint import output_lock
from support.common import UserError, default_cache, evenly, one_sentence, printable, replacing, table
from support.encoders import PretrainedVAE
from support.flags import SEED, Parser, filled, number
from support.folder import scan_folder
from support.log import append_log, begin_log
from support.media import MediaError, on_white
from support.optim import Muon
from support.pictures import check_png, sheet

CHANNELS, LATENT_CHANNELS = (16, 32, 64, 128), 16  # 2.6M parameters; half of the time goes to the last level
SIZE = 64  # pixels of a training picture
MSE, EDGES, KL = 3.0, 1.0, 3e-4  # weights in the loss, beside 1 of the absolute error
MUON_LR, MUON_DECAY, ADAM_LR = 5e-3, 0.01, 2e-3
STEPS, BATCH = 8000, 8
WARM_UP, DECAY = 50, 0.35  # steps of rising learning rate; share of the steps in which it falls to zero
AVERAGE = 0.995  # decay of the averaged weights, once warm
SCALE_PICTURES = 256  # that the scale of the latents is measured on
MINUTES = 4  # between two states on disk


def build_vae():
    """The VAE with random weights: one residual layer per level, no attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def begin(vae):
    """Starting weights: residual layers that add nothing, enlargements that pass on what they get.
    Worth 1.2 dB after 120 steps."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Upsample2D):
            noise = torch.randn_like(module.conv.weight) * 0.1 * module.conv.weight[0].numel() ** -0.5
            nn.init.dirac_(module.conv.weight).data.add_(noise)
    return vae


# ------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(vae):
    """Muon for the convolutions inside; AdamW for those from and to pixels, biases and norms."""
    edges = {vae.encoder.conv_in.weight, vae.decoder.conv_out.weight}
    inside = [weight for weight in vae.parameters() if weight.ndim == 4 and weight not in edges]
    rest = [weight for weight in vae.parameters() if weight.ndim != 4 or weight in edges]
    groups = [dict(params=inside, lr=MUON_LR, weight_decay=MUON_DECAY, muon=True), dict(params=rest)]
    return Muon(groups, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0)


def rate(step, steps):
    """The learning rate of a step, as a share of the highest: up, constant, down to zero. As long as it has
    not begun to fall, `steps` makes no difference."""
    return min(1, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def kl_divergence(posterior):
    """Mean over the latents, in nats."""
    return 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()


def loss_of(vae, x, seed, step):
    """x: (B, 3, R, R) in [-1, 1]. Absolute and squared error of pixels, absolute error of the differences
    between neighbours (it keeps outlines sharp), and a little KL divergence."""
    posterior = vae.encode(x).latent_dist
    noise = draw_noise(posterior.mean.shape, seed, step)
    error = vae.decode(posterior.mean + posterior.std * noise).sample - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    pixels = error.abs().mean() + MSE * error.square().mean()
    return pixels + EDGES * edges + KL * kl_divergence(posterior)


def draw_noise(shape, seed, step):
    """Normal numbers, float32 (B, C, h, w): sample i depends on (seed, step, i)."""
    rngs = [np.random.default_rng((seed, step, i, 1)) for i in range(shape[0])]
    return torch.from_numpy(np.stack([rng.standard_normal(shape[1:], dtype=np.float32) for rng in rngs]))


class Training:
    """All that changes during a run: weights, their average, optimizer, step."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.vae, self.seed, self.step = begin(build_vae()), seed, 0
        self.average = [weight.detach().clone() for weight in self.vae.parameters()]
        self.optimizer = make_optimizer(self.vae)

    def take_step(self, banks, batch_size, steps):
        """One step of `steps` -> the loss."""
        for group, highest in zip(self.optimizer.param_groups, (MUON_LR, ADAM_LR)):
            group["lr"] = highest * rate(self.step, steps)
        x = vae_pictures.batch(banks, self.seed, self.step, batch_size, SIZE)
        loss = loss_of(self.vae, x, self.seed, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(AVERAGE, self.step / (10 + self.step))
        torch._foreach_lerp_(self.average, [w.detach() for w in self.vae.parameters()], 1 - keep)
        return loss.item()

    def state(self):
        return dict(
            step=self.step,
            vae=self.vae.state_dict(),
            average=self.average,
            optimizer=self.optimizer.state_dict(),
        )

    def load(self, state):
        self.step, self.average = state["step"], state["average"]
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])


def save_vae(training, folder, banks):
    """Writes the averaged weights in fp16, with the scale that gives latents of training pictures a standard
    deviation of 1. Returns the folder."""
    vae = build_vae()
    for weight, average in zip(vae.parameters(), training.average):
        weight.data.copy_(average)
    vae.half().float()  # the scale is that of the weights as they are saved
    with torch.no_grad():
        x = vae_pictures.batch(banks, training.seed + 1, 0, SCALE_PICTURES, SIZE)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(16)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    writing = Path(f"{folder}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    vae.half().save_pretrained(writing)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    return folder


def train(output_dir, cache_dir, steps, batch_size, seed):
    """Trains, or goes on with the run in `output_dir`; leaves the VAE in output_dir/vae.

    Every few minutes and at the end there is a new state and picture. Raises UserError for a state that does
    not fit."""
    training, path = Training(seed), output_dir / "state.pt"
    settings = dict(batch_size=batch_size, seed=seed)
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            had = ", ".join(f"--{name} {value}" for name, value in state["settings"].items())
            raise UserError(
                f"{printable(path)} is of a run with {had}: say so, or name another --output_dir."
            )
        training.load(state)
        print(f"going on after step {training.step} of {printable(output_dir)}")
    begin_log(output_dir / "log.jsonl", training.step)
    banks = vae_pictures.banks(cache_dir)
    real = in_size(vae_pictures.sticker_frames(cache_dir, "validation", most=32), SIZE)

    def save():
        with replacing(path) as writing:
            torch.save(dict(training.state(), settings=settings), writing)
        codec = PretrainedVAE(save_vae(training, output_dir / "vae", banks))
        made = codec.decode(codec.encode(torch.from_numpy(real))).numpy()
        with replacing(output_dir / "reconstructions.png") as writing:
            comparison({"": (real, made)}).save(writing, "PNG")
        return psnr(made, real).mean()

    bar = tqdm(desc="training", total=steps, initial=training.step, unit="step")
    losses, started = [], time.monotonic()
    while training.step < steps:
        losses.append(training.take_step(banks, batch_size, steps))
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if time.monotonic() - started > 60 * MINUTES or training.step == steps:
            seconds = (time.monotonic() - started) / len(losses)
            numbers = dict(loss=np.mean(losses), psnr=save(), seconds_per_step=seconds)
            entry = dict(step=training.step, **{name: round(float(x), 4) for name, x in numbers.items()})
            append_log(output_dir / "log.jsonl", entry)
            bar.write(json.dumps(entry))
            losses, started = [], time.monotonic()
    bar.close()


# ------------------------------------------------------------------------------------------------------------
# Measuring


def in_size(frames, size):
    """uint8 (N, R, R, 3) -> (N, size, size, 3), as a sticker of that size is read."""
    return np.stack([on_white(Image.fromarray(frame).convert("RGBA"), size) for frame in frames])


def comparison(sets, most=16):
    """PIL.Image: of each of {label: (real, made)}, uint8 (N, R, R, 3), some real frames above made ones."""
    rows, labels = [], []
    for label, pair in sets.items():
        real, made = zip(*evenly(list(zip(*pair)), most))
        rows += [np.stack(real), np.stack(made)]
        labels += [label, ""]
    return sheet(rows, labels, scale=2 if len(sets) == 1 else 1)


def read_stickers(folder):
    """The middle frame of each sticker of a folder, without those of lab/stickers: uint8 (N, 128, 128, 3), by
    the part of the file name before "_"."""
    known, groups = {path.name for path in vae_pictures.REAL.iterdir()}, defaultdict(list)
    files = [file.path for file in scan_folder(folder)[0] if file.path.name not in known]
    for path in tqdm(files, desc="reading stickers", unit="file"):
        with suppress(MediaError):
            groups[path.stem.split("_")[0]] += list(vae_pictures.clip_frames(path, most=3)[-2:][:1])
    return {name: np.stack(frames) for name, frames in groups.items()}


@torch.no_grad()
def measure(codec, frames):
    """How well `codec`, a PretrainedVAE, gives frames back, uint8 (N, R, R, 3) -> (made, {what: (N,)}).

    PSNR in decibels; "with noise": from latents with a tenth of noise in them, as a sampler may leave;
    "KL": nats per latent; "mean" and "std" of the scaled latents."""
    made, numbers = [], defaultdict(list)
    noise = torch.Generator().manual_seed(0)
    for part in tqdm(torch.from_numpy(frames).split(8), desc="measuring", unit="batch"):
        posterior = codec.vae.encode(part.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        latents = (posterior.mean - codec.shift) * codec.scale
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=noise)
        made.append(codec.decode(latents).numpy())
        numbers["PSNR"].append(psnr(made[-1], part.numpy()))
        numbers["with noise"].append(psnr(codec.decode(noisy).numpy(), part.numpy()))
        numbers["KL"].append(kl_divergence(posterior).expand(len(part)))
        numbers["mean"].append(latents.mean(dim=(1, 2, 3)))
        numbers["std"].append(latents.square().mean(dim=(1, 2, 3)))
    numbers = {name: np.concatenate(parts) for name, parts in numbers.items()}
    return np.concatenate(made), numbers


def evaluate(source, stickers, cache_dir, picture):
    """Measures the VAE in the folder `source`; prints a table, writes a picture."""
    drawn = in_size(vae_pictures.sticker_frames(cache_dir, "validation"), SIZE)
    sets = {f"held-out drawn frames, {SIZE} pixels": drawn}
    if stickers:
        sets |= {f"{name}, 128 pixels": frames for name, frames in read_stickers(stickers).items()}
    codec, rows, pairs, real = PretrainedVAE(source), [], {}, []
    for name, frames in sets.items():
        made, numbers = measure(codec, frames)
        pairs[name] = frames, made
        rows.append([name, len(frames), numbers])
        real += [numbers] if frames is not drawn else []
    if real:
        whole = {name: np.concatenate([numbers[name] for numbers in real]) for name in real[0]}
        rows.append(["all real stickers", len(whole["PSNR"]), whole])
    for row in rows:
        numbers = {name: values.mean() for name, values in row.pop().items()}
        numbers["std"] = (numbers["std"] - numbers["mean"] ** 2) ** 0.5
        row += [f"{x:.2f}" for x in numbers.values()]
    print(table(["", "frames", *numbers], rows))
    weights = sum(weight.numel() for weight in codec.vae.parameters())
    size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) / 1e6
    print(f"{weights:,} parameters, {size:.2f} MB, scaling_factor {codec.scale}")
    with replacing(picture) as writing:
        comparison(pairs).save(writing, "PNG")
    print(f"wrote {printable(picture)}: real frames above what the VAE makes of them")


@one_sentence("lab.train_vae")
def main():
    parser = Parser(description="Train the sticker VAE, or measure one.")
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/vae"), help="a run, begun or new (default %(default)s)")
    add("--steps", type=number(int, 1), default=STEPS, help="how long (default %(default)s)")
    add("--batch_size", type=number(int, 1), default=BATCH, help="pictures a step (default %(default)s)")
    add("--seed", type=SEED, default=0, help="another number, another VAE (default %(default)s)")
    where = "where pictures are kept (default: ~/.cache/rdtf)"
    add("--cache_dir", metavar="DIR", type=Path, help=where)
    add("--evaluate", metavar="DIR", type=filled, help="measure this VAE instead")
    add(
        "--stickers",
        metavar="DIR",
        type=filled,
        help="with --evaluate: a folder of stickers to measure on, too",
    )
    add("--picture", metavar="PNG", default="vae.png", help="with --evaluate (default %(default)s)")
    args = parser.parse_args()
    args.cache_dir = args.cache_dir or default_cache()
    if args.evaluate:
        check_png("--picture", args.picture)
        evaluate(args.evaluate, args.stickers, args.cache_dir, args.picture)
        return
    with output_lock(args.output_dir):
        train(args.output_dir, args.cache_dir, args.steps, args.batch_size, args.seed)
    print(f"the VAE is in {printable(args.output_dir / 'vae')}")


if __name__ == "__main__":
    main()
