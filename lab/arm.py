"""
One arm of the ablations: trains as train.py does, looks at held-out clips on the way, and samples at the end.
`python -m lab.ablate` calls it once for every row, number of clips and seed.

    python -m lab.arm --output_dir runs/a --ddu off --no-prior --max_train_steps 1200
    python -m lab.arm --output_dir runs/b --course reversed --no-prior      # and the other flags of train.py
    python -m lab.arm --output_dir runs/c --network simda --base runs/base/checkpoint-3000 --ddu off

Held out are built-in stickers of exactly 8 frames, of combinations of words that are not trained on: key
frames, equal frames and all frames are the same there, so the way in which an arm takes frames does not
matter. (It does for what an arm is trained on: of longer clips equal frames are strides.) A folder of yours
has few such clips: its held-out ones are measured twice.

    log.jsonl    G1: Eq. 1 over the unknown frames of row G1 at k = 8 (first frame and text given), under
                 averaged weights, on the same draws for every arm; G1_ranges: by range of timesteps;
                 G1_equal: of equally spaced frames in the place of key frames, for a folder of yours;
                 probe: the loss of the weights as they are, on one fixed batch of all levels
    begun.json   flags and machines, for a run that goes on later
    arm.json     written last: the loss of every task, on held-out clips and as "fit" on trained ones, as
                 "hidden" that of the same unknown frames while given ones are hidden (so what those are
                 worth), as "gaussian" and "gaussian hidden" both of the Gaussian alone, and without a
                 curriculum that of every (task, k), on held-out clips of the training set; Frechet distances
                 and PSNR; what was drawn; machines and commits; what the tables need of the log. This file
                 alone is a finished arm: the rest may be deleted
    samples.png  some samples below the real clips, as arm.json says under "samples"
"""

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import curriculum
import data
import masks
import train
from lab import heldout, metrics, peers
from lab.ablation_tables import digest
from lab.courses import Course, course_of, make_course, set_order
from lab.eight_frames import draw_test_stickers
from lab.evaluate import REAL_CLIPS, real_clips
from lab.items import CONDITIONED, Item, given_frames
from lab.pictures import show_samples
from lab.rivals import line_up, vectors
from lab.sampling import sample_items
from lab.summary import RANGES, Clips, mean_se
from lab.timing import machine
from masks import LENGTHS, NUM_FRAMES, ROWS, TASKS
from model import NUM_TIMESTEPS
from sample import SAMPLING
from support.common import UserError, evenly, one_sentence, replacing
from support.encoders import MAX_TOKENS
from support.flags import Parser, filled
from support.folder import scan_folder
from support.log import read_log
from support.machine import prepare, stop_requests
from support.optim import averaged
from support.prior import balanced_weights, precondition

G1_DRAWS, PROBE_DRAWS, CELL_DRAWS = 192, 36, 96  # held-out samples behind each loss
G1_EVERY = 4  # of the times that the probe is looked at, which is every --validation_steps
NUM_CLIPS = 48  # of each task, sampled at the end
SAMPLING_STEPS = 12  # of DDIM; half of them for interpolation and prediction
SEED = 0  # of what is held out, drawn and sampled: the same for all arms

# ------------------------------------------------------------------------------------------------------------
# Losses of held-out clips


def fixed_batches(dataset, clips, cells, size, equal=False):
    """Fixed draws of held-out `clips` as Batches of `size`: draw i of cells[i], a (task, k) as of
    heldout.draw. equal: of their equally spaced frames, in the place of key frames."""
    order, batches = np.random.default_rng((SEED, 77)).permutation(len(cells)), []
    for start in range(0, len(cells), size):
        draws = []
        for i, (task, k) in enumerate(cells[start : start + size], start):
            draws.append(heldout.draw(dataset, clips, task, k, i, order, SEED, equal))
        *arrays, captions = zip(*draws)
        latents, noise, timesteps, given, valid = (torch.from_numpy(np.stack(a)) for a in arrays)
        named = zip(*cells[start : start + size])
        batches.append(data.Batch(latents, noise, timesteps, given, valid, list(captions), *map(list, named)))
    return batches


@torch.no_grad()
def unknown_loss(run, denoiser, batches):
    """Eq. 1 over the frames that are not given, without weights: float64 (draws,)"""
    losses = [train.noise_loss(run, denoiser, batch)[1].cpu() for batch in batches]
    return torch.cat(losses).double().numpy()


