"""
Animated stickers from a trained model: DDIM with text and image guidance (Table 6), every task from one set
of weights.

    # text, with the newest run under runs/, else the model that ships; then with a folder or a hub id
    python sample.py --prompt "a red heart bouncing"
    python sample.py --checkpoint runs/mine --prompt "a red heart bouncing" --output heart.gif
    # text and image
    python sample.py --checkpoint runs/mine --image 0:first.png --prompt "..." --output a.webp
    # interpolation; between two pictures
    python sample.py --checkpoint runs/mine --image 0:a.png 3:b.png 6:c.png --output b.gif
    python sample.py --checkpoint runs/mine --image 0:a.png 3:b.png --num_frames 4 --output b.gif
    # prediction
    python sample.py --checkpoint runs/mine --image 0:a.png 1:b.png 2:c.png 3:d.png 4:e.png --output c.mp4
    # longer, smoother, without an end, without its ground, for a messenger
    python sample.py --prompt "a red heart bouncing" --num_frames 20
    python sample.py --prompt "a red heart bouncing" --interpolate 2 --loop --transparent --output heart.webp
    python sample.py --prompt "a red heart bouncing" --for telegram
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import masks
from model import DFGN, make_scheduler
from support import machine, outputs
from support.common import UserError, one_sentence
from support.finished import MAX_SCALE, MAX_STEPS, CheckpointError, find_model, read_model
from support.flags import SEED, Parser, number, part_flags
from support.machine import native_precision, precision, prepare, to_device
from support.messenger import PLATFORMS
from support.pictures import sheet
from support.prior import first_latents, for_sampling, precondition
from support.ring import Ring
from support.workers import read_picture

SAMPLING = "guidance_scale", "image_guidance_scale", "num_inference_steps"  # a model records its own
SHEET_STEPS = 25  # of DDIM, for the sheets of a training
BETWEEN = dict(eta=0.0, guidance_scale=1.0, image_guidance_scale=1.0)  # for frames that lie between others
MAX_FRAMES = 200
FPS = 8

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


def guided_noise(denoiser, noisy, latents, given, timestep, text, null_text, weights):
    """Sums the noise predictions as `guidance_weights` says; all conditions of a step go through the network
    as one batch. Given frames are not guided: they are known, and would be pushed away from what they are.

    noisy, latents, given: as DFGN.forward takes them; timestep: int; text, null_text: as DFGN.forward takes
    them, of equal lengths. Returns float32 (B, F, C, h, w).
    """
    n = len(weights)
    texts = [text if with_text else null_text for _, with_text in weights]
    batch_text = tuple(torch.cat(parts) for parts in zip(*texts))
    batch_given = torch.cat([given & with_image for with_image, _ in weights])
    timesteps = torch.full((n * len(noisy),), int(timestep), device=noisy.device)
    noisy, latents = noisy.repeat(n, 1, 1, 1, 1), latents.repeat(n, 1, 1, 1, 1)
    noise = denoiser(noisy, latents, batch_given, timesteps, batch_text).float().chunk(n)
    guided = sum(weight * e for weight, e in zip(weights.values(), noise))
    known = to_device(given, guided.device)[:, :, None, None, None]
    return torch.where(known, noise[-1], guided)  # the last condition shows most


def ddim_step(x, noise, alpha, next_alpha, eta, fresh):
    """One step of DDIM (Song et al. 2021, Eq. 12 and 16) from the noise level `alpha` to `next_alpha`, as in
    scheduler.alphas_cumprod. fresh: standard normal noise, which eta scales. Returns the next x and the
    estimate of the clean latents. diffusers' own step takes t - 1000 // steps for the next t, which is not
    the next one in its list where the number of steps does not divide 1000."""
    clean = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sigma = eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)) ** 0.5
    return next_alpha**0.5 * clean + (1 - next_alpha - sigma**2) ** 0.5 * noise + sigma * fresh, clean


@torch.no_grad()
def generate_latents(
    denoiser,
    encoders,
    prompts,  # B strings; "" leaves the text out
    latents,  # (B, F, C, h, w), of which those of given frames are looked at
    given,  # bool (B, F); all False = from text alone
    negative_prompt="",  # in the place of the empty text
    num_inference_steps=50,
    eta=1.0,  # 0 = deterministic DDIM, 1 = as much fresh noise as DDPM
    guidance_scale=7.5,
    image_guidance_scale=7.5,
    seed=0,
    mixed_precision="no",
    progress=False,
    window=0,  # of a longer sticker: other noise
    loop=False,  # the last frame runs into the first; F may be more than 8
):
    """Samples B clips of F frames, 3 <= F <= 8, of a loop also more. Returns float32 (B, F, C, h, w), given
    frames as the network redrew them.

    Every task of Table 7 is a choice of `given`. Sample b of a seed is the same whatever the batch.
    """
    denoiser = for_sampling(denoiser)
    batch, shape, device = len(prompts), latents.shape[1:], denoiser.device
    latents, given = to_device(latents, device), given.cpu()
    states = encoders.text(list(prompts) + [negative_prompt] * batch, device)
    text, null_text = zip(*(x.split(batch) for x in states))
    has_text = any(prompt != negative_prompt for prompt in prompts)
    weights = guidance_weights(bool(given.any()), has_text, image_guidance_scale, guidance_scale)

    def draw_noise(step):  # for each sample by itself: (seed, step, index), and the window
        draws = [np.random.default_rng((seed, step, b, window)) for b in range(batch)]
        noise = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in draws])
        return to_device(torch.from_numpy(noise), device)

    scheduler = make_scheduler()
    scheduler.set_timesteps(num_inference_steps)
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]
    noise, clip_noise = draw_noise(0), draw_noise(num_inference_steps + 1)  # x_T's, and of a prior's draw
    x = first_latents(denoiser, scheduler, noise, clip_noise, latents, given, text)
    denoiser = Ring(denoiser, masks.NUM_FRAMES, seed) if loop else denoiser
    for step, t in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress), start=1):
        with precision(device.type, mixed_precision):
            noise = guided_noise(denoiser, x, latents, given, t, text, null_text, weights)
        fresh = draw_noise(step) if eta > 0 else 0.0
        x, clean = ddim_step(x, noise, *alphas[step - 1 : step + 1], eta, fresh)
    return clean  # x ends at alpha_1 and still holds some noise


# ------------------------------------------------------------------------------------------------------------
# Any number of frames, from the same weights


class Window(NamedTuple):
    """Frames of a sticker that the network draws together: at most 8, but for a loop."""

    frames: list  # their numbers, in time
    between: bool = False  # whether what is drawn lies between frames that are there


def count_frames(num_frames, interpolate=1, loop=False):
    """Frames of a sticker of `num_frames` after interpolation; a loop has some after the last one, too."""
    return num_frames * interpolate if loop else (num_frames - 1) * interpolate + 1


def windows(num_frames, interpolate=1, loop=False):
    """The Windows of a sticker, in the order in which they are drawn; each is given what is there already.

    First the row of Table 7 that the user gives; then row G1 again and again, from the last frame on. A loop
    is one window. interpolate: rows I2 (2) and I3 (3), cut at 7, where both begin and end with a given frame.
    So windows(20) are frames 0-7, 7-14 and 14-19; windows(8, 2) are 0, 2 ... 14, then 0-6, 6-12 and 12-14.
    """
    n, i, total = num_frames, interpolate, count_frames(num_frames, interpolate, loop)
    ends = [*range(masks.NUM_FRAMES, n, masks.NUM_FRAMES - 1), n] if not loop else [n]
    if ends[-1] - 1 in ends:  # two frames are too few for the last window: it takes one of those before
        ends[-2] -= 1
    coarse = [range(start, end) for start, end in zip([0, *(end - 1 for end in ends)], ends)]
    plan = [Window([f * i for f in frames]) for frames in coarse]
    last = total if loop else total - 1  # in a loop frame 0 comes after the last one, too
    step = 6  # from the first given frame of I2 and I3 at k = 7 to their last
    for start in range(0, last, step) if i > 1 else ():
        plan.append(Window([f % total for f in range(start, min(start + step, last) + 1)], between=True))
    return plan


def generate(denoiser, encoders, prompts, latents, given, interpolate=1, loop=False, **settings):
    """Samples B stickers of F frames, F >= 3, window by window.

    latents, given: as generate_latents takes them; interpolate: 2 or 3 times as many frames, the network
    draws those between; loop: the last frame runs into the first; settings: of generate_latents, too.
    Returns frames uint8 (B, T, R, R, 3) with T of count_frames(F, interpolate, loop).
    """
    batch, num_frames = given.shape
    total = count_frames(num_frames, interpolate, loop)
    asked = slice(0, num_frames * interpolate, interpolate)
    clip = torch.zeros(batch, total, *latents.shape[2:])  # (B, T, C, h, w)
    shown = torch.zeros(batch, total, dtype=torch.bool)
    clip[:, asked], shown[:, asked] = latents.cpu(), given.cpu()
    done = torch.zeros(total, dtype=torch.bool)
    for i, (frames, between) in enumerate(windows(num_frames, interpolate, loop)):
        known = shown[:, frames] | done[frames]  # (B, frames of the window)
        if not known.all():  # some frame is left to draw
            options = settings | dict(window=i) | (BETWEEN if between else dict(loop=loop))
            drawn = generate_latents(denoiser, encoders, prompts, clip[:, frames], known, **options).cpu()
            new = ~done[frames]  # given pictures, too: as the network redrew them
            clip[:, torch.tensor(frames)[new]] = drawn[:, new]
        done[frames] = True
    frames = encoders.codec.decode(clip.flatten(0, 1).to(denoiser.device))
    return frames.unflatten(0, clip.shape[:2]).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# The model, and what it starts from


def nothing_given(encoders, resolution, batch, num_frames=masks.NUM_FRAMES):
    """latents (B, F, C, h, w) and given (B, F) of clips without given frames."""
    side = resolution // encoders.codec.factor
    latents = torch.zeros(batch, num_frames, encoders.codec.latent_channels, side, side)
    return latents, torch.zeros(batch, num_frames, dtype=torch.bool)


def given_pictures(encoders, resolution, pictures, batch, num_frames=masks.NUM_FRAMES):
    """The same of clips that show pictures, {slot: uint8 (R, R, 3)}."""
    latents, given = nothing_given(encoders, resolution, batch, num_frames)
    for slot, picture in pictures.items():
        latents[:, slot] = encoders.codec.encode(torch.from_numpy(picture)[None])[0].cpu()
        given[:, slot] = True
    return latents, given


def load(checkpoint, device="cpu", vae=None, clip=None, t5=None):
    """The model in a finished run, one of its checkpoint-N folders, or a hub id.
    vae, clip, t5: where the pre-trained parts are now, if not where the run recorded them.

    Returns (denoiser, encoders, settings), settings being the content of model_index.json: what `generate`
    takes, and the scales it was trained for; its precision, where this machine has it. Raises
    CheckpointError.
    """
    unet, encoders, settings = read_model(checkpoint, DFGN, device, vae, clip, t5)
    if encoders.prior is not None and encoders.prior.lengths != masks.LENGTHS:
        raise CheckpointError(
            f"--checkpoint {checkpoint} cannot be read: its prior is for other clip lengths."
        )
    settings["mixed_precision"] = native_precision(settings["mixed_precision"])
    prepare(unet.eval(), device)
    return precondition(unet, encoders.prior, make_scheduler().alphas_cumprod), encoders, settings


def validation_sheet(denoiser, encoders, dataset, clips, prompts, args):
    """Samples the sheet: for held-out clips the real frames above interpolated, predicted and image-to-video
    ones (given frames outlined), then a row per prompt. Returns (PIL.Image, {prompt: frames})."""
    names = ("seed", "mixed_precision", "guidance_scale", "image_guidance_scale")
    settings = {name: getattr(args, name) for name in names} | dict(num_inference_steps=SHEET_STEPS)
    rows, labels, marks = [], [], []
    tasks = dict(I3="interpolation", P1="prediction", G1="image and text to video")
    tasks = tasks if args.ddu in masks.CONDITION_MASK_ON else dict(G1=tasks["G1"])
    candidates = [clip for clip in clips if clip.longest == masks.NUM_FRAMES] or clips
    for i, (name, task) in enumerate(tasks.items()):
        row = masks.ROWS[name]
        clip = candidates[i % len(candidates)] if candidates else None
        if clip is None or row not in masks.admissible_rows(row.task, clip.longest):
            continue
        latents = torch.from_numpy(dataset.read(clip, clip.longest))  # (k, C, h, w)
        given = torch.from_numpy(masks.condition_mask(row, clip.longest)[: clip.longest])
        frames = generate(denoiser, encoders, [clip.caption], latents[None], given[None], **settings)[0]
        rows += [encoders.codec.decode(latents.to(denoiser.device)).cpu().numpy(), frames]
        labels += [f"real: {clip.caption or clip.name}", f"{task} ({name})"]
        marks += [[False] * clip.longest, given.tolist()]

    samples = {}
    if prompts:
        nothing = nothing_given(encoders, args.resolution, len(prompts))
        samples = dict(zip(prompts, generate(denoiser, encoders, prompts, *nothing, **settings)))
        rows += samples.values()
        labels += samples.keys()
        marks += [[False] * masks.NUM_FRAMES] * len(samples)
    return sheet(rows, labels, marks=marks), samples


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_image(text):
    """ "3:a.png" -> (3, "a.png")"""
    slot, colon, file = text.partition(":")
    if not colon or not slot.isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not SLOT:FILE, for example 0:first.png")
    return int(slot), file


def parse_args():
    parser = Parser(description="Generate, interpolate and extend animated stickers.")
    add, default = parser.add_argument, "(default: %(default)s)"
    scale, frames = number(float, -MAX_SCALE, MAX_SCALE), number(int, masks.LENGTHS[0], MAX_FRAMES)
    add(
        "--checkpoint",
        metavar="DIR_OR_ID",
        help="a finished run, a checkpoint-N folder in it, or a hub id (default: the newest run under runs/, "
        "else the model that ships)",
    )
    part_flags(add, vae="what the checkpoint records", text="what the checkpoint records")
    add("--prompt", default="", help="what the sticker shows")
    add("--negative_prompt", default="", help="what it should not show")
    add(
        "--image",
        nargs="+",
        action="extend",
        type=parse_image,
        default=[],
        metavar="SLOT:FILE",
        help="given frames: picture files and the frames, counted from 0, where they stand",
    )
    more = f"frames of the sticker; beyond {masks.NUM_FRAMES} it goes on from its last frame {default}"
    add("--num_frames", type=frames, default=masks.NUM_FRAMES, help=more)
    between = "times as many frames in the same time: the network draws those between"
    add("--interpolate", type=int, choices=(2, 3), default=1, help=between)
    add("--loop", action="store_true", help="let the end run into the beginning")
    add("--eta", type=number(float, 0, 1), default=1.0, help=f"0: deterministic, 1: as DDPM {default}")
    recorded = "(default: what the checkpoint records)"
    add("--num_inference_steps", type=number(int, 1, MAX_STEPS), help=f"DDIM steps {recorded}")
    add("--guidance_scale", type=scale, help=f"text guidance; 1 = none {recorded}")
    add("--image_guidance_scale", type=scale, help=f"guidance by given frames; 1 = none {recorded}")
    add("--seed", type=SEED, default=0, help=f"another seed, another sticker {default}")
    add("--num_samples", type=number(int, 1, 1000), default=1, help=f"stickers to make {default}")
    per_second = f"frames per second of the file (default: {FPS}, times --interpolate)"
    add("--fps", type=number(float, 0.1, 1000), help=per_second)
    add("--transparent", action="store_true", help="the figure alone, without the white ground around it")
    demands = "a file within this messenger's limits, transparent"
    add("--for", dest="messenger", choices=PLATFORMS, help=demands)
    add(
        "--output",
        type=Path,
        help=".gif, .webp, .apng, .mp4, .webm, or .png for a sheet (default: sticker.gif, or what --for "
        "demands); several samples get numbered names, or a row each of the sheet",
    )
    args = parser.parse_args()
    args.fps = args.fps or FPS * args.interpolate
    args.output = args.output or outputs.default_name(args.messenger)
    check_args(args)
    return args


def check_args(args):
    """Raises UserError for flags that do not fit together."""
    slots = [slot for slot, _ in args.image]
    for slot, file in args.image:
        if slot >= args.num_frames:
            raise UserError(
                f"--image {slot}:{file}: with --num_frames {args.num_frames} the frames are 0 to "
                f"{args.num_frames - 1}."
            )
    if len(set(slots)) < len(slots):
        raise UserError(
            f"--image gives frame {max(slots, key=slots.count)} more than once: one picture per frame."
        )
    if not args.prompt and not args.image:
        raise UserError("nothing to start from: give --prompt, --image, or both.")
    if len(slots) == args.num_frames and args.interpolate == 1:
        raise UserError("--image gives every frame: leave one out to be drawn, or add --interpolate 2.")
    outputs.check(args)


@one_sentence("sample.py")
def main():
    args = parse_args()
    if args.checkpoint is None:
        args.checkpoint, which = find_model()
        print(f"{which}: {args.checkpoint}")
    denoiser, encoders, settings = load(args.checkpoint, machine.device(), args.vae, args.clip, args.t5)
    pictures = {slot: read_picture(file, settings["resolution"]) for slot, file in args.image}
    first = min(len(windows(args.num_frames, loop=args.loop)[0].frames), masks.NUM_FRAMES)
    if 0 < len(pictures) < first and not masks.is_trained(pictures, first):
        print(
            f"sample.py: warning: no row of Table 7 shows frames {sorted(pictures)} of {args.num_frames}: "
            "the model was not trained on this pattern and may do worse.",
            file=sys.stderr,
        )

    chosen = dict(seed=args.seed, mixed_precision=settings["mixed_precision"], eta=args.eta)
    for name in SAMPLING:
        chosen[name] = settings[name] if getattr(args, name) is None else getattr(args, name)

    prompts = [args.prompt] * args.num_samples
    latents, given = given_pictures(encoders, settings["resolution"], pictures, len(prompts), args.num_frames)
    chosen |= dict(negative_prompt=args.negative_prompt, interpolate=args.interpolate, loop=args.loop)
    clips = generate(denoiser, encoders, prompts, latents, given, **chosen, progress=True)  # (n, T, R, R, 3)
    marks = torch.zeros(clips.shape[1], dtype=torch.bool)
    marks[:: args.interpolate] = given[0]
    outputs.write(args, clips, marks)


if __name__ == "__main__":
    main()
