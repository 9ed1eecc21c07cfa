"""
A judge that reads colour, subject and motion off a clip of the built-in stickers: does a sample show what its
prompt asks for?

    judge = get_judge(codec, resolution, cache_dir)    # trains in a minute or two, once
    judge.read(clips)          # uint8 (B, 8, R, R, 3) -> [("red", "heart", "bouncing"), ...]

It is trained on freshly drawn stickers (`support/stickers.py`, seeds of its own) of the training combinations
only: the key frames that a model is trained to generate, half of them after the codec's round trip. So the
held-out combinations, and every file of the default set, are new to it. Colour is plain hue statistics.
Subject and motion come from a small network that sees no hue. What moves like none of the eight motions, a
frozen clip for instance, is read as "none".
"""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from data import extract_key_frames, thumbnails
from masks import NUM_FRAMES
from support import media, stickers
from support.common import locked, replacing

VERSION = 3  # raise it when the judge or its training changes: cached judges are then trained anew
SIDE = 64  # pixels; clips of another resolution are resized
NONE = "none"  # the motion of what moves like none of the eight, the colour of what has none
COLOURS, SUBJECTS, MOTIONS = list(stickers.COLOURS), list(stickers.SUBJECTS), [*stickers.MOTIONS, NONE]
ATTRIBUTES = ("colour", "subject", "motion")
CHANCE = dict(zip(ATTRIBUTES, (1 / len(COLOURS), 1 / len(SUBJECTS), 1 / len(stickers.MOTIONS))))

TRAINING_SEED, EXAM_SEED = 1001, 1002  # of support/stickers.py; the default set has seed 0
LAPS, EXAM_LAPS = 6, 4  # clips per training combination, clips per held-out combination
EPOCHS, BATCH, LEARNING_RATE = 14, 64, 3e-3
SPOILED = 0.2  # share of a training batch that is frozen or shuffled, and must be read as "none"

# ------------------------------------------------------------------------------------------------------------
# Clips to learn from


def draw_key_frames(job, resolution):
    """job: (subject, colour, motion, seed, index) -> the 8 key frames of a new sticker, uint8 (8, R, R, 3),
    in the way of data.py but without the GIF's palette."""
    *words, seed, index = job
    rng = np.random.default_rng((seed, index))
    while True:  # until the clip has 8 distinct frames; lengths as in the default set, from 8 on
        count = min(40, round(NUM_FRAMES * np.exp(0.65 * abs(rng.standard_normal()))))
        pictures, _ = stickers.draw_clip(*words, rng, num_frames=count)
        frames = np.stack([media.on_white(picture, resolution) for picture in pictures])
        key_frames = extract_key_frames(thumbnails(frames), lengths=[NUM_FRAMES])
        if key_frames:
            return frames[key_frames[NUM_FRAMES]]


def combinations(held_out):
    """The combinations of words that are trained on, or those that never are: [(subject, colour, motion)]."""
    return [words for words in stickers.COMBINATIONS if stickers.is_held_out(*words) == held_out]


def draw_clips(wanted, seed, resolution, num_workers=0):
    """A new clip for each of `wanted`, a list of (subject, colour, motion).
    Returns (clips uint8 (N, 8, R, R, 3), [(colour, subject, motion)])."""
    jobs = [(*words, seed, i) for i, words in enumerate(wanted)]
    draw = partial(draw_key_frames, resolution=resolution)
    progress = partial(tqdm, desc="drawing stickers for the judge", total=len(jobs), unit="clip")
    if num_workers > 1:
        # One thread each, as in support/workers.py: forked processes have none of torch's others.
        with ProcessPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            clips = list(progress(pool.map(draw, jobs, chunksize=16)))
    else:
        clips = [draw(job) for job in progress(jobs)]
    return np.stack(clips), [(colour, subject, motion) for subject, colour, motion, *_ in jobs]


