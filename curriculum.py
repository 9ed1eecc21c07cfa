"""
The difficulty-adaptive curriculum: which task and how many frames the next training step draws.
No network in here.

$ python curriculum.py                          # a table: what the feedback does to four simulated learners
$ python curriculum.py --plot curriculum.png    # the same as a picture

A sample's difficulty has two sides: its task (interpolation < prediction < generation) and its number of
valid frames k (3 < ... < 8), together 18 levels. The curriculum gives each level a probability, half from
  - a static part (Eq. 2): the share of interpolation falls over the training, the others rise; k is uniform;
  - an adaptive part (Eqs. 3-4): a feedback loop reads the training loss. Loss above its usual distance to
    its history -> easier samples next, below -> harder ones. So it damps swings, as a PID controller does.
"""

import math

import numpy as np

from masks import LENGTHS, TASKS

STRATEGIES = ("none", "linear", "dcl")

STATIC_START = np.array([0.5, 0.2, 0.3])  # P(task) at the first step of the training ...
STATIC_END = np.array([0.2, 0.3, 0.5])  # ... and at the last one
K_P, K_I, K_D = 5.0, 3.0, 1.3  # feedback constants (Table 6)
SMOOTHING = 20  # steps; one step's loss mostly tells its timesteps
HORIZON = 1000  # steps; how far "history" and the integral look back
KERNEL_WIDTH = 0.25  # of the adaptive part, in units of difficulty
ADAPTIVE_WEIGHT = 0.5  # w, balance of the static and the adaptive part
LARGEST_LOSS = 1e30  # a larger one counts as this: nothing overflows

# Difficulty of the 18 levels, from 0 (interpolation, k = 3) to 1 (generation, k = 8); both sides weigh alike.
DIFFICULTY = 0.5 * np.linspace(0, 1, len(TASKS))[:, None] + 0.5 * np.linspace(0, 1, len(LENGTHS))  # (3, 6)

# ------------------------------------------------------------------------------------------------------------
# The equations. Arguments are floats, or arrays of any shape that are treated element by element.


# Eq. 2
def static_probabilities(progress):
    """P(task) at `progress` 0..1 of the training -> (3,). Interpolation only falls, the others only rise."""
    return STATIC_START + (STATIC_END - STATIC_START) * progress


# Eq. 3
def loss_signal(L_c, history):
    """L_s, the current loss relative to its history (so no scale has to be tuned), within -HORIZON..HORIZON.

    Losses >= 0 never reach these limits: the history holds at least 1/HORIZON of the current loss. Both zero
    give 0.
    """
    return np.clip((L_c - history) / np.maximum(np.abs(history), 1e-30), -HORIZON, HORIZON)


# Eq. 4
def feedback_terms(L_s, integral, derivative):
    """The three terms whose sum is P*: proportional, integral (a mean), derivative (difference per step)."""
    return K_P * L_s, K_I * integral, K_D * derivative


# P* -> u
def target_difficulty(P_star, P_star_mean):
    """sigmoid(-(P* - its mean)) in [0, 1]. As tanh, since exp would overflow; uncentred it would saturate."""
    return 0.5 + 0.5 * np.tanh(-0.5 * (P_star - P_star_mean))


# m_ad in Algorithm 1
def difficulty_map(target):
    """Adaptive P(task, k): a smooth kernel over the levels around `target` 0..1; (...) -> (..., 3, 6)."""
    distance = DIFFICULTY - np.asarray(target)[..., None, None]
    weight = np.exp(-0.5 * (distance / KERNEL_WIDTH) ** 2)  # at least exp(-8): every level keeps some
    return weight / weight.sum((-2, -1), keepdims=True)


# "balance" in Algorithm 1
def balance(static, adaptive):
    """Joint P(task, k) of P(task) (3,), k uniform, and the adaptive (..., 3, 6) -> (..., 3, 6)."""
    return (1 - ADAPTIVE_WEIGHT) * static[:, None] / len(LENGTHS) + ADAPTIVE_WEIGHT * adaptive


