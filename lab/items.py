"""
The test list of an evaluation: fixed prompts and held-out clips, each with the frames that are given.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

import masks
from masks import NUM_FRAMES, ROWS
from support import stickers
from support.captions import metadata_rows
from support.common import evenly

CONDITIONED = {"image": ("G1",), "interpolation": ("I1", "I2", "I3"), "prediction": ("P1", "P2")}
FIDELITY = ("interpolation", "prediction")  # compared with the truth: sampled without chance and guidance


class Item(NamedTuple):
    task: str  # "text" or a key of CONDITIONED
    row: str  # of Table 7
    prompt: str
    clip: str  # name of the clip that gives the frames and is the ground truth; "" = none
    words: tuple  # (colour, subject, motion) of a built-in sticker; () elsewhere
    held_out: bool  # whether this combination of words was kept from the training


def given_frames(item):
    """The condition mask of an item: bool (8,)"""
    return masks.condition_mask(ROWS[item.row], NUM_FRAMES)


def word_table(folder, names):
    """{file name: (colour, subject, motion)} of a folder that support/stickers.py drew; {} for another, such
    as one without the words of all the stickers `names`."""
    metadata = Path(folder) / "metadata.jsonl"
    if not (metadata.is_file() and metadata.with_name("stickers.json").is_file()):
        return {}
    table = {}
    for _, entry in metadata_rows(metadata):
        entry = entry if isinstance(entry, dict) else {}
        name, *words = (entry.get(key) for key in ("file_name", "subject", "colour", "motion"))
        if isinstance(name, str) and tuple(words) in stickers.COMBINATIONS:
            subject, colour, motion = words
            table[name] = colour, subject, motion
    return table if set(names) <= set(table) else {}


def word_items(clips, words, num_prompts):
    """Text Items of the built-in stickers: combinations that were trained on, then held-out ones. clips: of 8
    key frames; the first that shows a combination is its ground truth."""
    order = np.random.default_rng(0).permutation(len(stickers.COMBINATIONS))
    combinations = [stickers.COMBINATIONS[i] for i in order]
    truth = {words[clip.name]: clip.name for clip in reversed(clips)}
    items = []
    for held_out in (False, True):
        wanted = [c for c in combinations if stickers.is_held_out(*c) == held_out][: num_prompts // 2]
        for subject, colour, motion in wanted:
            prompt = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {subject} {motion}"
            shown = colour, subject, motion
            items.append(Item("text", "G0", prompt, truth.get(shown, ""), shown, held_out))
    return items


def make_test_list(dataset, words, num_prompts, num_clips, dual_masks):
    """The Items, task by task. `words`: of word_table. A model without condition masks knows text and image,
    but neither interpolation nor prediction."""
    clips = [clip for clip in dataset.clips if clip.longest == NUM_FRAMES]
    held_out = [clip for clip in clips if clip.split == "validation"]
    if words:
        items = word_items(clips, words, num_prompts)
    else:
        captioned = evenly([clip for clip in held_out if clip.caption], num_prompts)
        items = [Item("text", "G0", clip.caption, clip.name, (), True) for clip in captioned]
    for task, rows in CONDITIONED.items() if dual_masks else [("image", CONDITIONED["image"])]:
        for i, clip in enumerate(evenly(held_out, num_clips)):
            shown = words.get(clip.name, ())
            items.append(Item(task, rows[i % len(rows)], clip.caption, clip.name, shown, True))
    return items
