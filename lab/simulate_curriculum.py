"""
A simulation in place of a training: what does the curriculum's feedback do to the loss that it reads?

    python -m lab.simulate_curriculum                          # a table: four learners, five curricula
    python -m lab.simulate_curriculum --plot curriculum.png    # the same as a picture
    python -m lab.simulate_curriculum --measure RUN_DIR RUN_DIR --levels lab/levels.json

A sample has a level (task, k), drawn from P(task, k), and a range of timesteps, spread evenly over the batch
as data.draw_sample does it. Its loss over unknown frames is

    base(step, range) * level(task, k) * exp(noise z - noise^2 / 2) * exp(disturbance(step))

  - base falls over the training as a power law, and is far larger at small timesteps, where there is little
    noise to be found. Both roughly as in trainings of lab.arm.
  - level and noise come from lab/levels.json, or --levels. --measure makes such a file from runs of lab.arm
    without curriculum. In the learner "strong" the hardest level loses three times as much as the easiest,
    whatever the file says: there the draw has a hold on the loss.
  - disturbance: none in "noise"; in the others it makes the loss swing, see LEARNERS.

All curricula see the same random numbers, so two of them differ by what they draw and by nothing else.
"""

import json
import math
from pathlib import Path

import numpy as np

import curriculum
from curriculum import DIFFICULTY, HORIZON, NUM_RANGES, SMOOTHING
from masks import LENGTHS, TASKS
from support.common import UserError, one_sentence, printable, replacing, table
from support.flags import Parser
from support.pictures import check_png, pyplot

LEARNERS = {
    "noise": "levels and noise,\nno disturbance",
    "slow": "a disturbance of 10 %,\nremembered for a twentieth",
    "steps": "+15 and -15 %,\na twentieth in turns",
    "strong": "as slow, levels differ\nby a factor of three",
}
ARMS = ("linear", "reversed", "no feedback", "dcl", "yoked")
LINEAR, REVERSED, NO_FEEDBACK, DCL, YOKED = range(5)
MEMORY = 0.05  # of the training: of the slow disturbance, and the length of a turn
FIFTHS = 0.55, 0.25, 0.14, 0.09, 0.075  # base in fifths of the timesteps, from little noise to much
PACE, POWER = 0.025, 0.7  # of base: it falls as (1 + progress / PACE) ** -POWER
EASY_TO_HARD = np.argsort(DIFFICULTY, axis=None, kind="stable")  # the levels
LEVELS = Path(__file__).with_name("levels.json")
NEEDED = f"{len(TASKS)} x {len(LENGTHS)} positive numbers of mean 1, noise of 0..3, and from, a sentence"

# ------------------------------------------------------------------------------------------------------------
# Levels


def levels_of(arms):
    """A dict as in lab/levels.json. arms: arm.json dicts of networks trained without curriculum. The noise in
    them is relative to the mean; here it becomes the deviation of the log loss that gives just that."""

    def mean(name):
        cells = [[[arm["cells"][f"{task}, {k}"][name] for k in LENGTHS] for task in TASKS] for arm in arms]
        return np.mean(cells, axis=0)  # (3, 6)

    relative, noise = mean("relative"), math.sqrt(math.log1p(mean("noise").mean() ** 2))
    source = f"held-out loss over unknown frames, mean of {len(arms)} trained networks"
    return {"relative": (relative / relative.mean()).tolist(), "noise": noise, "from": source}


def read_arms(folders):
    """The arm.json of finished runs of lab.arm, dicts. Raises UserError."""
    arms = []
    for folder in folders:
        try:
            arms.append(json.loads((Path(folder) / "arm.json").read_text()))
            levels_of(arms[-1:])
        except (OSError, ValueError, LookupError, TypeError) as error:
            says = "has no arm.json with the losses of all levels: give finished runs of lab.arm."
            raise UserError(f"--measure {printable(folder)} {says}") from error
    return arms