# ------------------------------------------------------------------------------------------------------------
# The feedback loop

FRESH_MEMORY = dict(
    count=0,
    L_c=0.0,
    history=0.0,
    L_s=0.0,
    integral=0.0,
    P_star_mean=0.0,  # what the loop must keep
    p=0.0,
    i=0.0,
    d=0.0,
    p_star=0.0,
    target=0.5,  # what it said last
)


def feedback(memory, loss):
    """One turn of the loop: the memory and the loss of the step just done -> the new memory.

    `loss` is a float or an array of independent runs. Every mean is a plain running mean until as many steps
    have passed as it looks back, and exponential from then on: no warm-up, no list of old values.
    """
    count = memory["count"] + 1
    slow, fast = min(count, HORIZON), min(count, SMOOTHING)
    loss = np.clip(loss, -LARGEST_LOSS, LARGEST_LOSS)
    L_c = memory["L_c"] + (loss - memory["L_c"]) / fast
    history = memory["history"] + (L_c - memory["history"]) / slow
    L_s = loss_signal(L_c, history)
    integral = memory["integral"] + (L_s - memory["integral"]) / slow
    derivative = L_s - memory["L_s"]  # the first L_s is 0, and so is this one
    p, i, d = feedback_terms(L_s, integral, derivative)
    p_star = p + i + d
    P_star_mean = memory["P_star_mean"] + (p_star - memory["P_star_mean"]) / slow
    return dict(
        count=count,
        L_c=L_c,
        history=history,
        L_s=L_s,
        integral=integral,
        P_star_mean=P_star_mean,
        p=p,
        i=i,
        d=d,
        p_star=p_star,
        target=target_difficulty(p_star, P_star_mean),
    )


