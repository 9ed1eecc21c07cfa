"""
From samples, real clips and losses to the numbers of report.json. Nothing is sampled and nothing drawn here.

Standard errors ("se") are of the mean over clips or draws, and binomial where the number is a share.

The paper takes H(interpolation, N) <= H(prediction, N) <= H(generation, N) and growth with N for plausible
("Difficulty-adaptive curriculum"); `summarize_loss` counts where that holds. N is k, the number of valid
frames.
"""

from typing import NamedTuple

import numpy as np

from lab import metrics
from lab.heldout import GAUSSIAN, NO_TEXT
from lab.items import CONDITIONED, given_frames
from lab.judge import ATTRIBUTES, CHANCE
from lab.metrics import mean_se
from lab.rivals import summarize_kept, summarize_rivals
from masks import LENGTHS, NUM_FRAMES, TASKS
from model import make_scheduler
from support.prior import balanced_weights

BLOCK = 8  # pixels; motion without grain is that of the means of such blocks
RANGES = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))  # of timesteps


class Clips(NamedTuple):
    """What was sampled, and real clips; a clip is uint8 (8, R, R, 3)."""

    items: list  # the test list, of items.Item
    made: dict  # {"network" or a rival: {index of an item: clip}}, of sampling.sample_items
    real: dict  # {name: clip}, as the codec gives it back
    held_out: list  # names of the real clips that were never trained on
    train: list  # names of some that were


def share(right, chance=None):
    """{"share", "se", "count"} of a list of bools, and the chance level. The standard error is that of two
    more of each kind (Agresti and Coull): 0 of 48 is no certainty."""
    n = len(right)
    p = (np.sum(right) + 2) / (n + 4)
    entry = dict(share=float(np.mean(right)), se=float((p * (1 - p) / (n + 4)) ** 0.5), count=n)
    return entry if chance is None else dict(entry, chance=chance)


# ------------------------------------------------------------------------------------------------------------
# Losses


def compare(loss, harder, easier):
    """The mean of loss[harder] - loss[easier], draw by draw, and whether it is positive."""
    d = mean_se(loss[harder] - loss[easier])
    return dict(
        harder=list(harder),
        easier=list(easier),
        difference=d["mean"],
        se=d["se"],
        holds=d["mean"] >= 0,
        refuted=d["mean"] < -2 * d["se"],
    )


def by_timestep(loss, timestep):
    """The loss of every task, a mean over k, in RANGES of timesteps. loss: {(task, k): (draws,)}"""
    table = {task: {} for task in TASKS}
    for low, high in RANGES:
        inside = (timestep >= low) & (timestep < high)
        for task in TASKS if inside.any() else ():
            entry = mean_se(np.mean([loss[task, k][inside] for k in LENGTHS], axis=0))
            table[task][f"{low}-{high - 1}"] = entry
    return table


def summarize_view(loss, timestep):
    """One view of the losses {(task, k): (draws,)}: means, and which of the paper's inequalities hold."""
    entry = {"text only, k = 8": mean_se(loss["text", NUM_FRAMES])}
    if not any(task in TASKS for task, _ in loss):  # without condition masks
        return entry
    tasks = {task: np.mean([loss[task, k] for k in LENGTHS], axis=0) for task in TASKS}
    entry["cells"] = {task: {str(k): mean_se(loss[task, k]) for k in LENGTHS} for task in TASKS}
    entry["tasks"] = {task: mean_se(losses) for task, losses in tasks.items()}
    entry["mean"] = mean_se(np.mean(list(tasks.values()), axis=0))
    neighbours = [(easy, hard, k) for k in LENGTHS for easy, hard in zip(TASKS, TASKS[1:])]
    entry["order of tasks"] = [compare(loss, (hard, k), (easy, k)) for easy, hard, k in neighbours]
    neighbours = [(task, k) for task in TASKS for k in LENGTHS[:-1]]
    entry["order of lengths"] = [compare(loss, (task, k + 1), (task, k)) for task, k in neighbours]
    entry["by timestep"] = by_timestep(loss, timestep)
    return entry