def read_levels(path):
    """The dict of a file of levels, "relative" as an array (3, 6). Raises UserError."""
    try:
        levels = json.loads(Path(path).read_text())
        relative, noise = np.array(levels["relative"], float), float(levels["noise"])
        good = relative.shape == DIFFICULTY.shape and (relative > 0).all() and abs(relative.mean() - 1) < 1e-3
        good = good and 0 <= noise <= 3 and isinstance(levels["from"], str)
    except (ValueError, LookupError, TypeError, OverflowError):
        good = False
    if not good:
        raise UserError(f"--levels {printable(path)} is no file of levels: it needs relative, {NEEDED}.")
    return dict(levels, relative=relative, noise=noise)


# ------------------------------------------------------------------------------------------------------------
# The learners


def base(total_steps):
    """The loss of every step and range of timesteps, undisturbed: (steps, NUM_RANGES)"""
    fifths, middles = ((np.arange(n) + 0.5) / n for n in (len(FIFTHS), NUM_RANGES))
    by_range = np.exp(np.interp(middles, fifths, np.log(FIFTHS)))
    return (1 + np.arange(total_steps) / total_steps / PACE)[:, None] ** -POWER * by_range


def draw(seeds, total_steps, batch):
    """All random numbers, seed by seed: for the levels, uniform in 0..1, and standard normal ones, (steps,
    seeds, batch) each; ranges of timesteps, the same; disturbances, (steps, learners, seeds)."""
    memory = max(1, round(MEMORY * total_steps))
    rho, steps, drawn = math.exp(-1 / memory), np.arange(total_steps), []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        level, z = rng.random((total_steps, batch)), rng.standard_normal((total_steps, batch))
        timestep = (np.arange(batch) / batch + rng.random((total_steps, 1))) % 1  # as a share of all
        slow = 0.1 * rng.standard_normal(total_steps)
        for step in steps[1:]:
            slow[step] = rho * slow[step - 1] + math.sqrt(1 - rho**2) * slow[step]
        turns = (steps + rng.integers(2 * memory)) // memory % 2
        disturbance = np.stack([0 * slow, slow, 0.15 - 0.3 * turns, slow], axis=1)
        drawn.append((level, z, (NUM_RANGES * timestep).astype(int), disturbance))
    level, z, ranges, disturbance = (np.stack(x, axis=1) for x in zip(*drawn))
    return level, z, ranges, np.moveaxis(disturbance, 1, 2)


def probabilities(progress, P_star, usual):
    """P(task, k) of every run, (learners, arms, seeds, 3, 6), and what its adaptive part aims at, (learners,
    arms, seeds): the set point, but for dcl, which listens to P_star, and yoked. P_star, usual: the same
    shape"""
    point = curriculum.set_point(progress)
    aims = np.full(P_star.shape, point)
    aims[:, DCL] = curriculum.aim(P_star[:, DCL], usual[:, DCL], point)
    aims[:, YOKED] = np.roll(aims[:, DCL], -1, axis=-1)  # the next seed's, as in lab.ablate
    P = curriculum.balance(curriculum.static_probabilities(progress), curriculum.difficulty_map(aims))
    for arm, share in ((LINEAR, progress), (REVERSED, 1 - progress)):
        P[:, arm] = curriculum.static_probabilities(share)[:, None] / len(LENGTHS)
    return P, aims


def draw_levels(P, uniform):
    """The levels of a batch, 0..17 from easy to hard: (learners, arms, seeds, batch). P: of `probabilities`.
    uniform: (seeds, batch) in 0..1; the same number draws a harder level where P is harder."""
    edges = P.reshape(*P.shape[:3], -1)[..., EASY_TO_HARD].cumsum(-1)[..., None, :-1]
    return (uniform[..., None] > edges).sum(-1)


