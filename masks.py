"""
The dual masks of RDTF (section 4 of the paper):
Table 7 as data, the condition mask, the loss mask, guidance dropout.

Polarity, said once for the whole project:
    given  1 / True = the clean frame in this slot is shown to the network        (condition mask)
    valid  1 / True = this slot holds a frame of the clip and counts in the loss  (loss mask: slot < k)
A frame can be both; a slot beyond k is neither. Every mask has NUM_FRAMES slots.
"""

from typing import NamedTuple

import numpy as np

NUM_FRAMES = 8  # frame slots of a clip; k of them, 3 <= k <= 8, hold a frame
LENGTHS = (3, 4, 5, 6, 7, 8)  # the values of k
TASKS = ("interpolation", "prediction", "generation")  # in the paper's order of difficulty

# ------------------------------------------------------------------------------------------------------------
# Table 7: one row, one way of hiding frames and text


class Row(NamedTuple):
    name: str
    task: str
    given: tuple  # one flag per slot
    text: bool  # whether the caption is shown
    weight: float  # share of the row among the rows of its task


# The paper's table lost its tick marks for text: the two identical pairs of generation rows are read as with
# and without text. G0, text alone, is named in the paper's text and absent from its table; half of generation
# is spent on it.
#        name  task             frames 1..8               text   weight
TABLE7 = (
    Row("I1", "interpolation", (0, 1, 0, 1, 0, 1, 0, 1), True,  1.0),
    Row("I2", "interpolation", (1, 0, 1, 0, 1, 0, 1, 0), True,  1.0),
    Row("I3", "interpolation", (1, 0, 0, 1, 0, 0, 1, 0), True,  1.0),
    Row("P1", "prediction",    (1, 1, 1, 1, 1, 0, 0, 0), True,  1.0),
    Row("P2", "prediction",    (0, 0, 1, 1, 1, 1, 1, 1), True,  1.0),
    Row("G1", "generation",    (1, 0, 0, 0, 0, 0, 0, 0), True,  1.0),
    Row("G2", "generation",    (0, 0, 1, 0, 0, 0, 0, 0), True,  1.0),
    Row("G3", "generation",    (0, 0, 1, 0, 0, 0, 0, 0), False, 1.0),
    Row("G4", "generation",    (1, 0, 0, 0, 0, 0, 0, 0), False, 1.0),
    Row("G0", "generation",    (0, 0, 0, 0, 0, 0, 0, 0), True,  4.0),
)  # fmt: skip
ROWS = {row.name: row for row in TABLE7}
TEXT_ONLY = TABLE7[-1]  # the one row of the ablation without dual masks (Table 3, "DFGN")


# ------------------------------------------------------------------------------------------------------------
# From (row, k) to masks


def loss_mask(k):
    """Section 4.2. The first `k` slots are valid. Returns bool (NUM_FRAMES,)."""
    return np.arange(NUM_FRAMES) < k


def condition_mask(row, k):
    """Section 4.1. The given frames of `row` in a clip of `k` frames: the row is cut at k, not rescaled.
    Returns bool (NUM_FRAMES,)."""
    return np.array(row.given, bool) & loss_mask(k)


def admissible_rows(task, k):
    """The rows of `task` that leave at least one of the first `k` frames to predict
    (P1 does only from k = 6 on).

    A row without unknown frames would teach copying alone and report a falsely low loss to the curriculum."""
    return [row for row in TABLE7 if row.task == task and condition_mask(row, k).sum() < k]


def draw_row(task, k, rng):
    """One of the admissible rows of `task` at `k`, with probability proportional to its weight."""
    rows = admissible_rows(task, k)
    weights = np.array([row.weight for row in rows])
    return rows[rng.choice(len(rows), p=weights / weights.sum())]


def is_trained(given, k):
    """Whether some row of Table 7 shows exactly these frames of a k-frame clip.
    `given`: set of slots, all < k."""
    return any(set(np.flatnonzero(condition_mask(row, k))) == set(given) for row in TABLE7)


# ------------------------------------------------------------------------------------------------------------
# Guidance dropout, so that one network also knows the unguided noise prediction (classifier-free guidance)

DROP_TEXT, DROP_IMAGE, DROP_BOTH = 0.10, 0.05, 0.05


def draw_dropout(rng):
    """Returns (keep_text, keep_image). Text alone is dropped with 10 %,
    the given frames alone with 5 %, both with 5 %."""
    u = rng.random()
    drop_both = u < DROP_BOTH
    drop_text = drop_both or u < DROP_BOTH + DROP_TEXT
    drop_image = drop_both or DROP_BOTH + DROP_TEXT <= u < DROP_BOTH + DROP_TEXT + DROP_IMAGE
    return not drop_text, not drop_image


# ------------------------------------------------------------------------------------------------------------
# Eq. 1 under the loss mask


def masked_loss(noise_pred, noise, valid):
    """Squared error of the predicted noise over the valid frames, given ones included
    (Eq. 1 and section 4.2).

    noise_pred, noise: (B, F, C, H, W); valid: bool (B, F), at least one frame per sample.
    Returns float32 (B,): a mean per sample,
    so that a short clip weighs as much as a long one and looks no easier.
    """
    error = (noise_pred.float() - noise.float()).square().mean(dim=(2, 3, 4))  # (B, F)
    error = error.masked_fill(
        ~valid, 0.0
    )  # not a product: whatever stands in a filler slot, even NaN, stays out
    return error.sum(dim=1) / valid.sum(dim=1)
