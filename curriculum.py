"""
The difficulty-adaptive curriculum: which task and how many frames the next training step draws.
No network in here.

$ python curriculum.py                  # Eq. 2 to 4 on thirty steps of a loss that can be followed by hand
$ python -m lab.simulate_curriculum     # what the feedback does to the loss of simulated learners

A sample's difficulty has two sides: its task (interpolation < prediction < generation) and its number of
valid frames k (3 < ... < 8), together 18 levels. The curriculum gives each level a probability, half from
  - a static part (Eq. 2): the share of interpolation falls over the training, the others rise; k is uniform;
  - an adaptive part (Eqs. 3-4): a bell over the levels around an aim. The aim follows a set point that rises
    over the training, easy to hard, and a feedback loop that reads the loss moves it around that: loss
    further above its history than usual -> easier samples next, further below -> harder ones. So it damps
    swings, as a PID controller does.
"""

import numpy as np

from masks import LENGTHS, TASKS
from support.common import UserError

STRATEGIES = ("none", "linear", "dcl")

STATIC_START = np.array([0.5, 0.2, 0.3])  # P(task) at the first step of the training ...
STATIC_END = np.array([0.2, 0.3, 0.5])  # ... and at the last one
SET_POINT_START, SET_POINT_END = 0.05, 0.95  # difficulty that the adaptive part aims at without feedback
K_P, K_I, K_D = 5.0, 3.0, 1.3  # feedback constants (Table 6)
SMOOTHING = 20  # steps over which L_s is a running mean
HORIZON = 0.1  # of the training; how far "history" and the integral look back
NUM_RANGES = 10  # of timesteps, each with a history of its own: the loss tells its timestep before all else
KERNEL_WIDTH = 0.15  # of the adaptive part, in units of difficulty
ADAPTIVE_WEIGHT = 0.5  # w, balance of the static and the adaptive part
LARGEST_SIGNAL = 1000.0  # of L_s: nothing overflows

# Difficulty of the 18 levels, from 0 (interpolation, k = 3) to 1 (generation, k = 8); both sides weigh alike.
DIFFICULTY = 0.5 * np.linspace(0, 1, len(TASKS))[:, None] + 0.5 * np.linspace(0, 1, len(LENGTHS))  # (3, 6)

# ------------------------------------------------------------------------------------------------------------
# The equations. Arguments are floats, or arrays of any shape that are treated element by element.


# Eq. 2
def static_probabilities(progress):
    """P(task) at `progress` 0..1 of the training -> (3,). Interpolation only falls, the others only rise."""
    return STATIC_START + (STATIC_END - STATIC_START) * progress


def set_point(progress):
    """The difficulty to aim at, at `progress` 0..1 of the training, while the loss is as usual."""
    return SET_POINT_START + (SET_POINT_END - SET_POINT_START) * progress


# Eq. 3
def loss_signal(current, history):
    """L_s of one step, the loss relative to its history at the same timesteps (so no scale has to be tuned):
    0 as before, 0.1 a tenth above. Within -1..LARGEST_SIGNAL for losses >= 0."""
    return np.clip(current / np.maximum(history, 1e-30) - 1, -1, LARGEST_SIGNAL)


# Eq. 4
def feedback_terms(L_s, integral, derivative):
    """The three terms whose sum is P*: proportional, integral (a mean), derivative (difference per step)."""
    return K_P * L_s, K_I * integral, K_D * derivative