def simulate(levels, seeds=range(16), total_steps=1200, batch=8):
    """Trains every (learner, arm, seed). levels: of `read_levels`. Returns a dict of arrays, the step first:
    "P" (steps, learners, arms, seeds, 3, 6), "aim" and "L_s" that the step was drawn with, (steps, learners,
    arms, seeds), and its answer: "losses" (steps, learners, arms, seeds, NUM_RANGES), sums over the samples
    of each range of timesteps, and "counts", (steps, seeds, NUM_RANGES). And "horizon", a number of steps."""
    uniform, z, ranges, disturbance = draw(seeds, total_steps, batch)
    factors = np.stack([*[levels["relative"]] * 3, 0.5 + DIFFICULTY])  # (learners, 3, 6)
    factors = factors.reshape(len(LEARNERS), 1, 1, -1)[..., EASY_TO_HARD]  # (learners, 1, 1, 18)
    course, horizon = base(total_steps), max(1, round(HORIZON * total_steps))
    noise = np.exp(levels["noise"] * z - levels["noise"] ** 2 / 2)
    state, log = curriculum.initial_state((len(LEARNERS), len(ARMS), len(uniform[0]))), []
    for step in range(total_steps):
        P_star = (state["p"] + state["i"] + state["d"]) * (step >= horizon)  # as Curriculum.aim
        usual = state["usual"] * (step >= horizon)
        P, aims = probabilities(step / max(total_steps - 1, 1), P_star, usual)
        loss = np.take_along_axis(factors, draw_levels(P, uniform[step]), axis=-1)
        loss *= course[step, ranges[step]] * noise[step]  # (learners, arms, seeds, batch)
        loss *= np.exp(disturbance[step])[:, None, :, None]
        in_range = ranges[step][..., None] == np.arange(NUM_RANGES)  # (seeds, batch, NUM_RANGES)
        losses, counts = np.einsum("lasb,sbr->lasr", loss, in_range), in_range.sum(axis=1)
        log.append(dict(P=P, aim=aims, L_s=state["L_s"], losses=losses, counts=counts))
        state = curriculum.feedback(state, losses, counts, horizon)
    return {name: np.stack([entry[name] for entry in log]) for name in log[0]} | dict(horizon=horizon)


# ------------------------------------------------------------------------------------------------------------
# The table


def swings(L_s, horizon):
    """L_s less its running mean over a horizon, which takes the fall of the loss out of it. (steps, ...)"""
    mean, out = np.zeros(L_s.shape[1:]), np.empty(L_s.shape)
    for step, now in enumerate(L_s):
        mean = mean + (now - mean) / min(step + 1, horizon)
        out[step] = now - mean
    return out


def measure(log):
    """{name: (learners, seeds)} of the steps after the first horizon: the standard deviation of the swings of
    L_s of every arm, the ratios of dcl's to others', seed by seed, and how far its aim is off the set
    point."""
    late = slice(log["horizon"], None)
    spread = swings(log["L_s"], log["horizon"])[late].std(axis=0)  # (learners, arms, seeds)
    moved = log["aim"][late, :, DCL] - log["aim"][late, :, NO_FEEDBACK]
    measured = {arm: spread[:, i] for i, arm in enumerate(ARMS)}
    for other in (YOKED, NO_FEEDBACK, LINEAR):
        measured[f"dcl / {ARMS[other]}"] = spread[:, DCL] / spread[:, other]
    aims = {"mean of aim - set point": moved.mean(axis=0), "deviation of aim - set point": moved.std(axis=0)}
    return measured | aims


def table_of(measured):
    """Means and standard errors over the seeds, as Markdown, a column per learner."""
    lines = []
    for name, values in measured.items():
        se = values.std(axis=1, ddof=1) / values.shape[1] ** 0.5
        lines.append([name, *(f"{m:.4f} ± {e:.4f}" for m, e in zip(values.mean(axis=1), se))])
    return table(["swings of L_s", *LEARNERS], lines)


# ------------------------------------------------------------------------------------------------------------
# The picture: a column per learner, a row of panels per function


COLOURS = {LINEAR: "#e6801a", YOKED: "#c4c4c4", DCL: "#1f5fa8"}
TASK_COLOURS = "#1b9e77", "#7570b3", "#d6337c"


def draw_arms(axes, values):
    """values: (steps, learners, arms) of one seed"""
    for learner, axis in enumerate(axes):
        for arm, colour in COLOURS.items():
            axis.plot(values[:, learner, arm], color=colour, label=ARMS[arm])


