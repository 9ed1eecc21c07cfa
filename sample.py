"""
Animated stickers from a trained checkpoint: DDIM with text and image guidance (Table 6),
every task from one set of weights.

    # text
    python sample.py --checkpoint runs/mine --prompt "a red heart bouncing" --output heart.gif
    # text and image
    python sample.py --checkpoint runs/mine --image 0:first.png --prompt "..." --output a.webp
    # interpolation
    python sample.py --checkpoint runs/mine --image 0:a.png 3:b.png 6:c.png --output b.gif
    # between two
    python sample.py --checkpoint runs/mine --image 0:a.png 3:b.png --num_frames 4 --output b.gif
    # prediction
    python sample.py --checkpoint runs/mine --image 0:a.png 1:b.png 2:c.png 3:d.png 4:e.png --output c.mp4
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import masks
from model import DFGN, make_scheduler
from support import media
from support.common import UserError
from support.encoders import EncoderError, Encoders, check_size
from support.machine import DTYPES, precision
from support.workers import read_picture

# ------------------------------------------------------------------------------------------------------------
# Diffusion


def guidance_weights(has_image, has_text, image_guidance_scale, guidance_scale):
    """The weights with which the noise predictions under different conditions are summed. Nested guidance,
    Eq. 3 of InstructPix2Pix, with s_I and s_T the two scales, z the given frames, y the text:

        e(0, 0) + s_I (e(z, 0) - e(0, 0)) + s_T (e(z, y) - e(z, 0))

    Returns {(with image, with text): weight}. Conditions that coincide are merged and those of weight zero
    left out: equal scales need two passes instead of three, scales of one a single pass, and without given
    frames the text term is left.
    """
    s_I, s_T = image_guidance_scale, guidance_scale
    weights = {}
    for image, text, weight in ((False, False, 1 - s_I), (True, False, s_I - s_T), (True, True, s_T)):
        key = (image and has_image, text and has_text)
        weights[key] = weights.get(key, 0.0) + weight
    return {key: weight for key, weight in weights.items() if abs(weight) > 1e-9}


def guided_noise(unet, noisy, given, timestep, text, null_text, weights):
    """Sums the noise predictions as `guidance_weights` says;
    all conditions of a step go through the network as one batch.

    noisy, given: (B, F, C, h, w); timestep: int; text, null_text: as DFGN.forward takes them, of equal
        lengths
    Returns float32 (B, F, C, h, w).
    """
    n = len(weights)
    texts = [text if with_text else null_text for _, with_text in weights]
    batch_text = tuple(torch.cat(parts) for parts in zip(*texts))
    batch_given = torch.cat([given if with_image else torch.zeros_like(given) for with_image, _ in weights])
    timesteps = torch.full((n * len(noisy),), int(timestep), device=noisy.device)
    noise = unet(noisy.repeat(n, 1, 1, 1, 1), batch_given, timesteps, batch_text).float()
    return sum(weight * e for weight, e in zip(weights.values(), noise.chunk(n)))


@torch.no_grad()
def generate(
    unet,
    encoders,
    prompts,  # B strings; "" leaves the text out
    given_latents,  # (B, F, C, h, w) latents of the given frames; what stands in other slots is ignored
    is_given,  # bool (B, F); all False = from text alone
    negative_prompt="",  # in the place of the empty text
    num_inference_steps=50,
    eta=1.0,  # 0 = deterministic DDIM, 1 = as much fresh noise as DDPM
    guidance_scale=7.5,
    image_guidance_scale=7.5,
    seed=0,
    mixed_precision="no",
    progress=False,
):
    """Samples B clips of F frames, 3 <= F <= 8.
    Returns frames uint8 (B, F, R, R, 3), given frames as the network redrew them.

    Every task of Table 7 is a choice of `is_given`. Sample b of a seed is the same whatever the batch.
    """
    batch, shape, device = len(prompts), given_latents.shape[1:], unet.device
    given = (given_latents * is_given[:, :, None, None, None]).to(device)  # (B, F, C, h, w)
    states = encoders.text(list(prompts) + [negative_prompt] * batch, device)
    text, null_text = (tuple(x[half] for x in states) for half in (slice(batch), slice(batch, None)))
    has_text = any(prompt != negative_prompt for prompt in prompts)
    weights = guidance_weights(bool(is_given.any()), has_text, image_guidance_scale, guidance_scale)

    def draw_noise(step):  # for each sample by itself: (seed, step, index)
        noise = [
            np.random.default_rng((seed, step, b)).standard_normal(shape, dtype=np.float32)
            for b in range(batch)
        ]
        return torch.from_numpy(np.stack(noise)).to(device)

    scheduler = make_scheduler()
    scheduler.set_timesteps(num_inference_steps)
    latents = draw_noise(0)
    if unet.config.prior_side is not None:
        # Even the noisiest step shows the strongest modes of a clip, its colour above all: with noise alone the network
        # would see those of no clip in particular.
        clean = unet.prior.draw(draw_noise(num_inference_steps + 1), given, text)
        latents = scheduler.add_noise(clean, latents, scheduler.timesteps[:1])
    for step, t in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress), start=1):
        with precision(device.type, mixed_precision):
            noise = guided_noise(unet, latents, given, t, text, null_text, weights)
        fresh = draw_noise(step) if eta > 0 else None
        stepped = scheduler.step(noise, t, latents, eta=eta, variance_noise=fresh)
        latents = stepped.prev_sample
    clean = stepped.pred_original_sample  # prev_sample ends at alpha_1 and still holds some noise
    return encoders.codec.decode(clean.flatten(0, 1)).unflatten(0, clean.shape[:2]).cpu().numpy()


def validation_sheet(unet, encoders, dataset, clips, prompts, args):
    """Samples the sheet: for held-out clips the real frames above interpolated, predicted and image-to-video
    ones (given frames framed), then a row per prompt. Returns (PIL.Image, {prompt: frames})."""
    settings = dict(
        seed=args.seed,
        mixed_precision=args.mixed_precision,
        image_guidance_scale=args.image_guidance_scale,
        guidance_scale=args.guidance_scale,
    )
    rows, labels, marks = [], [], []
    tasks = (
        [("interpolation", "I3"), ("prediction", "P1"), ("image and text to video", "G1")] if args.ddu else []
    )
    for i, (task, name) in enumerate(tasks):
        row = next(row for row in masks.TABLE7 if row.name == name)
        candidates = [clip for clip in clips if clip.longest == masks.NUM_FRAMES] or clips
        if not candidates:
            continue
        clip = candidates[i % len(candidates)]
        k = clip.longest
        if row not in masks.admissible_rows(row.task, k):
            continue
        latents = torch.from_numpy(dataset.read(clip, k))  # (k, C, h, w)
        given = torch.from_numpy(masks.condition_mask(row, k)[:k])
        frames = generate(unet, encoders, [clip.caption], latents[None], given[None], **settings)[0]
        rows += [encoders.codec.decode(latents.to(unet.device)).cpu().numpy(), frames]
        labels += [f"real: {clip.caption or clip.name}", f"{task} ({name})"]
        marks += [[False] * k, given.tolist()]

    samples = {}
    if prompts:
        side = args.resolution // encoders.codec.factor
        nothing = torch.zeros(len(prompts), masks.NUM_FRAMES, encoders.codec.latent_channels, side, side)
        none_given = torch.zeros(len(prompts), masks.NUM_FRAMES, dtype=torch.bool)
        samples = dict(zip(prompts, generate(unet, encoders, prompts, nothing, none_given, **settings)))
        rows += samples.values()
        labels += samples.keys()
        marks += [[False] * masks.NUM_FRAMES] * len(samples)
    return media.sheet(rows, labels, marks=marks), samples


# ------------------------------------------------------------------------------------------------------------
# The finished folder


MAX_SCALE = 1000  # of guidance: beyond it nothing is left of a picture


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in one sentence."""