# P* -> u
def aim(P_star, usual, s):
    """The difficulty u in 0..1 that the adaptive part aims at, from the set point s: sigmoid(logit(s) -
    (P* - usual)). A loss that falls lies below its history all the time: the usual P* leaves the set point
    where it is. As tanh, since exp would overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * (np.log(s / (1 - s)) - (P_star - usual)))


# m_ad in Algorithm 1
def difficulty_map(u):
    """Adaptive P(task, k): a smooth kernel over the levels around the aim u, 0..1; (...) -> (..., 3, 6)."""
    distance = DIFFICULTY - np.asarray(u)[..., None, None]
    weight = np.exp(-0.5 * (distance / KERNEL_WIDTH) ** 2)
    return weight / weight.sum((-2, -1), keepdims=True)


# "balance" in Algorithm 1
def balance(static, adaptive):
    """Joint P(task, k) of P(task) (3,), k uniform, and the adaptive (..., 3, 6) -> (..., 3, 6)."""
    return (1 - ADAPTIVE_WEIGHT) * static[:, None] / len(LENGTHS) + ADAPTIVE_WEIGHT * adaptive


# ------------------------------------------------------------------------------------------------------------
# The feedback loop: what it keeps from step to step, and what it says about the next sample


def initial_state(shape=()):
    """The state of `feedback` before the first loss. shape: of an array of independent runs (lab/ simulates
    many at once). history, seen: per range of timesteps its mean loss, and how many steps drew from it."""
    zeros = {name: np.zeros(shape) for name in ("L_s", "integral", "p", "i", "d", "usual")}
    return dict(count=0, history=np.zeros((*shape, NUM_RANGES)), seen=np.zeros((*shape, NUM_RANGES)), **zeros)


def feedback(state, losses, counts, horizon):
    """One turn of the loop: the state and the losses of the step just done -> the new state, in which p, i, d
    are the terms of P* for the next sample, and usual is their mean.

    losses, counts: (..., NUM_RANGES), for every range of timesteps the sum of the samples' losses, >= 0, over
    unknown frames, and how many samples these are. horizon: steps. Every mean is a plain running mean until
    as many steps have passed as it looks back, and exponential from then on.
    """
    count, history = state["count"] + 1, state["history"]
    compared = counts * (state["seen"] > 0)  # samples per range; a range that is new has no history yet
    expected = (compared * history).sum(-1)  # what their losses would sum to if nothing had changed
    current = np.where(compared > 0, losses, 0).sum(-1)
    signal = np.where(expected > 0, loss_signal(current, expected), 0)  # Eq. 3 of this step alone
    L_s = state["L_s"] + (signal - state["L_s"]) / min(count, SMOOTHING)
    integral = state["integral"] + (L_s - state["integral"]) / min(count, horizon)
    derivative = L_s - state["L_s"]

    seen = state["seen"] + (counts > 0)
    mean = losses / np.maximum(counts, 1)
    # The history of a range looks back as many of its own draws as fall into a horizon.
    draws = np.maximum(seen * min(1, horizon / count), 1)
    history = np.where(counts > 0, history + (mean - history) / draws, history)
    p, i, d = feedback_terms(L_s, integral, derivative)
    usual = state["usual"] + (p + i + d - state["usual"]) / min(count, horizon)
    state = dict(count=count, history=history, seen=seen, L_s=L_s, integral=integral)
    return dict(state, p=p, i=i, d=d, usual=usual)


class Curriculum:
    """P(task, k) for every training step. Call probabilities(step), train that step, then update(its losses).

    So the loss that Eq. 3 reads at step t is that of step t - 1. Every process of a distributed run holds the
    same curriculum, because it is fed the same sums over all of them.
    """

    def __init__(
        self,
        strategy,  # "none": uniform; "linear": static part alone; "dcl": static and adaptive part
        total_steps,  # length of the training in optimizer steps; static part and set point end there
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown curriculum {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if int(total_steps) != total_steps or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: it must be a whole number of at least 1")
        self.strategy = strategy
        self.total_steps = int(total_steps)
        self.horizon = max(1, round(HORIZON * self.total_steps))
        self.state = initial_state()

    def progress(self, step):
        """0 at the first step, 1 at the last. ValueError if `step` is none of this training's."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside this curriculum's 0..{self.total_steps - 1}")
        return step / max(self.total_steps - 1, 1)

    def probabilities(self, step):
        """P(task, k) for the 0-based `step`: float64 (3, 6) of sum 1. ValueError if not below total_steps."""
        static = static_probabilities(self.progress(step))
        if self.strategy == "none":
            return np.full((len(TASKS), len(LENGTHS)), 1 / (len(TASKS) * len(LENGTHS)))
        if self.strategy == "linear":
            return np.repeat(static[:, None] / len(LENGTHS), len(LENGTHS), axis=1)
        return balance(static, difficulty_map(self.aim(step)))

    def update(self, losses, counts):
        """Take the step just done, over all ranks and micro-batches, (NUM_RANGES,) each: for every
        range of timesteps the sum of its samples' losses over unknown frames, and how many samples these are.

        ValueError if a loss is not finite, or negative: such a step teaches the network nothing, and the
        curriculum neither.
        """
        losses, counts = (np.asarray(x, np.float64) for x in (losses, counts))
        if not (np.isfinite(losses) & (losses >= 0)).all():
            raise ValueError(f"the losses are {losses}: give the curriculum finite ones of at least 0")
        self.state = feedback(self.state, np.minimum(losses, 1e30), counts, self.horizon)

    def aim(self, step):
        """The difficulty that the adaptive part aims at, whatever the strategy: the set point, moved by the
        feedback once a horizon has passed; before that there is no history to speak of."""
        P_star, point = sum(self.state[name] for name in "pid"), set_point(self.progress(step))
        return float(aim(P_star, self.state["usual"], point)) if step >= self.horizon else point

    def terms(self, step):
        """What led to `probabilities(step)`, for logs: "p_term", "i_term", "d_term" of Eq. 4, "set_point",
        "aim", and "difficulty", the expected one of the samples."""
        terms = {f"{name}_term": float(self.state[name]) for name in "pid"}
        terms |= dict(set_point=set_point(self.progress(step)), aim=self.aim(step))
        return dict(terms, difficulty=float((self.probabilities(step) * DIFFICULTY).sum()))

    def state_dict(self):
        """Everything a resumed run needs: numbers, lists and one string, which JSON keeps to the last bit."""
        plain = {name: np.asarray(value).tolist() for name, value in self.state.items()}
        return dict(strategy=self.strategy, total_steps=self.total_steps, **plain)

    def load_state_dict(self, saved):
        """Continue where `saved`, a state_dict, was taken.

        UserError if it is incomplete, or of another strategy or length of training.
        """
        for name in ("strategy", "total_steps"):
            if saved.get(name) != getattr(self, name):
                raise UserError(
                    f"the saved curriculum has {name} {saved.get(name)!r}, this run has "
                    f"{getattr(self, name)!r}: resume with the flags of the first run."
                )
        missing = self.state.keys() - saved.keys()
        if missing:
            raise UserError(
                f"the saved curriculum lacks {', '.join(sorted(missing))}: resume from another checkpoint."
            )
        arrays = {name: np.asarray(saved[name], np.float64) for name in self.state}
        self.state = dict(arrays, count=int(saved["count"]))