def summarize_use(cells, latent_std, who=""):
    """What given frames and text are worth: {weighting: {task: {"nothing", "text", "frames", "both", "beside
    text", "alone"}}}, for k = 8. The first four: loss over unknown frames of a network that is shown these,
    on the same frames, noise and timesteps. beside text: both / text; alone: frames / nothing. Each {"mean",
    "se"}; the standard error of a ratio is that of paired means. who: GAUSSIAN for that in its place"""
    seen = {"nothing": "text" + NO_TEXT, "text": "text", "frames": "{}" + NO_TEXT, "both": "{}"}
    seen = {name: cell + who for name, cell in seen.items()}
    views = {}
    for weighting, weight in weightings(cells["text", NUM_FRAMES]["timestep"], latent_std).items():
        views[weighting] = {}
        for task in CONDITIONED if (TASKS[0], NUM_FRAMES) in cells else ["image"]:
            unknown = ~cells[task, NUM_FRAMES]["given"]  # (draws, 8)
            frames = {name: cells[cell.format(task), NUM_FRAMES]["frames"] for name, cell in seen.items()}
            loss = {n: weight * (x * unknown).sum(axis=1) / unknown.sum(axis=1) for n, x in frames.items()}
            entry = {name: mean_se(x) for name, x in loss.items()}
            for name, shown, hidden in (("beside text", "both", "text"), ("alone", "frames", "nothing")):
                ratio = entry[shown]["mean"] / entry[hidden]["mean"]
                se = mean_se(loss[shown] - ratio * loss[hidden])["se"] / entry[hidden]["mean"]
                entry[name] = dict(mean=ratio, se=se)
            views[weighting][task] = entry
    return views


def weightings(timestep, latent_std):
    """The weights of draws, (draws,): of Eq. 1, and balanced ones."""
    balanced = balanced_weights(latent_std, make_scheduler().alphas_cumprod).double().numpy()  # (1000,)
    return {"Eq. 1": np.ones(len(timestep)), "balanced": balanced[timestep]}


def summarize_loss(cells, latent_std):
    """cells: {(task, k): dict(loss, unknown, timestep)} of heldout.measure_loss -> the section "loss" of the
    report.

    The balanced loss is weighted as in the training of `tiny` and `small`, but alike for every network, so
    that all compare. latent_std: standard deviation of the clean latents"""
    timestep = cells["text", NUM_FRAMES]["timestep"]  # the same in every cell
    weights, views = weightings(timestep, latent_std), {}
    for name, frames in (("loss", ""), ("unknown", ", unknown frames")):
        for weighting, weight in weights.items():
            loss = {cell: arrays[name] * weight for cell, arrays in cells.items()}
            views[weighting + frames] = summarize_view(loss, timestep)
    return views


# ------------------------------------------------------------------------------------------------------------
# Samples


def summarize_quality(pairs):
    """PSNR and SSIM of given and of unknown frames, and of the baselines on the unknown ones.

    pairs: [(given bool (8,), made (8, R, R, 3), real (8, R, R, 3))], real being the ground truth
    """
    values = {}  # {(frames, name): ([PSNR of each clip], [SSIM of each clip])}
    for given, made, real in pairs:
        baselines = {name: baseline(real, given) for name, baseline in metrics.BASELINES.items()}
        compared = [("given", given, "model", made), ("unknown", ~given, "model", made)]
        compared += [("unknown", ~given, name, frames) for name, frames in baselines.items()]
        for which, mask, name, frames in compared:
            if mask.any():
                psnr, ssim = values.setdefault((which, name), ([], []))
                psnr.append(metrics.psnr(frames[mask], real[mask]).mean())
                ssim.append(metrics.ssim(frames[mask], real[mask]).mean())
    table = {}
    for (which, name), (psnr, ssim) in values.items():
        table.setdefault(which, {})[name] = dict(psnr=mean_se(psnr), ssim=mean_se(ssim))
    return table