def check_settings(settings):
    """Raises ValueError, KeyError or TypeError unless the content of model_index.json can be sampled with."""
    if not (type(settings["resolution"]) is int and 8 <= settings["resolution"] <= media.MAX_SIDE):
        raise ValueError(f"model_index.json says resolution = {settings['resolution']}")
    if settings["mixed_precision"] not in DTYPES:
        raise ValueError(f"model_index.json says mixed_precision = {settings['mixed_precision']}")
    for name in ("guidance_scale", "image_guidance_scale"):
        if not abs(settings[name]) < MAX_SCALE:
            raise ValueError(f"model_index.json says {name} = {settings[name]}")


def check_sides(resolution, codec, prior_side):
    """Raises ValueError unless frames of that resolution have latents, and latents the side that the U-Net expects."""
    side, rest = divmod(resolution, codec.factor)
    if rest or side < 1 or prior_side not in (None, side):
        raise ValueError(
            f"model_index.json says resolution = {resolution}, which its codec or U-Net is not made for"
        )


def load(folder, device="cpu", vae=None, clip=None, t5=None):
    """Reads a finished run or one of its checkpoint-N folders; EMA weights where there are any.
    vae, clip, t5: where the pre-trained parts are now, if not where the run recorded them.

    Returns (unet, encoders, settings), settings being the content of model_index.json.
    Raises CheckpointError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"--checkpoint {folder} is not a folder: give the output_dir of a training run."
        )
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"--checkpoint {folder} holds no model_index.json: give the output_dir of a finished "
            "training run, or a checkpoint-N folder inside it."
        )
    part = folder / ("unet_ema" if (folder / "unet_ema").is_dir() else "unet")
    try:
        settings = json.loads((folder / "model_index.json").read_text())
        check_settings(settings)
        config = DFGN.load_config(part)
        if config.get("_class_name") != "DFGN":
            raise ValueError(f"its U-Net is a {config.get('_class_name')}, not a DFGN")
        check_size(part, lambda part: DFGN.from_config(config))
        unet = DFGN.from_pretrained(part, low_cpu_mem_usage=False, use_safetensors=True)
        named = dict(vae=vae, clip=clip, t5=t5)
        sources = settings | {name: source for name, source in named.items() if source}
        encoders = Encoders.load(folder, sources, device)
        check_sides(settings["resolution"], encoders.codec, unet.config.prior_side)
    except EncoderError as error:
        raise CheckpointError(str(error)) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        SafetensorError,
    ) as error:  # missing, damaged, of another size, or from elsewhere
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"--checkpoint {folder} cannot be read, use another one ({reason}).") from error
    for what, wanted, found in (
        ("latent channels", unet.config.latent_channels, encoders.codec.latent_channels),
        ("CLIP channels", unet.config.clip_dim, encoders.clip.width),
        ("T5 channels", unet.config.t5_dim, encoders.t5.width),
    ):
        if wanted != found:
            raise CheckpointError(
                f"--checkpoint {folder}: its U-Net works on {wanted} {what}, its encoders give {found}: "
                "the parts are of different models."
            )
    return unet.eval().to(device, memory_format=torch.channels_last), encoders, settings


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_image(text):
    """ "3:a.png" -> (3, "a.png")"""
    slot, colon, file = text.partition(":")
    if not colon or not slot.isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not SLOT:FILE, for example 0:first.png")
    return int(slot), file


def parse_args():
    parser = argparse.ArgumentParser(description="Generate, interpolate and extend animated stickers.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a finished run, or a checkpoint-N folder in it"
    )
    for name, what in (("vae", "AutoencoderKL"), ("clip", "CLIP text model"), ("t5", "T5 encoder")):
        parser.add_argument(
            f"--{name}", metavar="DIR_OR_ID", help=f"{what} (default: what the checkpoint records)"
        )
    parser.add_argument("--prompt", default="", help="what the sticker shows")
    parser.add_argument("--negative_prompt", default="", help="what it should not show")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        type=parse_image,
        default=[],
        metavar="SLOT:FILE",
        help="given frames: picture files and the frames, counted from 0, where they stand",
    )
    parser.add_argument(
        "--num_frames", type=int, default=masks.NUM_FRAMES, help="frames of the sticker, 3 to 8 (default 8)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument(
        "--eta", type=float, default=1.0, help="0 = deterministic, 1 = as random as DDPM (default 1)"
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="text guidance; 1 = none (default: as the checkpoint records)"
    )
    parser.add_argument(
        "--image_guidance_scale",
        type=float,
        help="guidance by given frames; 1 = none (default: as the checkpoint records)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sticker (default 0)")
    parser.add_argument("--num_samples", type=int, default=1, help="stickers to make (default 1)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of the file (default 8)")
    parser.add_argument(
        "--output",
        default="sticker.gif",
        help=".gif, .webp, .mp4, or .png for a sheet "
        "(default sticker.gif); several samples get numbered names, "
        "or one row each of the sheet",
    )
    args = parser.parse_args()

    slots = [slot for slot, _ in args.image]
    if not 3 <= args.num_frames <= masks.NUM_FRAMES:
        parser.error(f"--num_frames {args.num_frames}: stickers have 3 to {masks.NUM_FRAMES} frames.")
    for slot, file in args.image:
        if slot >= args.num_frames:
            parser.error(
                f"--image {slot}:{file}: with --num_frames {args.num_frames} "
                f"the frames are 0 to {args.num_frames - 1}."
            )
    if len(set(slots)) < len(slots):
        parser.error(
            f"--image gives frame {max(slots, key=slots.count)} more than once: one picture per frame."
        )
    if not args.prompt and not args.image:
        parser.error("nothing to start from: give --prompt, --image, or both.")
    if not 1 <= args.num_inference_steps <= 1000:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: must lie in 1..1000.")
    if args.num_samples < 1 or args.seed < 0:
        parser.error("--num_samples must be positive, and --seed not negative.")
    if not 0.1 <= args.fps <= 1000:
        parser.error(f"--fps {args.fps}: must lie in 0.1..1000.")
    if not 0 <= args.eta <= 1:
        parser.error(f"--eta {args.eta}: must lie in 0..1.")
    for name in ("guidance_scale", "image_guidance_scale"):
        if not abs(getattr(args, name) or 0) < MAX_SCALE:
            parser.error(f"--{name} {getattr(args, name)}: must lie within -{MAX_SCALE}..{MAX_SCALE}.")
    try:
        media.check_suffix(args.output)
    except media.MediaError as error:
        parser.error(str(error))
    return parser, args


def main():
    parser, args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        unet, encoders, settings = load(args.checkpoint, device, args.vae, args.clip, args.t5)
        resolution = settings["resolution"]
        pictures = {slot: read_picture(file, resolution) for slot, file in args.image}
    except (CheckpointError, media.MediaError) as error:
        parser.error(str(error))
    if pictures and not masks.is_trained(pictures, args.num_frames):
        print(
            f"sample.py: warning: no row of Table 7 shows frames {sorted(pictures)} of {args.num_frames}: "
            "the model was not trained on this pattern and may do worse.",
            file=sys.stderr,
        )

    side = resolution // encoders.codec.factor
    given = torch.zeros(args.num_frames, encoders.codec.latent_channels, side, side)
    is_given = torch.zeros(args.num_frames, dtype=torch.bool)
    for slot, picture in pictures.items():
        given[slot] = encoders.codec.encode(torch.from_numpy(picture)[None])[0].cpu()
        is_given[slot] = True

    def or_recorded(name):
        return settings[name] if getattr(args, name) is None else getattr(args, name)

    clips = generate(
        unet,
        encoders,
        [args.prompt] * args.num_samples,
        given.expand(args.num_samples, -1, -1, -1, -1),
        is_given.expand(args.num_samples, -1),
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.num_inference_steps,
        eta=args.eta,
        guidance_scale=or_recorded("guidance_scale"),
        image_guidance_scale=or_recorded("image_guidance_scale"),
        seed=args.seed,
        mixed_precision=settings["mixed_precision"],
        progress=True,
    )  # (num_samples, F, R, R, 3)

    output = Path(args.output)
    try:
        if output.suffix.lower() == ".png" and len(clips) > 1:
            output.parent.mkdir(parents=True, exist_ok=True)
            media.sheet(list(clips), marks=[is_given.tolist()] * len(clips)).save(output)
            written = [output]
        else:
            names = (
                [output]
                if len(clips) == 1
                else [output.with_stem(f"{output.stem}-{i}") for i in range(len(clips))]
            )
            for name, clip in zip(names, clips):
                media.write_clip(name, clip, args.fps)
            written = names
    except media.MediaError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {output} cannot be written: {error.strerror or error}.")
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
