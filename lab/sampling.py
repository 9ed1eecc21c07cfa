"""
What an evaluation samples: every item of the test list by the network, several times where samples are
compared with a truth, and by the Gaussian that a preconditioned network starts from.

All of it lies in a folder, a file per batch, whole or not at all: an interrupted call goes on where it
stopped.
"""

import json
import sys
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import sample
from lab.heldout import cached_npz
from lab.items import FIDELITY, given_frames
from masks import NUM_FRAMES
from support.common import UserError, replacing

ANOTHER = 1_000_000  # between the seeds of two samples of the same item


def open_items(output_dir, identity):
    """The folder of samples and losses. What lies there must come from the same weights, data and settings:
    otherwise UserError names the first difference."""
    folder, label = output_dir / "items", output_dir / "settings.json"
    now = json.loads(json.dumps(identity))
    before = json.loads(label.read_text()) if label.is_file() else now
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            found = f"holds an evaluation with another {name}"
            raise UserError(f"--output_dir {output_dir} {found}: give another one, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    with replacing(label) as writing:
        writing.write_text(json.dumps(now, indent=1))
    return folder


def sampler_settings(task, args, recorded):
    """What `generate` is called with for a task: flags where given, else the recorded scales and eta 1; for
    interpolation and prediction no guidance, eta 0 and half of the steps, which costs them nothing."""
    settings = dict(eta=1.0, **{name: recorded[name] for name in ("guidance_scale", "image_guidance_scale")})
    if task in FIDELITY:
        settings = dict(eta=0.0, guidance_scale=1.0, image_guidance_scale=1.0)
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    steps = args.num_inference_steps
    return dict(settings | given, num_inference_steps=max(1, steps // 2) if task in FIDELITY else steps)


def in_batches(items, size):
    """[(task, indices of at most `size` items of this task)]"""
    tasks = {task: [i for i, item in enumerate(items) if item.task == task] for task, *_ in items}
    return [(task, mine[i : i + size]) for task, mine in tasks.items() for i in range(0, len(mine), size)]


@torch.no_grad()
def draw_gaussian(encoders, prompts, latents, given, seed=None):
    """Clips of the Gaussian alone, and without a seed its best guess, the mean given captions and frames.
    latents (B, 8, C, h, w), given bool (B, 8) -> uint8 (B, 8, R, R, 3)"""
    device, noise = encoders.prior.device, torch.zeros_like(latents)
    if seed is not None:
        draws = np.random.default_rng((seed, 79)).standard_normal(latents.shape, dtype=np.float32)
        noise = torch.from_numpy(draws)
    text = encoders.text(prompts, device)
    clean = encoders.prior.draw(noise.to(device), latents.to(device), given, text)
    return encoders.codec.decode(clean.flatten(0, 1)).unflatten(0, clean.shape[:2]).cpu().numpy()


def sampling_jobs(model, dataset, items, args):
    """Everything to sample: [(rival, indices of items, name of the file, function that gives the clips)]."""
    denoiser, encoders, recorded = model
    by_name, jobs = {clip.name: clip for clip in dataset.clips}, []

    def inputs(batch):
        latents, _ = sample.nothing_given(encoders, recorded["resolution"], len(batch))
        given = torch.from_numpy(np.stack([given_frames(items[i]) for i in batch]))  # (B, 8)
        for b, i in enumerate(batch):
            if given[b].any():
                latents[b] = torch.from_numpy(dataset.read(by_name[items[i].clip], NUM_FRAMES))
        return [items[i].prompt for i in batch], latents, given

    def by_network(task, batch, seed):
        settings = sampler_settings(task, args, recorded)
        settings |= dict(mixed_precision=recorded["mixed_precision"], progress=sys.stderr.isatty())
        return sample.generate(denoiser, encoders, *inputs(batch), **settings, seed=seed)

    def by_gaussian(batch, seed):
        return draw_gaussian(encoders, *inputs(batch), seed)

    for i, (task, batch) in enumerate(in_batches(items, args.batch_size)):
        seed = 1000 * args.seed + i  # its own noise for every batch, the same at every call
        jobs.append(("network", batch, f"samples-{i:03d}-{task}", partial(by_network, task, batch, seed)))
        for j in range(1, args.num_samples if task in FIDELITY else 1):
            more = partial(by_network, task, batch, seed + j * ANOTHER)
            jobs.append((f"sample {j}", batch, f"samples-{i:03d}-{task}-{j}", more))
        if encoders.prior is not None:
            drawn = partial(by_gaussian, batch, seed)
            jobs.append(("Gaussian", batch, f"gaussian-{i:03d}-{task}", drawn))
            if task != "text":
                guess = partial(by_gaussian, batch, None)
                jobs.append(("Gaussian's mean", batch, f"gaussian-mean-{i:03d}-{task}", guess))
    return jobs


def sample_items(model, dataset, items, args, folder):
    """Samples every item, in fixed batches of one task. model: of sample.load. Returns {rival: {index of an
    item: clip uint8 (8, R, R, 3)}}: "network" and, where there are, "mean of N samples", "Gaussian" and
    "Gaussian's mean"."""
    made = {}
    jobs = sampling_jobs(model, dataset, items, args)
    for rival, batch, name, job in tqdm(jobs, "sampling the test list", unit="batch"):
        frames = cached_npz(folder / f"{name}.npz", lambda job=job: dict(frames=job()))["frames"]
        made.setdefault(rival, {}).update(zip(batch, frames))
    more = [made.pop(f"sample {j}") for j in range(1, args.num_samples) if f"sample {j}" in made]
    if more:
        samples = {i: np.stack([made["network"][i], *(clips[i] for clips in more)]) for i in more[0]}
        mean = {i: clips.mean(axis=0).round().astype(np.uint8) for i, clips in samples.items()}
        made = {"network": made.pop("network"), f"mean of {args.num_samples} samples": mean, **made}
    return made
