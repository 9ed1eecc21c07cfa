"""
From samples, real clips and losses to the numbers of report.json. Nothing is sampled and nothing drawn here.

Standard errors ("se") are of the mean over clips or draws, and binomial where the number is a share.
"""

import numpy as np

import masks
from lab import metrics
from lab.heldout import summarize_loss
from lab.judge import ATTRIBUTES, CHANCE
from lab.metrics import mean_se
from masks import NUM_FRAMES

BLOCK = 8  # pixels; motion without grain is that of the means of such blocks
ROWS = {row.name: row for row in masks.TABLE7}


def share(right, chance=None):
    """{"share", "se", "count"} of a list of bools, and the chance level. The standard error is that of two
    more of each kind (Agresti and Coull): 0 of 48 is no certainty."""
    n = len(right)
    p = (np.sum(right) + 2) / (n + 4)
    entry = dict(share=float(np.mean(right)), se=float((p * (1 - p) / (n + 4)) ** 0.5), count=n)
    return entry if chance is None else dict(entry, chance=chance)


# ------------------------------------------------------------------------------------------------------------
# Samples


def summarize_quality(pairs):
    """PSNR and SSIM of given and of unknown frames, and of the baselines on the unknown ones.

    pairs: [(given bool (8,), made (8, R, R, 3), real (8, R, R, 3))], real being the ground truth
    """
    clips = {}
    for given, made, real in pairs:
        rivals = {name: baseline(real, given) for name, baseline in metrics.BASELINES.items()}
        for who, frames in {"model": made, **rivals}.items():
            for which, mask in (("given", given), ("unknown", ~given)):
                if mask.any() and (which == "unknown" or who == "model"):
                    entry = clips.setdefault(which, {}).setdefault(who, dict(psnr=[], ssim=[]))
                    entry["psnr"].append(metrics.psnr(frames[mask], real[mask]).mean())
                    entry["ssim"].append(metrics.ssim(frames[mask], real[mask]).mean())
    return {
        which: {who: {name: mean_se(v) for name, v in entry.items()} for who, entry in table.items()}
        for which, table in clips.items()
    }


def summarize_motion(clips, real_motion):
    """Motion, also without grain, distinct frames, and the share of clips that hardly move: those whose
    motion without grain is below a tenth of `real_motion`."""
    coarse = [metrics.motion(clip, BLOCK) for clip in clips]
    return dict(
        motion=mean_se([metrics.motion(clip) for clip in clips]),
        without_grain=mean_se(coarse),
        distinct_frames=mean_se([metrics.distinct_frames(clip) for clip in clips]),
        still=share([m < 0.1 * real_motion for m in coarse]),
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
            right = np.array([[r == w for r, w in zip(read[item], item.words)] for item in group])
            table[name] = {
                a: share(column, CHANCE[a]) for a, column in zip(ATTRIBUTES, right.T)
            }  # right: (N, 3)
            table[name]["all three"] = share(right.all(axis=1), float(np.prod(list(CHANCE.values()))))
    return table


def summarize(about, items, made, real, held_out, train, loss, judge, exam):
    """The whole report but for the metrics of pretrained_metrics.py.

    items, made: the test list and its clips uint8 (8, R, R, 3); real: {name: clip}, ground truth; held_out,
    train: names of real clips; loss: of evaluate.measure_loss; judge, exam: None for stickers that are not
    the built-in ones
    """
    report = dict(about=about)
    if loss:
        report["loss"] = summarize_loss(loss, about["latent_std"])
    tasks = {task: [i for i, item in enumerate(items) if item.task == task] for task in about["sampler"]}

    report["quality"] = {
        task: summarize_quality(
            [
                (masks.condition_mask(ROWS[items[i].row], NUM_FRAMES), made[i], real[items[i].clip])
                for i in mine
            ]
        )
        for task, mine in tasks.items()
        if task != "text"
    }
    if held_out:
        truth = summarize_motion([real[name] for name in held_out], 0.0)
        level = truth["without_grain"]["mean"]
        report["motion"] = {"real held-out clips": truth} | {
            task: summarize_motion([made[i] for i in mine], level) for task, mine in tasks.items()
        }

    # What no model can be asked to undercut: the distance of as many real held-out clips.
    report["frechet"] = {}
    for task in ("text", "image") if train else ():
        mine = tasks.get(task, [])[: len(held_out)]
        if len(mine) > 1:
            keep = ~masks.condition_mask(ROWS[items[mine[0]].row], NUM_FRAMES)
            vectors = lambda clips: [metrics.features(clip, keep) for clip in clips]
            reference = vectors([real[name] for name in train])
            report["frechet"][task] = dict(
                model=metrics.standardized_frechet(vectors([made[i] for i in mine]), reference),
                real_held_out=metrics.standardized_frechet(
                    vectors([real[name] for name in held_out[: len(mine)]]), reference
                ),
                clips=len(mine),
                reference_clips=len(train),
            )

    if judge is not None:
        report["judge"] = exam
        readings = judge.read(np.stack(made))
        report["readings"] = [list(r) for r in readings]
        mine = tasks.get("text", [])
        if mine:
            report["text"] = summarize_text([items[i] for i in mine], [readings[i] for i in mine])
        mine = tasks.get("image", [])
        if mine:
            report["image"] = summarize_text([items[i] for i in mine], [readings[i] for i in mine])
    return report