# ------------------------------------------------------------------------------------------------------------
# python curriculum.py

STEPS = 30
INTRODUCTION = f"""\
Thirty steps of a short training. Step t reads the loss of step t - 1, and says what step t draws. Here all
samples of a step have the same loss, so their timesteps do not matter.

Eq. 2  P(task) in the static part: a straight line from {STATIC_START} to {STATIC_END},
       for {", ".join(TASKS)}
Eq. 3  L_s: running mean of L / history - 1     history: of L over {HORIZON:.0%} of the steps, here three
Eq. 4  P* = P + I + D,   P = {K_P:g} L_s,   I = {K_I:g} (running mean of L_s),   D = {K_D:g} (change of L_s)
       u = sigmoid(logit(s) - (P* - mean P*))     the difficulty to aim at; the set point s rises
draws  P(task, k): half Eq. 2 with uniform k, half a bell over the levels (task, k) around difficulty u

By hand, at t = 14: the loss fell from 1 to 0.5, so L_s = (12 * 0 + 0.5 / 1 - 1) / 13 = -0.038, a mean of
thirteen steps; P = 5 L_s, I = 3 L_s / 3, D = 1.3 L_s; P* = -0.281, its mean over three steps is -0.094;
logit(0.453) = -0.187, so u = sigmoid(-0.187 + 0.187) = 0.5.

 t  loss     L_s       P       I       D       s       u  difficulty   Eq. 2, %   P(task)%  mean k
"""
PHASES = (  # what the reader sees, the loss that is read, and from which line on
    ("The loss equals its history: L_s stays 0, and u is the set point.", 1.0, 0),
    ("The loss falls: P* < its mean, u > s, harder samples. Then that is usual.", 0.5, 13),
    ("The loss jumps. D answers first, I last; u < s: easier samples than planned.", 1.5, 21),
)


def print_step(step, read, curriculum):
    """One line: the 0-based `step`, the loss that it reads, and what Eq. 2 to 4 make of it."""
    P, L_s = curriculum.probabilities(step), float(curriculum.state["L_s"])
    numbers = "".join(f"{value:8.3f}" for value in (L_s, *curriculum.terms(step).values()))
    static = static_probabilities(curriculum.progress(step))
    shares = "".join(f"   {a:2.0f} {b:2.0f} {c:2.0f}" for a, b, c in (100 * static, 100 * P.sum(1)))
    print(f"{step + 1:2} {read:>5}{numbers}   {shares}    {(P * LENGTHS).sum():.2f}")


def main():
    curriculum, phases = Curriculum("dcl", STEPS), {first: phase for *phase, first in PHASES}
    print(INTRODUCTION, end="")
    for step in range(STEPS):
        if step in phases:
            sentence, loss = phases[step]
            print(sentence)
        if step:
            curriculum.update(np.full(NUM_RANGES, loss), np.ones(NUM_RANGES))
        print_step(step, f"{loss:.2f}" if step else "-", curriculum)
    P = curriculum.probabilities(STEPS - 1)
    print("\nP(task, k) of the last step, in percent. The bell is around u, Eq. 2 gives each row its share.")
    print(" " * 13 + "".join(f"  k = {k}" for k in LENGTHS))
    for task, row in zip(TASKS, 100 * P):
        print(f"{task:13}" + "".join(f"{p:7.1f}" for p in row))


if __name__ == "__main__":
    main()
