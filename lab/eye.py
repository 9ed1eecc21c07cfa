"""
What a person sees in a frame and no error against the truth tells: a number for each frame, uint8
(N, R, R, 3) of 0..255 -> float (N,). A sticker is a figure of few colours with a dark closed outline on white
ground. Real clips say how much of each measure is right, since they too have soft edges, and lines beside a
figure that shakes.

    grain       how rough the calmest part of the figure is, which is flat in real clips
    patches     how far the figure's colour strays, at any scale
    specks      ink on the white ground beside the figure
    edges       how far the light falls across the figure's border within two pixels: sharp and dark outlines
    leak        share of the figure's colour that the ground's flood reaches: no closed outline is around it
    pieces      how many there are in a frame
    looks       colour, size and outline of the figure: what given frames tell of the unknown ones
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import label

from support.matte import IN_FRAME, flood

INKED = 64  # a pixel belongs to something if its weakest channel is this far below white
DARK = 128  # a pixel is outline if its strongest channel is below this; colours have one above it
COLOURFUL = 64  # a pixel has colour if its channels differ by more than this
CALM = 0.25  # share of a figure's pixels that are flat in every real clip, small and detailed ones included
SMALLEST = 3  # pixels of a piece that counts

# ------------------------------------------------------------------------------------------------------------
# Maps of frames: (N, R, R)


def ink(frames):
    """255 less the weakest channel: 0 on white."""
    return 255 - frames.min(axis=-1).astype(int)


def light(frames):
    """The strongest channel: high on white and in every colour, low in an outline."""
    return frames.max(axis=-1).astype(int)


def is_colourful(frames):
    return light(frames) - frames.min(axis=-1) > COLOURFUL


def largest(x, reach):
    """The largest value in the (2 reach + 1)^2 places around each."""
    x = torch.as_tensor(x, dtype=torch.float32)[:, None]
    return F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach)[:, 0].numpy()


def roughness(frames):
    """The standard deviation in the 3 x 3 pixels around each, as a mean over colour channels."""
    x = torch.as_tensor(frames).permute(0, 3, 1, 2).double()

    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    return (mean(x.square()) - mean(x).square()).clamp(min=0).sqrt().mean(dim=1).numpy()


def connected(mask):
    """Pieces of a mask, connected in four directions within a frame.
    Returns labels int (N, R, R), 0 where the mask is not set, and the size of each label, 0 of label 0."""
    cross = np.pad(IN_FRAME, ((1, 1), (0, 0), (0, 0)))  # label wants three frames
    labels, count = label(mask, cross)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return labels, sizes


def figure_and_pieces(frames):
    """The largest piece of ink in a frame with all that it encloses, bool (N, R, R); how many pieces (N,)"""
    labels, sizes = connected(ink(frames) > INKED)
    largest_piece = np.zeros(labels.shape, bool)
    counts = np.zeros(len(frames))
    for i, frame in enumerate(labels):
        mine = np.unique(frame[frame > 0])
        if len(mine):
            largest_piece[i] = frame == mine[sizes[mine].argmax()]
            counts[i] = (sizes[mine] >= SMALLEST).sum()
    return ~flood(~largest_piece), counts


def mean_where(x, mask):
    """The mean of x at the places of mask, 0 without any: two (N, R, R) -> (N,)"""
    return np.where(mask, x, 0).sum(axis=(1, 2)) / np.maximum(mask.sum(axis=(1, 2)), 1)


# ------------------------------------------------------------------------------------------------------------
# Measures


def grain(frames):
    """Standard deviation in 3 x 3 pixels, of 255: the mean over the calmest quarter of what is inked."""
    values = np.zeros(len(frames))
    for i, (rough, inked) in enumerate(zip(roughness(frames), ink(frames) > INKED)):
        if inked.any():
            calm = np.sort(rough[inked])
            values[i] = calm[: int(CALM * len(calm)) + 1].mean()
    return values


def patches(frames):
    """Median distance of the colourful pixels of a frame from their median colour, of 255."""
    values = np.zeros(len(frames))
    for i, (frame, mask) in enumerate(zip(frames, is_colourful(frames))):
        if mask.any():
            x = frame[mask].astype(float)
            values[i] = np.median(np.abs(x - np.median(x, axis=0)).mean(axis=1))
    return values


def looks(frames):
    """What given frames tell of the unknown ones: {"colour": (N, 3), the median of what is colourful, of 255;
    "size": (N,), inked pixels; "outline": (N,), the share of them that is dark}"""
    inked, colour = ink(frames) > INKED, np.full((len(frames), 3), 255.0)
    for i, mask in enumerate(is_colourful(frames)):
        if mask.any():
            colour[i] = np.median(frames[i][mask], axis=0)
    size = inked.sum(axis=(1, 2)).astype(float)
    return dict(colour=colour, size=size, outline=mean_where(light(frames) < DARK, inked))


def strayed(clip, given):
    """How far the unknown frames of a clip are from its given ones, bool (F,): colour, of 255, and size and
    outline, in percent of the mean over given frames."""
    seen = {name: (x[given].mean(axis=0), x[~given].mean(axis=0)) for name, x in looks(clip).items()}
    (colour, its_colour), (size, its_size), (outline, its_outline) = seen.values()
    return dict(
        colour=float(np.abs(colour - its_colour).mean()),
        size=float(100 * abs(its_size - size) / max(size, 1)),
        outline=float(100 * abs(its_outline - outline) / max(outline, 0.01)),
    )


def see(frames):
    """{measure: (N,)} of what is listed above, but for `looks`."""
    figure, pieces = figure_and_pieces(frames)
    bright = light(frames)
    border = (largest(figure, 1) > 0) & ~figure  # ground that touches the figure
    fall = largest(bright, 2) + largest(-bright, 2)
    return dict(
        grain=grain(frames),
        patches=patches(frames),
        specks=mean_where(ink(frames), largest(figure, 2) == 0),
        edges=mean_where(fall, border),
        leak=mean_where(flood(bright >= DARK), is_colourful(frames)),
        pieces=pieces,
    )
