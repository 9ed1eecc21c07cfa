"""
A simulation in place of a training: what does the curriculum's feedback do to a loss?

$ python -m lab.simulate_curriculum                          # a table: simulated learners, three strategies
$ python -m lab.simulate_curriculum --plot curriculum.png    # the same as a picture

The loss of a step is the mean over a batch whose levels are drawn from the curriculum's probabilities:

    loss = base(t) * exp(disturbance(t)) * mean over the batch of [ (1 + (D - 1/2)) * exp(z - 1/2) ]

  - base falls from 1.0, an untrained eps-prediction, to 0.06 as a power law, as a diffusion training does.
  - D is the level's difficulty; the hardest level loses three times as much as the easiest. Plausible: the
    loss counts the given frames too, which cost next to nothing, and by Table 7 a quarter to all of them
    are unknown. The paper's ranking holds exactly here; where it does not, the damping is weaker.
  - z ~ N(0, 1), in all plants but "quiet": an item's loss mostly tells its diffusion step, and varies by more
    than its mean. In "quiet" only the draw of the levels is random.
  - disturbance: none in "quiet" and "noise", otherwise see there. The batch of 16 is the paper's.
"""

import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from curriculum import (
    DIFFICULTY,
    HORIZON,
    OUTPUT,
    STATE,
    balance,
    difficulty_map,
    feedback,
    static_probabilities,
)
from masks import LENGTHS, TASKS
from support.common import one_sentence
from support.flags import Parser
from support.pictures import check_png

matplotlib.use("Agg")

PLANTS = ("quiet", "noise", "slow", "steps")  # the simulated learners
ARMS = ("none", "linear", "dcl", "dcl, no feedback")  # the last, a control: target fixed at 0.5


