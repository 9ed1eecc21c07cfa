"""
The dual masks of RDTF: Table 7 as data, condition mask, loss mask, guidance dropout, Eq. 1 under the masks.

$ python masks.py    # Table 7, and the masks of every row for every number of frames

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
    task: str  # one of TASKS
    given: tuple  # one flag per slot
    text: bool  # whether the caption is shown
    weight: float  # how often the row is drawn, relative to the other rows of its task


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
FIRST_FRAME = ROWS["G1"]  # drawn where condition masks are off: first frame and caption (Table 3, "DFGN")
CONDITION_MASK_ON, LOSS_MASK_ON = ("on", "condition"), ("on", "loss")  # values of --ddu that use each mask


# ------------------------------------------------------------------------------------------------------------
# From (row, k) to masks


def loss_mask(k):
    """The first `k` slots are valid ("Clustering-based frame extraction"). Returns bool (NUM_FRAMES,)."""
    return np.arange(NUM_FRAMES) < k


def condition_mask(row, k):
    """The given frames of `row` in a clip of `k` frames ("Condition mask"): the row, cut at k, not rescaled.
    Returns bool (NUM_FRAMES,)."""
    return np.array(row.given, bool) & loss_mask(k)


def admissible_rows(task, k):
    """The rows of `task` that leave at least one of the first `k` frames to predict (P1 does from k = 6 on).

    A row without unknown frames would teach copying alone and report a falsely low loss to the curriculum."""
    return [row for row in TABLE7 if row.task == task and condition_mask(row, k).sum() < k]


def draw_row(task, k, rng):
    """One of the admissible rows of `task` at `k`, with probability proportional to its weight."""
    rows = admissible_rows(task, k)
    weights = np.array([row.weight for row in rows])
    return rows[rng.choice(len(rows), p=weights / weights.sum())]


def is_trained(given, k):
    """Whether a row of Table 7 shows exactly the slots in `given` at this k; none has a slot of k or more."""
    shown = [condition_mask(row, k) for task in TASKS for row in admissible_rows(task, k)]
    return any(set(np.flatnonzero(mask)) == set(given) for mask in shown)


# ------------------------------------------------------------------------------------------------------------
# Guidance dropout ("Guidance"): one network also learns the unguided noise (classifier-free guidance)

DROP_TEXT, DROP_IMAGE, DROP_BOTH = 0.10, 0.05, 0.05


def draw_dropout(rng):
    """Returns (keep_text, keep_image), two bools. Text alone is dropped with probability DROP_TEXT, the given
    frames alone with DROP_IMAGE, both with DROP_BOTH."""
    u = rng.random()
    drop_both = u < DROP_BOTH
    drop_text = drop_both or u < DROP_BOTH + DROP_TEXT
    drop_image = drop_both or DROP_BOTH + DROP_TEXT <= u < DROP_BOTH + DROP_TEXT + DROP_IMAGE
    return not drop_text, not drop_image


# ------------------------------------------------------------------------------------------------------------
# Eq. 1 under the loss mask


def masked_loss(noise_pred, noise, valid):
    """Eq. 1: squared error of the predicted noise over the valid frames, given ones included.

    noise_pred, noise: (B, F, C, H, W); valid: bool (B, F), at least one frame per sample.
    Returns float32 (B,): a mean per sample, so that a short clip weighs as much as a long one and looks no
    easier.
    """
    error = (noise_pred.float() - noise.float()).square().mean(dim=(2, 3, 4))  # (B, F)
    # Not a product with the mask: whatever a filler slot holds, even NaN, stays out.
    error = error.masked_fill(~valid, 0.0)
    return error.sum(dim=1) / valid.sum(dim=1)


# ------------------------------------------------------------------------------------------------------------
# python masks.py


def picture(given, valid):
    """Condition mask and loss mask in one text: 1 given, 0 to predict, . no frame, such as 0101...."""
    return "".join(np.where(valid, np.where(given, "1", "0"), "."))


def print_columns(name, cells):
    """One line: a name, and a cell for every k."""
    print(f"{name:3}" + "".join(f"  {cell:10}" for cell in cells).rstrip())


def main():
    print("Table 7: what each row shows the network. 1: the frame is given, 0: it is to be predicted.")
    print("Weight: how often a row is drawn, relative to the other rows of its task.\n")
    print("row  task           frames 1..8      text  weight")
    for name, task, given, text, weight in TABLE7:
        print(f"{name}   {task:13}  {' '.join(map(str, given))}  {'yes' if text else 'no':4}  {weight:6g}")

    print("\nCondition mask: the row, cut after k frames. 1: given, 0: to predict, .: no frame in this slot.")
    print("Below: given + to predict. (no): nothing is left to predict, so the row is not drawn at this k.\n")
    print_columns("row", [f"k = {k}" for k in LENGTHS])
    for row in TABLE7:
        given = {k: condition_mask(row, k) for k in LENGTHS}
        count = {k: f"{given[k].sum()} + {k - given[k].sum()}" for k in LENGTHS}
        drawn = {k: row in admissible_rows(row.task, k) for k in LENGTHS}
        print_columns(row.name, [picture(given[k], loss_mask(k)) for k in LENGTHS])
        print_columns("", [count[k] if drawn[k] else f"{count[k]} (no)" for k in LENGTHS])

    print("\nLoss mask: the first k slots count in the loss, given ones too. 1: counts, .: does not.\n")
    print_columns("", [picture(loss_mask(k), loss_mask(k)) for k in LENGTHS])


if __name__ == "__main__":
    main()
