"""
Stickers for measuring alone: built-in ones of exactly 8 distinct frames, of combinations of words that are
never trained on.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import load_clip
from masks import NUM_FRAMES
from support import stickers
from support.common import default_cache
from support.folder import Sticker

COUNT = 96  # of stickers
RESOLUTION = 64  # at which the frames of a clip have to be distinct


def draw_test_stickers(root=None, half=None):
    """Draws COUNT of them into `root` (default: the user's cache), unless they are there. Returns the folder:
    GIFs and metadata.jsonl, all of the split "validation". half: 1 or 2, of the words of stickers.half"""
    count, suffix = COUNT, f"-half{half}" if half else ""
    folder = Path(root or default_cache()) / f"test-stickers-v{stickers.VERSION}-n{count}{suffix}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    words = stickers.half(half) if half else stickers.COMBINATIONS
    words = [combination for combination in words if stickers.is_held_out(*combination)]
    order, lines, i = np.random.default_rng((0, 80)).permutation(len(words)), [], 0
    with tqdm(desc="drawing test stickers", total=count, unit="GIF", disable=None) as bar:
        while len(lines) < count:
            subject, colour, motion = words[order[i % len(words)]]
            rng, path = np.random.default_rng((0, 81, i)), part / f"test-{i:03d}.gif"
            i += 1
            caption = stickers.caption(subject, colour, motion, rng)
            stickers.save_gif(*stickers.draw_clip(subject, colour, motion, rng, NUM_FRAMES), path)
            clip = load_clip(Sticker(path, path.name, caption, "validation"), RESOLUTION)
            if isinstance(clip, str) or clip.count != NUM_FRAMES or NUM_FRAMES not in clip.key_frames:
                path.unlink()  # two of its frames are the same
                continue
            line = dict(file_name=path.name, text=caption, subject=subject, colour=colour, motion=motion)
            lines.append(json.dumps(dict(line, split="validation")) + "\n")
            bar.update()
    (part / "metadata.jsonl").write_text("".join(lines))
    part.chmod(0o755)  # a temporary folder is private
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process drew them meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