def by_range(losses, timesteps):
    """Means over summary.RANGES of timesteps."""
    return [float(losses[(timesteps >= low) & (timesteps < high)].mean()) for low, high in RANGES]


class HeldOut:
    """What the training loop looks at in the place of its sheet."""

    def __init__(self, run, dataset, clips, lengths=LENGTHS):
        size = run.args.train_batch_size
        image = [("image", NUM_FRAMES)] * G1_DRAWS
        self.batches = {"G1": fixed_batches(dataset, clips, image, size)}
        if any((clip.table[-1] != clip.table[-2]).any() for clip in clips):  # equal frames are no key frames
            self.batches["G1_equal"] = fixed_batches(dataset, clips, image, size, equal=True)
        levels = [(task, k) for task in TASKS for k in lengths]
        self.probe = fixed_batches(dataset, clips, levels * (PROBE_DRAWS // len(levels)), size)
        self.timesteps = torch.cat([batch.timesteps for batch in self.batches["G1"]]).numpy()

    def __call__(self, run, training):
        """As train.validate: what the log gets."""
        denoiser = precondition(training.unet, run.encoders.prior, run.scheduler.alphas_cumprod)
        training.unet.eval()
        entry = dict(probe=float(unknown_loss(run, denoiser, self.probe).mean()))
        every = G1_EVERY * run.args.validation_steps
        if training.step % every == 0 or training.step == run.args.max_train_steps:
            with averaged(training.unet, training.average):
                for name, batches in self.batches.items():
                    losses = unknown_loss(run, denoiser, batches)
                    entry |= {name: float(losses.mean()), f"{name}_ranges": by_range(losses, self.timesteps)}
        training.unet.train()
        return entry


def cell_losses(run, denoiser, dataset, clips):
    """The loss over unknown frames of every (task, k), equal draws: {"task, k": {"mean", "se", "relative",
    "noise"}}. relative: to the mean of all cells; noise: the standard deviation of a single draw's loss,
    relative to what is usual in its range of timesteps."""
    table, losses = {}, {}
    for task in tqdm(TASKS, "held-out loss of every (task, k)", unit="task"):
        for k in LENGTHS:
            batches = fixed_batches(dataset, clips, [(task, k)] * CELL_DRAWS, run.args.train_batch_size)
            losses[task, k] = unknown_loss(run, denoiser, batches)
    timesteps = torch.cat([batch.timesteps for batch in batches]).numpy()
    ranges = timesteps * curriculum.NUM_RANGES // NUM_TIMESTEPS
    usual = np.array(
        [np.mean([x[ranges == r].mean() for x in losses.values()]) for r in range(ranges.max() + 1)]
    )
    everywhere = np.mean([x.mean() for x in losses.values()])
    for (task, k), x in losses.items():
        draw = x / usual[ranges]
        spread = dict(relative=float(x.mean() / everywhere), noise=float(draw.std(ddof=1) / draw.mean()))
        table[f"{task}, {k}"] = mean_se(x) | spread
    return table


def task_losses(run, denoiser, dataset, clips, tasks, equal=False):
    """The loss over unknown frames of each task at k = 8: {task: {"mean", "se", "ranges", "balanced", "by
    clip"}}; what is drawn is the same for every network. ranges: of timesteps; balanced: the mean under the
    weights that a network beside a Gaussian trains with. equal: of equally spaced frames"""
    losses = {}
    for task in tasks:
        cells = [(task, NUM_FRAMES)] * G1_DRAWS
        batches = fixed_batches(dataset, clips, cells, run.args.train_batch_size, equal)
        loss = unknown_loss(run, denoiser, batches)
        timesteps = torch.cat([batch.timesteps for batch in batches])
        std = float(torch.cat([batch.latents for batch in batches]).std())  # of the clips: equal for all arms
        weight = balanced_weights(std, run.scheduler.alphas_cumprod.cpu())[timesteps].double().numpy()
        by_clip = [round(float(loss[i :: len(clips)].mean()), 6) for i in range(min(len(clips), len(loss)))]
        means = {"balanced": float((weight * loss).mean()), "ranges": by_range(loss, timesteps.numpy())}
        losses[task] = mean_se(loss) | means | {"by clip": by_clip}
    return losses


def blind(denoiser):
    """The same, but given frames are hidden from it."""
    return lambda noisy, latents, given, *rest: denoiser(noisy, latents, torch.zeros_like(given), *rest)


# ------------------------------------------------------------------------------------------------------------
# Samples, and what was drawn


def sample_scores(run, denoiser, dataset, clips, tasks, folder, away=None):
    """Samples held-out clips, with the given frames of each task. Returns {task: {rival: {"frechet",
    "psnr"}}} and what samples.png shows, [(task, row)]. away: a folder of another domain; then "away", the
    Frechet distance to that, is there, too."""
    items = []
    for task in tasks:
        rows = CONDITIONED[task]
        for i, clip in enumerate(evenly(clips, NUM_CLIPS)):
            items.append(Item(task, rows[i % len(rows)], clip.caption, clip.name, (), True))
    recorded = {name: getattr(run.args, name) for name in ("resolution", "mixed_precision", *SAMPLING)}
    model = denoiser, run.encoders, recorded
    flags = dict(num_inference_steps=SAMPLING_STEPS, eta=None, guidance_scale=None, image_guidance_scale=None)
    settings = SimpleNamespace(**flags, seed=SEED, batch_size=16, num_samples=1)
    made = sample_items(model, dataset, items, settings, folder)
    codec = run.encoders.codec
    # Whatever was trained on, all arms are compared with the same clips.
    long = [clip for clip in run.dataset.split("train") if clip.longest == NUM_FRAMES]
    train_set = real_clips(codec, run.dataset, evenly(long, REAL_CLIPS))
    held_out = real_clips(codec, dataset, clips)
    seen = Clips(items, made, held_out | train_set, list(held_out), list(train_set))
    shown = show_samples(items, made["network"], held_out, run.args.output_dir / "samples.png")
    if away:
        where = run.args.resolution, run.args.cache_dir
        other = data.open_dataset(Path(away), scan_folder(Path(away))[0], codec, *where)
        far = list(real_clips(codec, other, evenly(usable(other.clips), REAL_CLIPS)).values())
    scores = {}
    for task in tasks:
        mine = [i for i, item in enumerate(items) if item.task == task]
        given = [given_frames(items[i]) for i in mine]
        rows = line_up(mine, seen)
        reference, truth = vectors(list(train_set.values()), given), rows["real clips"]
        distant = vectors(far, given) if away else None
        scores[task] = {}
        for name, clips_made in rows.items():
            psnr = [metrics.psnr(a[~g], b[~g]).mean() for a, b, g in zip(clips_made, truth, given)]
            frechet = metrics.standardized_frechet(vectors(clips_made, given), reference)
            scores[task][name] = dict(frechet=frechet, psnr=float(np.mean(psnr)))
            if away:
                distance = metrics.standardized_frechet(vectors(clips_made, given), distant)
                scores[task][name]["away"] = distance
    return scores, shown


def shares_drawn(run, course):
    """What the training drew, found by drawing it once more: shares of all samples."""
    args, counts = run.args, Counter()
    for step, probabilities in enumerate(course):
        where = args.seed, step, range(run.global_batch), run.global_batch
        batch = data.draw_batch(run.dataset, run.clips, probabilities, *where, args.ddu)
        for given, caption, task, k in zip(batch.given, batch.captions, batch.tasks, batch.lengths):
            given = given.numpy()[:k]
            counts[f"{task}, {k}"] += 1
            counts["no frame given"] += not given.any()
            counts["prediction that shows one frame"] += task == "prediction" and given.sum() == 1
            first = np.array(ROWS["G1"].given[:k], bool)
            whole = bool(caption) and k == NUM_FRAMES and np.array_equal(given, first)
            counts["row G1 with text, k = 8"] += whole and task == "generation"
    return {name: count / (len(course) * run.global_batch) for name, count in sorted(counts.items())}


# ------------------------------------------------------------------------------------------------------------
# The arm


def make_network(arm):
    """As train.build_network, but for a --network of lab/peers.py."""

    def build(args, world, encoders, fresh):
        channels = encoders.codec.latent_channels
        condition = channels if encoders.prior is None else 2 * channels
        settings = dict(text_tokens=MAX_TOKENS) if args.clip else {}
        torch.manual_seed(args.seed)
        if arm.base:
            base, settings = peers.load_base(arm.base)
            found = base.config.out_channels, base.config.in_channels
            if found != (channels, condition):
                what = f"--base {arm.base} has {found[0]} channels of latents and takes {found[1]}"
                way_out = "add --no-prior" if found == (channels, channels) else "give a base of this --vae"
                raise UserError(f"{what}, not {channels} and {condition}: {way_out}.")
        else:
            base = peers.make_base(channels, condition, **peers.LAPTOP)
        settings |= dict(clip_dim=encoders.clip.width, t5_dim=encoders.t5.width)
        if settings.get("prediction") == "v":  # I2VGen-XL's own weights know a first frame alone
            settings["learn_condition"] = args.ddu == "condition"
        peer = peers.build_peer(arm.network, base, **settings)
        if args.mixed_precision == "bf16":
            for weight in peer.parameters():
                if not weight.requires_grad:  # half of the memory of a frozen base
                    weight.data = weight.data.to(torch.bfloat16)
        return prepare(peer, world.device).train()

    return build


def usable(clips):
    """Those of 8 distinct frames, whichever way they are taken."""
    return [clip for clip in clips if clip.longest == NUM_FRAMES and clip.has_equal]


def open_test_clips(run):
    """(LatentDataset, its clips that are measured): those drawn for it, or the held-out ones of --data."""
    if run.args.data is None:
        folder = draw_test_stickers(root=run.args.cache_dir)
        where = run.args.resolution, run.args.cache_dir
        dataset = data.open_dataset(folder, scan_folder(folder)[0], run.encoders.codec, *where)
        return dataset, dataset.clips
    clips = usable(run.dataset.split("validation"))
    if len(clips) < 2:
        raise UserError(
            f"--data {run.args.data} has {len(clips)} held-out clips of 8 distinct frames: too few."
        )
    return run.dataset, clips


def begin(folder, arm, resumed):
    """Writes begun.json, what a run that goes on has to know: flags that the checkpoint has not, and the
    machines and commits it ran on. Returns these. Raises UserError if it began with other flags."""
    path, order = folder / "begun.json", curriculum.DIFFICULTY.tolist() if arm.order else None
    flags = dict(network=arm.network, base=arm.base, course=arm.course, average=arm.average, order=order)
    before = json.loads(path.read_text()) if resumed and path.is_file() else dict(flags=flags, machines=[])
    if before["flags"] != flags:
        names = ", ".join(f"--{name}" for name in flags if flags[name] != before["flags"].get(name))
        raise UserError(f"{folder} began with another {names}: give what it began with, or another folder.")
    before["machines"] = list(dict.fromkeys([*before["machines"], machine()]))
    with replacing(path) as writing:
        writing.write_text(json.dumps(before))
    return before["machines"]


def finish(run, training, dataset, clips, arm, machines):
    """Measures the trained network, and writes arm.json."""
    args = run.args
    denoiser = precondition(training.unet.eval(), run.encoders.prior, run.scheduler.alphas_cumprod)
    folder = args.output_dir / "items"
    folder.mkdir(exist_ok=True)
    log = read_log(args.output_dir / "log.jsonl")
    aims = [entry["aim"] for entry in log] if args.curriculum == "dcl" and not arm.course else []
    about = dict(machine="; then ".join(machines), clips=len(run.clips), test_clips=len(clips))
    about |= dict(global_batch=run.global_batch, latents=dataset.identity, precision=args.mixed_precision)
    result = dict(about=about, **digest(log), aims=aims)
    tasks = [arm.course] if arm.course in CONDITIONED else list(CONDITIONED)
    if run.encoders.prior is not None:
        gaussian = heldout.gaussian_alone(run.encoders.prior)
        result["gaussian"] = task_losses(run, gaussian, dataset, clips, tasks)
        result["gaussian hidden"] = task_losses(run, blind(gaussian), dataset, clips, tasks)
    with averaged(training.unet, training.average):
        result["losses"] = task_losses(run, denoiser, dataset, clips, tasks)
        result["hidden"] = task_losses(run, blind(denoiser), dataset, clips, tasks)
        result["scores"], result["samples"] = {}, []
        if not arm.no_samples:
            if trained := usable(run.clips):
                equal = args.ddu not in masks.LOSS_MASK_ON  # the frames that it was trained on
                result["fit"] = task_losses(run, denoiser, run.dataset, trained, tasks, equal)
            sampled = tasks if args.ddu in masks.CONDITION_MASK_ON else ["image"]
            scores = sample_scores(run, denoiser, dataset, clips, sampled, folder, arm.away)
            result["scores"], result["samples"] = scores
        if args.ddu == "on" and args.curriculum == "none":  # an order that no curriculum made
            apart = usable(run.held_out)  # else an order would be found on what arms are compared by
            where = (run.dataset, apart) if apart else (dataset, clips)
            result["cells"] = cell_losses(run, denoiser, *where)
    if args.ddu == "on" and len(log) == args.max_train_steps:  # a step that was skipped has no line
        if arm.course:
            course = make_course(arm.course, args.max_train_steps, arm.average)
        else:
            course = course_of(args.curriculum, args.max_train_steps, aims)
        result["drawn"] = shares_drawn(run, course)
    with replacing(args.output_dir / "arm.json") as writing:
        writing.write_text(json.dumps(result))


def parse_args():
    """This program's flags, and those of train.py as train.py reads them."""
    parser = Parser(description="Train and measure one arm; other flags are train.py's.")
    network = "what is trained: dfgn, or of lab/peers.py base, cav, i2v or simda"
    parser.add_argument("--network", choices=("dfgn", *peers.CHOICES["name"]), default="dfgn", help=network)
    base = "trained base of --network: a folder or hub id, ali-vilab/i2vgen-xl too (default: random weights)"
    parser.add_argument("--base", metavar="DIR", type=filled, help=base)
    away = "a folder of another domain: how far samples are from that, too"
    parser.add_argument("--away", metavar="DIR", type=filled, help=away)
    course = "linear, reversed, set_point, a task, or the folder of a dcl arm: what is followed"
    parser.add_argument("--course", metavar="NAME|DIR", type=filled, help=course)
    parser.add_argument("--average", action="store_true", help="draw the mean of --course at every step")
    order = "JSON file of 3 x 6 difficulties in the place of the paper's"
    parser.add_argument("--order", metavar="FILE", type=filled, help=order)
    alone = "measure the losses of held-out clips alone: no samples, no losses of trained clips"
    parser.add_argument("--no_samples", action="store_true", help=alone)
    arm, rest = parser.parse_known_args()
    if arm.average and not arm.course:
        raise UserError("--average is of a course: give --course, too.")
    sys.argv = [sys.argv[0], *rest]
    args = train.parse_args(train.PRESETS)
    if arm.network == "dfgn":
        if arm.base:
            raise UserError("--base is for a --network of lab/peers.py: base, cav, i2v or simda.")
        return arm, args
    if args.ddu in masks.LOSS_MASK_ON:
        raise UserError(f"--network {arm.network} sees 8 frames, always: give --ddu condition or --ddu off.")
    for name in ("init_unet", "init_from", "shard", "gradient_checkpointing", "compile", "low_memory"):
        if getattr(args, name):
            raise UserError(f"--{name} is for DFGN: leave it out with --network {arm.network}.")
    args.muon &= arm.network == "base"  # adapters are published with AdamW
    return arm, args


@one_sentence("lab.arm")
def main():
    arm, args = parse_args()
    if arm.order:
        set_order(arm.order)
    train.LOG_EVERY = 1  # a course is read from the log
    train.plot_progress = lambda *_: None  # so often that it would take a tenth of the time
    with ExitStack() as on_exit:
        world = train.World()
        build = train.build_network if arm.network == "dfgn" else make_network(arm)
        run, training = train.set_up(args, world, on_exit, build)
        machines = begin(args.output_dir, arm, training.step > 0)
        dataset, clips = open_test_clips(run)
        lengths = LENGTHS if arm.network == "dfgn" else [NUM_FRAMES]
        run = run._replace(validate=HeldOut(run, dataset, clips, lengths))
        if arm.course:
            course = make_course(arm.course, args.max_train_steps, arm.average)
            course = Course(course, args.curriculum)
            course.load_state_dict(training.curriculum.state_dict())
            training.curriculum = course
        with stop_requests() as stop_signals:  # not while it measures, which a signal may end at once
            train.train(run, training, stop_signals)
        finish(run, training, dataset, clips, arm, machines)
        print(f"wrote {args.output_dir}/arm.json")


if __name__ == "__main__":
    main()