def disturbance(previous, innovation, step, phase):
    """log factors on a step's loss, from those of the step before; equal for all arms: (plants, seeds)."""
    # slow: a hard stretch of data. Autoregressive: 10 % standard deviation, remembered for 300 steps.
    rho = math.exp(-1 / 300)
    slow = 0.10 * innovation
    if previous is not None:
        slow = rho * previous[2] + math.sqrt(1 - rho**2) * slow
    # steps: shards of data that are in turn 15 % harder and 15 % easier, 700 steps each.
    steps = np.where((step + phase) // 700 % 2 == 0, 0.15, -0.15)
    return np.stack([0 * slow, 0 * slow, slow, steps])


def arm_probabilities(progress, target):
    """P(task, k) of every arm: (plants, arms, seeds, 3, 6).

    progress: 0..1 of the training. target: the target difficulty of dcl, (plants, seeds).
    """
    static = static_probabilities(progress)
    plants, seeds = target.shape
    P = np.empty((plants, len(ARMS), seeds, *DIFFICULTY.shape))
    P[:, 0] = 1 / DIFFICULTY.size
    P[:, 1] = static[:, None] / len(LENGTHS)
    P[:, 2] = balance(static, difficulty_map(target))
    P[:, 3] = balance(static, difficulty_map(0.5))
    return P


def batch_loss(P, level_draw, z):
    """The undisturbed loss of a step, relative to base: (plants, arms, seeds).

    P: (plants, arms, seeds, 3, 6). level_draw: uniform in 0..1, z: standard normal, both (seeds, batch) and
    equal for all arms. Levels are drawn through the inverse of their cumulative probabilities, easy to hard.
    """
    order = np.argsort(DIFFICULTY, axis=None, kind="stable")
    item_loss = 0.5 + DIFFICULTY.ravel()[order]  # (18,) = 1 + (D - 1/2)
    edges = P.reshape(*P.shape[:3], -1)[..., order].cumsum(-1)[..., None, :-1]  # (plants, arms, seeds, 1, 17)
    loss = item_loss[(level_draw[..., None] > edges).sum(-1)]  # (plants, arms, seeds, batch)
    loss[1:] *= np.exp(z - 0.5)  # all plants but "quiet"
    return loss.mean(-1)


def simulate(seeds=range(8), total_steps=10_000, batch_size=16):
    """Train every (plant, arm, seed) for `total_steps`; returns a dict of arrays, the step first.

    "relative_loss" (steps, plants, arms, seeds) is the loss divided by "base" (steps,), its undisturbed
    course. Of the first seed alone: "task" (steps, plants, arms, 3), "mean_k" (steps, plants, arms), and "p",
    "i", "d", "target" (steps, plants). All arms and plants see the same random numbers: two arms differ by
    their curriculum and nothing else.
    """
    shape = (len(PLANTS), len(ARMS), len(seeds))
    phase = np.array([np.random.default_rng((seed, 0, 1)).integers(1400) for seed in seeds])  # of "steps"
    initial = {name: np.full((len(PLANTS), len(seeds)), value) for name, value in (STATE | OUTPUT).items()}
    state, output = {**initial, "count": 0}, initial
    log = {name: np.empty((total_steps, len(PLANTS))) for name in ("p", "i", "d", "target")}
    log["base"] = base = 0.05 + 0.95 / (1 + np.arange(total_steps) / 100)
    log["relative_loss"] = np.empty((total_steps, *shape))
    log["task"] = np.empty((total_steps, *shape[:2], 3))
    log["mean_k"] = np.empty((total_steps, *shape[:2]))
    log_factor = None
    for step in range(total_steps):
        draws = [np.random.default_rng((seed, step, 0)) for seed in seeds]
        level_draw = np.stack([rng.random(batch_size) for rng in draws])  # (seeds, batch)
        z = np.stack([rng.standard_normal(batch_size + 1) for rng in draws])
        log_factor = disturbance(log_factor, z[:, -1], step, phase)  # (plants, seeds)
        P = arm_probabilities(step / max(total_steps - 1, 1), output["target"])
        loss = batch_loss(P, level_draw, z[:, :-1]) * np.exp(log_factor)[:, None]  # (plants, arms, seeds)

        log["relative_loss"][step] = loss
        log["task"][step] = P[:, :, 0].sum(-1)
        log["mean_k"][step] = P[:, :, 0].sum(-2) @ LENGTHS
        for name in ("p", "i", "d", "target"):
            log[name][step] = output[name][:, 0]  # what this step was drawn with
        state, output = feedback(state, base[step] * loss[:, 2])
    return log


def moving_mean(x, window):
    """Mean over `window` neighbours along the first axis -> window - 1 fewer rows."""
    total = np.cumsum(np.concatenate([np.zeros_like(x[:1]), x]), axis=0)
    return (total[window:] - total[:-window]) / window


def detrend(relative_loss, window=2 * HORIZON + 1):
    """log loss over its known undisturbed course, minus its centred moving mean: `window` - 1 fewer rows.

    What moves slower than the window is trend: the static part's, and the feedback's own (its history looks
    back one horizon, so it cannot hold the loss for longer, and should not).
    """
    log_loss = np.log(relative_loss)
    return log_loss[window // 2 : len(log_loss) - window // 2] - moving_mean(log_loss, window)


def measure(relative_loss):
    """ "spread", "slow" and "straight" of each (plant, arm, seed), in units of log loss (0.01 = 1 %).

    spread:   standard deviation of the detrended loss;
    slow:     the same after a moving mean over 100 steps: the amplitude of its slow swings;
    straight: as spread, but with a straight line as the only trend. The strictest view: it also blames the
              feedback for the course of thousands of steps that the difficulty takes while the loss falls.
    """
    residual, log_loss = detrend(relative_loss), np.log(relative_loss)
    time = np.linspace(-1, 1, len(log_loss))
    slope = np.tensordot(time, log_loss, 1) / (time @ time)
    return dict(
        spread=residual.std(0),
        slow=moving_mean(residual, 100).std(0),
        straight=(log_loss - time[:, None, None, None] * slope).std(0),
    )


HEADER = """\
       |              spread: every step                  |   slow swings: 100-step mean    |  straight line
plant  |   none  linear     dcl  no fb.      dcl/linear   |  linear     dcl      dcl/linear   |    dcl/linear
"""


def print_table(measured):
    """One line per plant: mean over the seeds, and dcl against linear (with the worst seed in brackets)."""

    def ratio(name, plant):
        _, linear, dcl, _ = measured[name][plant]
        return f"{dcl.mean() / linear.mean():8.3f} ({(dcl / linear).max():.3f})"

    seeds = measured["spread"].shape[-1]
    print(f"standard deviation of the detrended log loss, mean over {seeds} seeds (worst seed in brackets);")
    print("no fb.: dcl with its target fixed at 0.5; straight line: spread if nothing else counts as trend")
    print(HEADER, end="")
    for plant, name in enumerate(PLANTS):
        spread, slow = measured["spread"][plant].mean(-1), measured["slow"][plant].mean(-1)
        spreads = "".join(f"{value:8.4f}" for value in spread) + ratio("spread", plant)
        swings = f"{slow[1]:8.4f}{slow[2]:8.4f}" + ratio("slow", plant)
        print(f"{name:6s} |{spreads} |{swings} |{ratio('straight', plant)}")


# ------------------------------------------------------------------------------------------------------------
# The picture: a column per plant, a row of panels per function

STYLES = (  # of none, linear, dcl
    dict(color="#c4c4c4", label="none", linewidth=4),
    dict(color="#e6801a", label="linear"),
    dict(color="#1f5fa8", label="dcl"),
)
TASK_COLORS = ("#1b9e77", "#7570b3", "#d6337c")
TERM_COLORS = dict(p="#1f5fa8", i="#1b9e77", d="#e6a700")
TITLES = (
    "quiet: only the draw\nof the levels is random",
    "noise: independent noise\non every item",
    "slow: and a disturbance\nremembered for 300 steps",
    "steps: and ±15 %\nin turns of 700 steps",
)


def draw_loss(axes, log):
    loss = moving_mean(
        log["base"][:, None, None] * log["relative_loss"][..., 0], 100
    )  # (steps, plants, arms)
    steps = 50 + np.arange(len(loss))
    for plant, axis in enumerate(axes):
        axis.set_title(TITLES[plant], pad=10)
        for arm, style in enumerate(STYLES):
            axis.semilogy(steps, loss[:, plant, arm], **style)
    axes[0].set(ylabel="loss\n(100-step mean)", xlim=(0, len(log["base"])), ylim=(0.04, 1))
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    axes[0].set(yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    axes[0].set_xticks(np.arange(len(log["base"]))[:: len(log["base"]) // 4])
    axes[0].minorticks_off()
    axes[0].legend()


def draw_swings(axes, log, slow):
    """slow: measured, mean over seeds, (plants, arms)."""
    swings = 100 * moving_mean(detrend(log["relative_loss"][..., :1])[..., 0], 100)  # (steps, plants, arms)
    steps = HORIZON + 50 + np.arange(len(swings))
    for plant, axis in enumerate(axes):
        for arm in (1, 2):
            label = f"{ARMS[arm]} {100 * slow[plant, arm]:.1f}"
            axis.plot(steps, swings[:, plant, arm], color=STYLES[arm]["color"], label=label)
        axis.legend(title="standard deviation", ncols=2, loc="upper center", columnspacing=1)
    axes[0].set(ylabel="its slow swings, %\n(detrended)", ylim=(-30, 55))


def draw_tasks(axes, log):
    for plant, axis in enumerate(axes):
        for task, color in enumerate(TASK_COLORS):
            axis.plot(log["task"][:, plant, 2, task], color=color, label=TASKS[task])
            axis.plot(log["task"][:, plant, 1, task], color=color, linestyle="--")
    axes[0].set(ylabel="P(task)", ylim=(0.1, 0.8))
    axes[0].legend(title="solid: dcl, dashed: linear", loc="upper left", labelspacing=0.1)


def draw_mean_k(axes, log):
    for plant, axis in enumerate(axes):
        for arm, style in enumerate(STYLES):
            axis.plot(log["mean_k"][:, plant, arm], **style)
    axes[0].set_ylabel("mean k")


def draw_terms(axes, log):
    for plant, axis in enumerate(axes):
        for name, color in TERM_COLORS.items():
            axis.plot(log[name][:, plant], color=color, label=name.upper())
    axes[0].set(ylabel="terms of Eq. 4", ylim=(-5, 2))
    axes[0].legend(ncols=3, loc="lower right")


def draw_target(axes, log):
    for plant, axis in enumerate(axes):
        axis.plot(log["target"][:, plant], color=STYLES[2]["color"])
        axis.axhline(0.5, color="black", linewidth=1, linestyle=":")
        axis.set_xlabel("training step")
    axes[0].set(ylabel="target\ndifficulty u", ylim=(0, 1))
    axes[0].text(0.97, 0.9, "harder next", transform=axes[0].transAxes, ha="right")
    axes[0].text(0.97, 0.06, "easier next", transform=axes[0].transAxes, ha="right")


def draw_plot(log, measured, path):
    """Draw the first seed as a PNG: what the feedback sees and does. Numbers in it are means over seeds."""
    slow = measured["slow"].mean(-1)  # (plants, arms)
    damping = 100 * (1 - slow[:, 2] / slow[:, 1])  # (plants,)
    font = {"font.size": 13, "axes.titlesize": 13, "legend.fontsize": 11.5, "legend.title_fontsize": 11.5}
    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context({**font, **look, "lines.linewidth": 1.3, "legend.handlelength": 1.2}):
        figure, axes = plt.subplots(6, 4, figsize=(14, 15), sharex=True, sharey="row", layout="constrained")
        draw_loss(axes[0], log)
        draw_swings(axes[1], log, slow)
        draw_tasks(axes[2], log)
        draw_mean_k(axes[3], log)
        draw_terms(axes[4], log)
        draw_target(axes[5], log)
        figure.align_ylabels(axes[:, 0])
        figure.suptitle(
            "The curriculum's feedback draws easier samples when the loss runs above its course,\n"
            "harder ones when below: slow swings of a disturbed loss shrink by "
            f"{damping[2]:.0f} % (slow) and {damping[3]:.0f} % (steps)",
            fontsize=16.5,
        )
        figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def parse_args():
    parser = Parser(description="Simulate what the curriculum's feedback does to a loss.")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the simulation to this PNG file")
    args = parser.parse_args()
    if args.plot:
        check_png("--plot", args.plot)
    return args


def main():
    with one_sentence("lab.simulate_curriculum"):
        args = parse_args()
        log = simulate()
        measured = measure(log["relative_loss"])
        print_table(measured)
        if args.plot:
            draw_plot(log, measured, args.plot)


if __name__ == "__main__":
    main()