class Curriculum:
    """P(task, k) for every training step. Call probabilities(step), train that step, then update(its loss).

    So the loss that Eq. 3 reads at step t is that of step t - 1; at the first step there is none and P* is 0.
    Every process of a distributed run holds the same curriculum, because it is fed the same averaged loss.
    """

    def __init__(
        self,
        strategy,  # "none": uniform; "linear": static part alone; "dcl": static and adaptive part
        total_steps,  # length of the training in optimizer steps; the static part ends there
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown curriculum {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if int(total_steps) != total_steps or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: it must be a whole number of at least 1")
        self.strategy = strategy
        self.total_steps = int(total_steps)
        self.memory = dict(FRESH_MEMORY)

    def probabilities(self, step):
        """P(task, k) for the 0-based `step`: float64 (3, 6) of sum 1. ValueError if not below total_steps."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside this curriculum's 0..{self.total_steps - 1}")
        if self.strategy == "none":
            return np.full((len(TASKS), len(LENGTHS)), 1 / (len(TASKS) * len(LENGTHS)))
        static = static_probabilities(step / max(self.total_steps - 1, 1))
        if self.strategy == "linear":
            return np.repeat(static[:, None] / len(LENGTHS), len(LENGTHS), axis=1)
        return balance(static, difficulty_map(self.memory["target"]))

    def update(self, loss):
        """Take the loss of the step just done, averaged over ranks and micro-batches.

        ValueError if it is not finite: such a step teaches the network nothing, and the curriculum neither.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}: give the curriculum finite losses, leave such a step out")
        memory = feedback(self.memory, float(loss))
        self.memory = {name: type(FRESH_MEMORY[name])(value) for name, value in memory.items()}

    @property
    def terms(self):
        """For logs: the terms of Eq. 4 "p", "i", "d", their sum "p_star", the target difficulty u "target".

        Under "linear" and "none" they tell what the feedback would have asked for. Before any loss the terms
        are 0 and the target is 0.5, the middle.
        """
        return {name: self.memory[name] for name in ("p", "i", "d", "p_star", "target")}

    def state_dict(self):
        """Everything a resumed run needs: plain numbers and one string, which JSON keeps to the last bit."""
        return dict(strategy=self.strategy, total_steps=self.total_steps, **self.memory)

    def load_state_dict(self, state):
        """Continue where `state` was taken; ValueError if it is of another strategy or length of training."""
        for name in ("strategy", "total_steps"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"the saved curriculum has {name} {state.get(name)!r}, this run has "
                    f"{getattr(self, name)!r}: resume with the flags of the first run"
                )
        missing = FRESH_MEMORY.keys() - state.keys()
        if missing:
            raise ValueError(f"the saved curriculum lacks {', '.join(sorted(missing))}")
        self.memory = {name: state[name] for name in FRESH_MEMORY}


# ------------------------------------------------------------------------------------------------------------
# A simulation in place of a training: what does the feedback do to a loss?

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


def simulate(seeds=range(8), total_steps=10_000, batch_size=16):
    """Train every (plant, arm, seed) for `total_steps`; returns a dict of arrays, the step first.

    "relative_loss" (steps, plants, arms, seeds) is the loss divided by "base" (steps,), its undisturbed
    course. Of the first seed alone: "task" (steps, plants, arms, 3), "mean_k" (steps, plants, arms), and "p",
    "i", "d", "target" (steps, plants). The loss of a step is the mean over a batch whose levels are drawn at
    random from the curriculum's probabilities:

        loss = base(t) * exp(disturbance(t)) * mean over the batch of [ (1 + (D - 1/2)) * exp(z - 1/2) ]

    - base falls from 1.0, an untrained eps-prediction, to 0.06 as a power law, as a diffusion training does.
    - D is the level's difficulty; the hardest level loses three times as much as the easiest. Plausible: the
      loss counts the given frames too, which cost next to nothing, and by Table 7 a quarter to all of the
      frames are unknown. The paper's ranking holds exactly here; where it does not, the damping is weaker.
    - z ~ N(0, 1), in all plants but "quiet": an item's loss mostly tells its diffusion step, and varies by
      more than its mean. In "quiet" only the draw of the levels is random.
    - disturbance: none in "quiet" and "noise", otherwise see there. The batch of 16 is the paper's.

    All arms and plants see the same random numbers: two arms differ by their curriculum and nothing else.
    Levels are drawn through the inverse of their cumulative probabilities, from easy to hard.
    """
    order = np.argsort(DIFFICULTY, axis=None, kind="stable")
    item_loss = 0.5 + DIFFICULTY.ravel()[order]  # (18,) = 1 + (D - 1/2)
    num_seeds, shape = len(seeds), (len(PLANTS), len(ARMS), len(seeds))
    base = 0.05 + 0.95 / (1 + np.arange(total_steps) / 100)
    phase = np.array([np.random.default_rng((seed, 0, 1)).integers(1400) for seed in seeds])  # of "steps"
    memory = {name: np.full((len(PLANTS), num_seeds), value) for name, value in FRESH_MEMORY.items()}
    memory["count"], log_factor = 0, None
    log = {name: np.empty((total_steps, len(PLANTS))) for name in ("p", "i", "d", "target")}
    log |= dict(
        base=base,
        relative_loss=np.empty((total_steps, *shape)),
        task=np.empty((total_steps, *shape[:2], 3)),
        mean_k=np.empty((total_steps, *shape[:2])),
    )
    for step in range(total_steps):
        draws = [np.random.default_rng((seed, step, 0)) for seed in seeds]
        level_draw = np.stack([rng.random(batch_size) for rng in draws])  # (seeds, batch)
        z = np.stack([rng.standard_normal(batch_size + 1) for rng in draws])
        log_factor = disturbance(log_factor, z[:, -1], step, phase)  # (plants, seeds)

        static = static_probabilities(step / max(total_steps - 1, 1))
        P = np.empty((*shape, *DIFFICULTY.shape))  # (plants, arms, seeds, 3, 6)
        P[:, 0] = 1 / DIFFICULTY.size
        P[:, 1] = static[:, None] / len(LENGTHS)
        P[:, 2] = balance(static, difficulty_map(memory["target"]))
        P[:, 3] = balance(static, difficulty_map(0.5))

        edges = P.reshape(*shape, -1)[..., order].cumsum(-1)[..., None, :-1]  # (plants, arms, seeds, 1, 17)
        loss = item_loss[(level_draw[..., None] > edges).sum(-1)]  # (plants, arms, seeds, batch)
        loss[1:] *= np.exp(z[:, :-1] - 0.5)  # all plants but "quiet"
        loss = loss.mean(-1) * np.exp(log_factor)[:, None]  # (plants, arms, seeds)

        log["relative_loss"][step] = loss
        log["task"][step] = P[:, :, 0].sum(-1)
        log["mean_k"][step] = P[:, :, 0].sum(-2) @ LENGTHS
        for name in ("p", "i", "d", "target"):
            log[name][step] = memory[name][:, 0]  # what this step was drawn with
        memory = feedback(memory, base[step] * loss[:, 2])
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


def print_table(measured):
    """One line per plant: mean over the seeds, and dcl against linear (with the worst seed in brackets)."""

    def ratio(name, plant):
        _, linear, dcl, _ = measured[name][plant]
        return f"{dcl.mean() / linear.mean():8.3f} ({(dcl / linear).max():.3f})"

    print(
        f"standard deviation of the detrended log loss, mean over {measured['spread'].shape[-1]} seeds "
        "(worst seed in brackets);"
    )
    print("no fb.: dcl with its target fixed at 0.5; straight line: spread if nothing else counts as trend")
    print(
        "       |              spread: every step                  |   slow swings: 100-step mean    "
        "|  straight line"
    )
    print(
        "plant  |   none  linear     dcl  no fb.      dcl/linear   |  linear     dcl      dcl/linear  "
        " |    dcl/linear"
    )
    for plant, name in enumerate(PLANTS):
        spread, slow = measured["spread"][plant].mean(-1), measured["slow"][plant].mean(-1)
        print(
            f"{name:6s} |"
            + "".join(f"{value:8.4f}" for value in spread)
            + ratio("spread", plant)
            + f" |{slow[1]:8.4f}{slow[2]:8.4f}"
            + ratio("slow", plant)
            + " |"
            + ratio("straight", plant)
        )


def draw_plot(log, measured, path):
    """Draw the first seed as a PNG: what the feedback sees and does. Numbers in it are means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = (
        dict(color="#c4c4c4", label="none", linewidth=4),
        dict(color="#e6801a", label="linear"),
        dict(color="#1f5fa8", label="dcl"),
    )
    task_colors, term_colors = ("#1b9e77", "#7570b3", "#d6337c"), ("#1f5fa8", "#1b9e77", "#e6a700")
    titles = (
        "quiet: only the draw\nof the levels is random",
        "noise: independent noise\non every item",
        "slow: and a disturbance\nremembered for 300 steps",
        "steps: and ±15 %\nin turns of 700 steps",
    )
    rows = (
        "loss\n(100-step mean)",
        "its slow swings, %\n(detrended)",
        "P(task)",
        "mean k",
        "terms of Eq. 4",
        "target\ndifficulty u",
    )
    linear_slow, dcl_slow = measured["slow"].mean(-1)[:, 1:3].T  # (plants,) each
    damping = 100 * (1 - dcl_slow / linear_slow)

    steps = np.arange(len(log["base"]))
    relative_loss = log["relative_loss"][:, :, :, :1]  # (steps, plants, arms, 1 seed)
    loss = moving_mean(log["base"][:, None, None] * relative_loss[..., 0], 100)
    swings = 100 * moving_mean(detrend(relative_loss)[..., 0], 100)
    font = {"font.size": 13, "axes.titlesize": 13, "legend.fontsize": 11.5, "legend.title_fontsize": 11.5}
    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context({**font, **look, "lines.linewidth": 1.3, "legend.handlelength": 1.2}):
        figure, axes = plt.subplots(6, 4, figsize=(14, 15), sharex=True, sharey="row", layout="constrained")
        for plant, column in enumerate(axes.T):
            loss_axis, swing_axis, task_axis, k_axis, term_axis, target_axis = column
            loss_axis.set_title(titles[plant], pad=10)
            for arm, style in enumerate(styles):
                loss_axis.semilogy(steps[50:][: len(loss)], loss[:, plant, arm], **style)
                k_axis.plot(steps, log["mean_k"][:, plant, arm], **style)
            for arm, slow in ((1, linear_slow), (2, dcl_slow)):
                swing_axis.plot(
                    steps[HORIZON + 50 :][: len(swings)],
                    swings[:, plant, arm],
                    color=styles[arm]["color"],
                    label=f"{ARMS[arm]} {100 * slow[plant]:.1f}",
                )
            swing_axis.legend(title="standard deviation", ncols=2, loc="upper center", columnspacing=1)
            for task, color in enumerate(task_colors):
                task_axis.plot(steps, log["task"][:, plant, 2, task], color=color, label=TASKS[task])
                task_axis.plot(steps, log["task"][:, plant, 1, task], color=color, linestyle="--")
            for name, color in zip("pid", term_colors):
                term_axis.plot(steps, log[name][:, plant], color=color, label=name.upper())
            target_axis.plot(steps, log["target"][:, plant], color=styles[2]["color"])
            target_axis.axhline(0.5, color="black", linewidth=1, linestyle=":")
            target_axis.set_xlabel("training step")
        for axis, label in zip(axes[:, 0], rows):
            axis.set_ylabel(label)
        figure.align_ylabels(axes[:, 0])
        axes[0, 0].legend()
        axes[0, 0].set(
            xlim=(0, len(steps)),
            ylim=(0.04, 1),
            yticks=(0.05, 0.1, 0.2, 0.5, 1),
            yticklabels=("0.05", "0.1", "0.2", "0.5", "1"),
            xticks=steps[:: len(steps) // 4],
        )
        axes[0, 0].minorticks_off()
        axes[1, 0].set_ylim(-30, 55)
        axes[2, 0].set_ylim(0.1, 0.8)
        axes[2, 0].legend(title="solid: dcl, dashed: linear", loc="upper left", labelspacing=0.1)
        axes[4, 0].legend(ncols=3, loc="lower right")
        axes[4, 0].set_ylim(-5, 2)
        axes[5, 0].set_ylim(0, 1)
        axes[5, 0].text(0.97, 0.9, "harder next", transform=axes[5, 0].transAxes, ha="right")
        axes[5, 0].text(0.97, 0.06, "easier next", transform=axes[5, 0].transAxes, ha="right")
        figure.suptitle(
            "The curriculum's feedback draws easier samples when the loss runs above its "
            "course,\nharder ones when below: slow swings of a disturbed loss shrink by "
            f"{damping[2]:.0f} % (slow) and {damping[3]:.0f} % (steps)",
            fontsize=16.5,
        )
        figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def main():
    import argparse
    import importlib.util

    parser = argparse.ArgumentParser(description="Simulate what the curriculum's feedback does to a loss.")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the simulation to this PNG file")
    args = parser.parse_args()
    if args.plot and not args.plot.lower().endswith(".png"):
        parser.error(f"--plot {args.plot}: the plot is a PNG, give it a name that ends in .png")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    log = simulate()
    measured = measure(log["relative_loss"])
    print_table(measured)
    if args.plot:
        try:
            draw_plot(log, measured, args.plot)
        except OSError as error:
            parser.error(f"--plot {args.plot} cannot be written ({error.strerror}): choose another place")


if __name__ == "__main__":
    main()