def round_trip(codec, clips, batch=32):
    """Clips as the codec gives them back: what a perfect model would generate. uint8 (N, 8, R, R, 3) -> the
    same."""
    parts = []
    for i in range(0, len(clips), batch):
        frames = torch.from_numpy(clips[i : i + batch])
        parts.append(codec.decode(codec.encode(frames.flatten(0, 1))).cpu().numpy().reshape(frames.shape))
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_colour(clip):
    """The word whose hue most colourful pixels of a clip are nearest to. clip: uint8 (F, R, R, 3)."""

    def in_hsv(pixels):
        return np.asarray(Image.fromarray(pixels).convert("HSV")).reshape(-1, 3).T.astype(int)

    hue, saturation, value = in_hsv(clip.reshape(-1, 1, 3))
    hue = hue[(saturation > 90) & (value > 90)]
    if len(hue) < 0.005 * clip[..., 0].size:
        return NONE
    names = in_hsv(np.uint8([list(stickers.COLOURS.values())]))[0]
    distance = np.abs((hue[:, None] - names + 128) % 256 - 128)  # (pixels, 6), on the circle of hues
    return COLOURS[np.bincount(distance.argmin(axis=1), minlength=len(names)).argmax()]


def without_hue(clips):
    """uint8 (B, F, R, R, 3) -> float (B, F, 2, SIDE, SIDE): the strongest and the weakest of the three inks,
    from 0 on white to 1. Light and saturation are kept, hue is lost: a subject looks the same in every
    colour."""
    x = torch.as_tensor(clips)
    x = 1 - torch.stack([x.amax(dim=-1), x.amin(dim=-1)], dim=2).float() / 255
    if x.shape[-1] != SIDE:
        x = F.interpolate(x.flatten(0, 1), (SIDE, SIDE), mode="area").unflatten(0, x.shape[:2])
    return x


class Judge(nn.Module):
    """Every frame through a small convolutional network; the mean over frames tells the subject, their
    sequence the motion."""

    def __init__(self, width=64):
        super().__init__()
        layers, channels = [], (2, width // 4, width // 2, width, width)
        for c_in, c_out in zip(channels, channels[1:]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(4, c_out), nn.ReLU()]
        last = nn.Linear(width * (SIDE // 16) ** 2, 2 * width)
        self.frame = nn.Sequential(*layers, nn.Flatten(), last, nn.ReLU())
        self.subject = nn.Linear(2 * width, len(SUBJECTS))
        self.sequence = nn.Sequential(
            nn.Conv1d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * NUM_FRAMES, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, len(MOTIONS)),
        )

    def forward(self, x):
        """x: what `without_hue` gives, of 8 frames. Returns logits (B, subjects), (B, motions and "none")."""
        h = self.frame(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, F, 2 width)
        return self.subject(h.mean(dim=1)), self.sequence(h.transpose(1, 2))

    @torch.no_grad()
    def read(self, clips, batch=64):
        """clips: uint8 (B, 8, R, R, 3) -> B tuples (colour, subject, motion)."""
        words = []
        for i in range(0, len(clips), batch):
            part = np.asarray(clips[i : i + batch])
            subject, motion = (logits.argmax(dim=1).tolist() for logits in self(without_hue(part)))
            for clip, s, m in zip(part, subject, motion):
                words.append((read_colour(clip), SUBJECTS[s], MOTIONS[m]))
        return words


def accuracy(readings, words):
    """The share of clips whose attribute is read right. Two lists of tuples -> {attribute: 0..1}."""
    right = np.array([[r == w for r, w in zip(*pair)] for pair in zip(readings, words)])  # (N, 3)
    return dict(zip(ATTRIBUTES, right.mean(axis=0).tolist()))


# ------------------------------------------------------------------------------------------------------------
# Training


def augment(x, motion, shaking, rng):
    """A batch (B, F, 2, SIDE, SIDE) shifted, blurred and made noisy, as samples of a model may be; a fifth of
    it frozen or shuffled, which are no motion. Shaking stays unshuffled: it changes sides at every frame
    anyway."""
    frames = x.shape[1]
    for b in range(len(x)):
        spoil = rng.random() / SPOILED
        if spoil < 0.5:
            x[b] = x[b, rng.integers(frames)].clone()
            motion[b] = MOTIONS.index(NONE)
        elif spoil < 1 and motion[b] != shaking:
            x[b] = x[b, torch.from_numpy(rng.permutation(frames))]
            motion[b] = MOTIONS.index(NONE)
        x[b] = x[b].roll(tuple(rng.integers(-3, 4, size=2)), dims=(2, 3))
        if rng.random() < 0.4:
            small = F.avg_pool2d(x[b], 3, stride=1, padding=1)
            x[b] = F.avg_pool2d(small, 3, stride=1, padding=1) if rng.random() < 0.5 else small
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.08, size=(len(x), 1, 1, 1, 1)).astype(np.float32))
    return x + strength * noise, motion


