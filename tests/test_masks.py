"""The dual masks: Table 7 row by row, masks for k < 8, admissible rows, dropout, the loss, the print-out."""

import re

import numpy as np
import pytest
import torch

import masks
from masks import (
    LENGTHS,
    NUM_FRAMES,
    TABLE7,
    TASKS,
    admissible_rows,
    condition_mask,
    draw_dropout,
    draw_row,
    loss_mask,
    masked_loss,
)

PAPER = {  # Table 7 as printed, and the text-only row that the text names
    "I1": ("interpolation", "01010101"),
    "I2": ("interpolation", "10101010"),
    "I3": ("interpolation", "10010010"),
    "P1": ("prediction", "11111000"),
    "P2": ("prediction", "00111111"),
    "G1": ("generation", "10000000"),
    "G2": ("generation", "00100000"),
    "G3": ("generation", "00100000"),
    "G4": ("generation", "10000000"),
    "G0": ("generation", "00000000"),
}
# PAPER.md's table of given / unknown frames inside the first k = 3..8 frames
GIVEN = {
    "I1": (1, 2, 2, 3, 3, 4),
    "I2": (2, 2, 3, 3, 4, 4),
    "I3": (1, 2, 2, 2, 3, 3),
    "P1": (3, 4, 5, 5, 5, 5),
    "P2": (1, 2, 3, 4, 5, 6),
    "G1": (1,) * 6,
    "G2": (1,) * 6,
    "G3": (1,) * 6,
    "G4": (1,) * 6,
    "G0": (0,) * 6,
}


def test_table7_row_by_row():
    assert [row.name for row in TABLE7] == list(PAPER)
    for row in TABLE7:
        task, given = PAPER[row.name]
        assert (row.task, "".join(map(str, row.given))) == (task, given)
        assert row.text == (row.name not in ("G3", "G4"))
    assert {row.task for row in TABLE7} == set(TASKS)
    assert list(masks.ROWS.values()) == list(TABLE7)


def test_without_condition_masks_image_and_text_are_given():
    assert masks.FIRST_FRAME is masks.ROWS["G1"] and masks.FIRST_FRAME.text
    assert condition_mask(masks.FIRST_FRAME, 3).tolist() == [True] + [False] * 7
    assert set(masks.CONDITION_MASK_ON) == {"on", "condition"} and set(masks.LOSS_MASK_ON) == {"on", "loss"}


def test_text_alone_is_half_of_generation():
    weight = {row.name: row.weight for row in TABLE7 if row.task == "generation"}
    assert weight["G0"] == sum(weight.values()) / 2


@pytest.mark.parametrize("row", TABLE7, ids=lambda row: row.name)
def test_masks_are_cut_at_k(row):
    for k, given in zip(LENGTHS, GIVEN[row.name]):
        mask = condition_mask(row, k)
        assert mask.shape == (NUM_FRAMES,) and mask.dtype == bool
        assert mask.sum() == given
        assert not mask[k:].any()
        assert (mask[:k] == np.array(row.given, bool)[:k]).all()
        assert (loss_mask(k) == ([True] * k + [False] * (NUM_FRAMES - k))).all()


def test_rows_without_anything_to_predict_are_not_drawn():
    for task in TASKS:
        for k in LENGTHS:
            names = {row.name for row in admissible_rows(task, k)}
            everything = {row.name for row in TABLE7 if row.task == task}
            assert names == everything - ({"P1"} if k <= 5 else set())


def test_rows_are_drawn_by_weight():
    drawn = [draw_row("generation", 5, np.random.default_rng((0, i))).name for i in range(4000)]
    share = {name: drawn.count(name) / len(drawn) for name in ("G0", "G1", "G2", "G3", "G4")}
    assert share["G0"] == pytest.approx(0.5, abs=0.04)  # five standard deviations
    for name in ("G1", "G2", "G3", "G4"):
        assert share[name] == pytest.approx(0.125, abs=0.03)
    assert all(draw_row("prediction", 4, np.random.default_rng((1, i))).name == "P2" for i in range(50))


def test_dropout_rates():
    kept = [draw_dropout(np.random.default_rng((0, i))) for i in range(20000)]
    expected = {(True, True): 0.8, (False, True): 0.1, (True, False): 0.05, (False, False): 0.05}
    for pair, rate in expected.items():  # (text kept, given frames kept)
        assert kept.count(pair) / len(kept) == pytest.approx(rate, abs=0.015)


def test_trained_patterns():
    assert masks.is_trained({0, 3}, 4)  # I3, cut
    assert masks.is_trained({0, 3, 6}, 8)
    assert masks.is_trained(set(), 5)
    assert not masks.is_trained({0, 7}, 8)
    assert not masks.is_trained({0, 1, 2}, 3)  # P1, cut: nothing is left to predict


def test_loss_is_a_mean_per_sample_over_valid_frames():
    pred = torch.zeros(2, NUM_FRAMES, 1, 2, 2)
    noise = torch.zeros_like(pred)
    noise[0, :3] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    noise[1] = 2.0
    valid = torch.from_numpy(np.stack([loss_mask(3), loss_mask(8)]))
    assert masked_loss(pred, noise, valid).tolist() == pytest.approx([(1 + 4 + 9) / 3, 4.0])


def test_filler_never_reaches_the_loss_or_its_gradient():
    noise = torch.randn(1, NUM_FRAMES, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    pred = torch.zeros_like(noise).requires_grad_()
    valid = torch.from_numpy(loss_mask(4))[None]
    clean = masked_loss(pred, noise, valid)
    clean.sum().backward()
    assert (pred.grad[0, 4:] == 0).all() and (pred.grad[0, :4] != 0).all()
    poisoned = noise.clone()
    poisoned[0, 4:] = float("nan")
    assert torch.equal(masked_loss(pred, poisoned, valid), clean)


# python masks.py


def test_the_printed_table_is_table_7(capsys):
    masks.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] in PAPER]
    table = {name: words for name, *words in lines if len(words) == 11}
    assert list(table) == list(PAPER) and len(lines) == 2 * len(table)
    for name, (task, *given, text, weight) in table.items():
        assert (task, "".join(given)) == PAPER[name]
        assert (text == "yes", float(weight)) == (masks.ROWS[name].text, masks.ROWS[name].weight)


def test_the_printed_masks_are_those_of_the_functions(capsys):
    masks.main()
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("row" + "".join(f"  k = {k}     " for k in LENGTHS).rstrip()) + 1
    for row, line, below in zip(TABLE7, lines[start::2], lines[start + 1 :: 2]):
        name, *pictures = line.split()
        counts = re.findall(r"(\d) \+ (\d)( \(no\))?", below)
        assert name == row.name
        for k, picture, (given, unknown, not_drawn) in zip(LENGTHS, pictures, counts, strict=True):
            assert [slot == "1" for slot in picture] == condition_mask(row, k).tolist()
            assert [slot != "." for slot in picture] == loss_mask(k).tolist()
            assert (int(given), int(given) + int(unknown)) == (condition_mask(row, k).sum(), k)
            assert bool(not_drawn) == (row not in admissible_rows(row.task, k))
    for k, picture in zip(LENGTHS, lines[-1].split(), strict=True):
        assert [slot == "1" for slot in picture] == loss_mask(k).tolist()