def summarize_motion(clips, real_motion):
    """Motion, also without grain, distinct frames, the share of clips that hardly move: those whose motion
    without grain is below a tenth of `real_motion`; and the median seam between the last frame and the first.
    """
    coarse = [metrics.motion(clip, BLOCK) for clip in clips]
    return dict(
        motion=mean_se([metrics.motion(clip) for clip in clips]),
        without_grain=mean_se(coarse),
        distinct_frames=mean_se([metrics.distinct_frames(clip) for clip in clips]),
        still=share([m < 0.1 * real_motion for m in coarse]),
        wrap=float(np.median([metrics.seam(clip) for clip in clips])),
    )


def summarize_text(items, readings):
    """The share of samples on which the judge reads the prompt's words, on trained and on held-out
    combinations."""
    sections = {
        "all": items,
        "trained": [i for i in items if not i.held_out],
        "held out": [i for i in items if i.held_out],
    }
    read, table = dict(zip(items, readings)), {}
    for name, group in sections.items():
        if group:
            # (N, 3)
            right = np.array([[r == w for r, w in zip(read[item], item.words)] for item in group])
            table[name] = {a: share(column, CHANCE[a]) for a, column in zip(ATTRIBUTES, right.T)}
            table[name]["all three"] = share(right.all(axis=1), float(np.prod(list(CHANCE.values()))))
    return table


def summarize(about, clips, loss, judge=None, exam=None):
    """The whole report but for the metrics of pretrained_metrics.py.

    about: how all was made; clips: Clips; loss: of heldout.measure_loss; judge, exam: of judge.get_judge and
    judge.examine, None for stickers that are not the built-in ones
    """
    items, _, real, held_out, train = clips
    made = [clips.made["network"][i] for i in range(len(items))]
    report = dict(about=about)
    if loss:
        report["loss"] = summarize_loss(loss, about["latent_std"])
    tasks = {task: [i for i, item in enumerate(items) if item.task == task] for task in about["sampler"]}
    if judge is not None:
        report["judge"] = exam
        readings = judge.read(np.stack(made))
        report["readings"] = [list(reading) for reading in readings]
        for task in ("text", "image"):
            if mine := tasks.get(task):
                report[task] = summarize_text([items[i] for i in mine], [readings[i] for i in mine])

    def share_read(items, made):
        """The share of clips whose words the judge all reads"""
        pairs = zip(items, judge.read(np.stack(made)))
        return share([reading == item.words for item, reading in pairs])

    read, report["rivals"] = None if judge is None else share_read, {}
    for task in tasks if held_out else ():
        report["rivals"][task] = summarize_rivals(task, clips, read)
    report["given frames"] = {}
    if "image" in tasks:
        report["given frames"]["kept"] = {t: summarize_kept(t, clips) for t in tasks if t != "text"}
    if ("image", NUM_FRAMES) in loss:
        report["given frames"]["loss"] = summarize_use(loss, about["latent_std"])
    if ("image" + GAUSSIAN, NUM_FRAMES) in loss:
        report["given frames"]["Gaussian's loss"] = summarize_use(loss, about["latent_std"], GAUSSIAN)

    report["quality"] = {}
    for task in tasks:
        if task != "text":
            pairs = [(given_frames(items[i]), made[i], real[items[i].clip]) for i in tasks[task]]
            report["quality"][task] = summarize_quality(pairs)

    if held_out:
        truth = summarize_motion([real[name] for name in held_out], 0.0)
        level = truth["without_grain"]["mean"]
        report["motion"] = {"real held-out clips": truth}
        for task, mine in tasks.items():
            report["motion"][task] = summarize_motion([made[i] for i in mine], level)
    return report
