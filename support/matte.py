"""
Stickers on white become stickers on nothing.

    rgba = cut_out(frames)      # (N, H, W, 3) uint8 on white -> (N, H, W, 4) uint8, straight alpha

A pixel is ground if it is nearly white and a path of such pixels leads to the picture's edge. So white eyes
stay, and so does a hole that the figure encloses: it stays white. In real stickers (lab/matte.py) seven
eighths of the enclosed white are figure. No rule from its area, whiteness, thickness or surroundings, or from
what other frames show there, told the two apart on frames that had passed a VAE, whose white is never exact.
"""

import numpy as np
from scipy.ndimage import binary_propagation, distance_transform_edt, maximum_filter

# How far below white, of 255, the weakest channel of ground may be. Of the VAE's white grounds all but one
# pixel in a thousand are within 7. A higher one eats into pale figures, a lower one leaves dirt.
NEARLY = 12
# Pixels next to the ground that may mix it with the figure: a soft edge is at most about two wide.
EDGE = 2
IN_FRAME = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], bool)  # four neighbours, never from frame to frame


def flood(allowed):
    """The places that are reached from a frame's edge through allowed ones: two bool (N, H, W)"""
    start = allowed.copy()
    start[:, 1:-1, 1:-1] = False
    return binary_propagation(start, IN_FRAME, mask=allowed)


def find_ground(ink):
    """ink: (N, H, W, 3) of 0..255, 0 on white -> bool (N, H, W): nearly white up to the picture's edge"""
    return flood(ink.max(axis=-1) <= NEARLY)


def figure_ink(ink, ground):
    """What every pixel of a frame would be without ground mixed in: its own ink, and at the edge that of the
    nearest pixel beyond it. ink: (H, W, 3), ground: bool (H, W) -> (H, W, 3)"""
    if not ground.any():
        return ink
    distance = distance_transform_edt(~ground)
    inside = distance > EDGE
    if not inside.any():  # specks alone: black, so that they get the least alpha
        return np.full_like(ink, 255)
    y, x = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    whole, touching = ink[y, x], distance < EDGE
    # An outline may be thinner than the edge: what touches the ground is held against its neighbours, too.
    whole[touching] = np.maximum(whole, maximum_filter(ink, (3, 3, 1)))[touching]
    return whole


def cut_out(frames):
    """Frames on white, uint8 (N, H, W, 3) -> uint8 (N, H, W, 4): straight alpha, 0 on the ground, and the
    figure's own colour, without white, at its edge. On white again they are the frames to within a level,
    and white where they were nearly. Each frame is on its own."""
    ink = 255.0 - frames
    ground = find_ground(ink)
    whole = np.stack([figure_ink(*pair) for pair in zip(ink, ground)])
    # ink = alpha * whole, as nearly as can be ...
    alpha = (ink * whole).sum(axis=-1) / np.maximum((whole**2).sum(axis=-1), 1)
    # ... but where the figure is white itself, that says nothing: white which is no ground is opaque,
    alpha[np.minimum(ink.max(axis=-1), whole.max(axis=-1)) <= NEARLY] = 1
    # and no channel of the unmixed colour may be below 0. Up: rounded down, alpha might fall short of that.
    alpha = np.clip(np.maximum(alpha, ink.max(axis=-1) / 255), 0, 1)
    alpha = np.where(ground, 0, np.ceil(255 * alpha) / 255)
    colour = 255 - ink / np.where(ground, 1, alpha)[..., None]
    colour[ground] = 255  # for readers that drop alpha
    return np.concatenate([colour, 255 * alpha[..., None]], axis=-1).round().astype(np.uint8)
