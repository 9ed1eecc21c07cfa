"""
The network beside trivial rivals, in the same columns: what is its own, and what a Gaussian, a cross-fade
or a repeated frame does as well? Real clips stand in the last row and say how much of each measure is
right.

Frames that were given are looked at by nobody: all columns are of unknown frames, but for the judge, who
reads whole clips, and the Frechet distance, which takes pairs of frames of which at least one is unknown.
"""

import numpy as np

from lab import eye, metrics
from lab.classifier import FEWEST, told_apart
from lab.items import given_frames
from lab.metrics import mean_se
from support.common import evenly

REAL = "real clips"
EXCESS = ("grain", "patches", "specks")  # reported as what is beyond real clips


def look(clips, masks):
    """What eye.see sees in unknown frames: {measure: a mean for each clip}"""
    frames = [clip[~given] for clip, given in zip(clips, masks)]
    ends = np.cumsum([len(f) for f in frames])[:-1]  # where the next clip begins
    seen = eye.see(np.concatenate(frames))
    return {name: [part.mean() for part in np.split(x, ends)] for name, x in seen.items()}


def vectors(clips, masks):
    """Features of the pairs of frames that are not both given, for the Frechet distance; masks repeat."""
    given = (masks[i % len(masks)] for i in range(len(clips)))
    return [metrics.features(clip, ~(mask[:-1] & mask[1:])) for clip, mask in zip(clips, given)]


def line_up(mine, clips):
    """{name: clips of the items numbered `mine`}: of the network, of its rivals, and as many real ones."""
    items = [clips.items[i] for i in mine]
    rows = {name: [made[i] for i in mine] for name, made in clips.made.items() if mine[0] in made}
    if not given_frames(items[0]).any():
        return rows | {REAL: [clips.real[name] for name in clips.held_out[: len(mine)]]}
    truth = [clips.real[item.clip] for item in items]
    for name in ("nearest given frame", "cross-fade"):
        made = [metrics.BASELINES[name](real, given_frames(item)) for real, item in zip(truth, items)]
        if not any(np.array_equal(made, other) for other in rows.values()):
            rows[name] = made  # beyond the given frames a cross-fade is a repeated frame
    return rows | {REAL: truth}


def summarize_rivals(task, clips, share_read):
    """One table: {name: {column: number, {"mean", "se"}, {"share", "se"} or None}}.

    clips: summary.Clips; share_read: function of (items, clips) to the share whose words the judge reads, or
    None for stickers without words"""
    mine = [i for i, item in enumerate(clips.items) if item.task == task]
    mine = evenly(mine, len(clips.held_out))  # as many samples as real clips
    items, masks = [clips.items[i] for i in mine], [given_frames(clips.items[i]) for i in mine]
    rows = line_up(mine, clips)
    real, table = rows[REAL], {}
    reference = vectors([clips.real[name] for name in clips.train], masks)
    level = {name: np.mean(values) for name, values in look(real, masks).items()}
    for name, made in rows.items():
        seen = look(made, masks)
        row = dict(read=None, frechet=None)
        if share_read and (task != "text" or name != REAL):  # real clips show other words than the prompts
            row["read"] = share_read(items, made)
        if len(made) > 1 and reference:
            row["frechet"] = metrics.standardized_frechet(vectors(made, masks), reference)
        for measure, values in seen.items():
            row[measure] = mean_se(np.array(values) - (level[measure] if measure in EXCESS else 0))
        row["told"] = None
        if name != REAL and len(made) >= FEWEST:
            row["told"] = told_apart(*([clip[~m] for clip, m in zip(some, masks)] for some in (made, real)))
        if task != "text":
            errors = [metrics.psnr(a[~m], b[~m]).mean() for a, b, m in zip(made, real, masks)]
            row["psnr"] = mean_se(errors) if name != REAL else None
        table[name] = row
    return table


def summarize_kept(task, clips):
    """How far unknown frames stray from the given ones: {name: eye.strayed, as {"mean", "se"}}."""
    mine = [i for i, item in enumerate(clips.items) if item.task == task]
    table = {}
    for name, made in line_up(mine, clips).items():
        strayed = [eye.strayed(clip, given_frames(clips.items[i])) for clip, i in zip(made, mine)]
        table[name] = {column: mean_se([s[column] for s in strayed]) for column in strayed[0]}
    return table