def train_judge(clips, words, epochs=EPOCHS, width=64, seed=0):
    """clips: uint8 (N, 8, R, R, 3); words: N tuples (colour, subject, motion). Returns a Judge."""
    torch.manual_seed(seed)
    judge = Judge(width).train()
    subject = torch.tensor([SUBJECTS.index(s) for _, s, _ in words])
    motion = torch.tensor([MOTIONS.index(m) for *_, m in words])
    batch = min(BATCH, len(clips))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    steps = epochs * (len(clips) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.15)
    bar = tqdm(desc="training the judge", total=steps, unit="step")
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(clips))
        for i in range(len(clips) // batch):
            mine = order[i * batch : (i + 1) * batch]
            rng = np.random.default_rng((seed, epoch, i))
            x, m = augment(without_hue(clips[mine]), motion[mine].clone(), MOTIONS.index("shaking"), rng)
            subject_logits, motion_logits = judge(x)
            loss = F.cross_entropy(subject_logits, subject[mine]) + F.cross_entropy(motion_logits, m)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return judge.eval()


def load_judge(path):
    """The judge of a file, or None where there is none or a damaged one."""
    judge = Judge()
    with suppress(OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError):
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    return None


def get_judge(codec, resolution, cache_dir, num_workers=0):
    """The judge for clips of this resolution and shape of latents: from the cache, else drawn for, trained
    and put there, by one process while others wait. The weights of the codec do not matter: `examine` is held
    with the codec at hand."""
    kind = f"{codec.latent_channels} {codec.factor}"
    key = hashlib.sha256(f"{VERSION} {stickers.VERSION} {kind} {resolution}".encode()).hexdigest()[:20]
    path = Path(cache_dir) / f"judge-{key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if (judge := load_judge(path)) is None:  # only then: a cache that has all may be read-only
        with locked(path.with_suffix(".lock"), wait=True):
            if (judge := load_judge(path)) is None:
                clips, words = draw_clips(combinations(False) * LAPS, TRAINING_SEED, resolution, num_workers)
                clips[::2] = round_trip(codec, clips[::2])
                judge = train_judge(clips, words)
                with replacing(path) as writing:
                    torch.save(judge.state_dict(), writing)
    return judge


def examine(judge, codec, resolution, more=None, num_workers=0):
    """The judge's own accuracy on real clips of held-out combinations: new ones, and `more`, a pair (clips,
    words) of held-out clips of the data set. Returns {"clips": N, "raw": {attribute: share}, "round trip":
    {...}}."""
    clips, words = draw_clips(combinations(True) * EXAM_LAPS, EXAM_SEED, resolution, num_workers)
    if more is not None and len(more[0]):
        clips, words = np.concatenate([clips, more[0]]), words + list(more[1])
    seen = {"raw": clips, "round trip": round_trip(codec, clips)}
    return dict(clips=len(clips), **{name: accuracy(judge.read(x), words) for name, x in seen.items()})