def draw_tasks(axes, tasks):
    """tasks: P(task) of one seed, (steps, learners, arms, 3)"""
    for learner, axis in enumerate(axes):
        for task, colour in enumerate(TASK_COLOURS):
            axis.plot(tasks[:, learner, DCL, task], color=colour, label=TASKS[task])
            axis.plot(tasks[:, learner, LINEAR, task], color=colour, linestyle="--")


def plot(log, measured, path):
    """Draws the first seed as a PNG: what the feedback reads and what it does. Its numbers are means over
    all seeds."""
    plt = pyplot()
    loss = log["losses"][:, :, :, 0].sum(-1) / log["counts"][0, 0].sum()  # (steps, learners, arms)
    smooth = loss.copy()  # as L_s is
    for step in range(1, len(loss)):
        smooth[step] = smooth[step - 1] + (loss[step] - smooth[step - 1]) / min(step + 1, SMOOTHING)
    P, ratios = log["P"][:, :, :, 0], measured[f"dcl / {ARMS[YOKED]}"].mean(axis=1)
    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context({**look, "lines.linewidth": 1.2, "legend.fontsize": 9}):
        shape = dict(figsize=(13, 12), sharex=True, sharey="row", layout="constrained")
        figure, axes = plt.subplots(5, len(LEARNERS), **shape)
        draw_arms(axes[0], smooth)
        draw_arms(axes[1], log["L_s"][..., 0])
        draw_arms(axes[2], log["aim"][..., 0])
        draw_tasks(axes[3], P.sum(-1))
        draw_arms(axes[4], P.sum(-2) @ LENGTHS)
        for learner, (name, about) in enumerate(LEARNERS.items()):
            axes[0, learner].set_title(f"{name}: {about}")
            axes[1, learner].set_title(f"deviation, dcl / yoked: {ratios[learner]:.3f}", fontsize=10)
            axes[-1, learner].set_xlabel("step")
        ticks = dict(yticks=(0.02, 0.05, 0.1, 0.2), yticklabels=("0.02", "0.05", "0.1", "0.2"))
        axes[0, 0].set(ylabel=f"loss, mean of {SMOOTHING} steps", yscale="log", **ticks)
        axes[0, 0].minorticks_off()
        axes[1, 0].set_ylabel("L_s")
        axes[2, 0].set(ylabel="aim (orange: the set point)", ylim=(0, 1))
        axes[3, 0].set(ylabel="P(task), dashed: linear", ylim=(0, 1))
        axes[4, 0].set_ylabel("mean k")
        axes[0, 0].legend()
        axes[3, 0].legend(loc="upper left", ncols=3, fontsize=8, columnspacing=1, handlelength=1)
        with replacing(path) as writing:
            figure.savefig(writing, dpi=90, format="png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    about = "Simulate what the curriculum's feedback does to the loss that it reads."
    parser = Parser(description=about)
    levels = "JSON file of levels to read, or to write with --measure (default: lab/levels.json)"
    arms = "write --levels from these folders of lab.arm, trained without curriculum; nothing is simulated"
    parser.add_argument("--levels", metavar="FILE", type=Path, default=LEVELS, help=levels)
    parser.add_argument("--measure", metavar="RUN_DIR", type=Path, nargs="+", help=arms)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the first seed to this PNG file")
    args = parser.parse_args()
    if args.plot:
        check_png("--plot", args.plot)
    return args


@one_sentence("lab.simulate_curriculum")
def main():
    args = parse_args()
    if args.measure:
        levels = levels_of(read_arms(args.measure))
        levels["from"] += ": " + ", ".join(folder.resolve().name for folder in args.measure)
        with replacing(args.levels) as writing:
            writing.write_text(json.dumps(levels) + "\n")
        print(f"wrote {args.levels}")
        return
    levels = read_levels(args.levels)
    log = simulate(levels)
    measured = measure(log)
    seeds = len(measured["dcl"][0])
    print(f"levels: {printable(levels['from'])}. Mean ± standard error of {seeds} seeds.\n")
    print(table_of(measured), end="")
    if args.plot:
        plot(log, measured, args.plot)


if __name__ == "__main__":
    main()
