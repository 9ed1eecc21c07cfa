"""
The difficulty-adaptive curriculum: which task and how many frames the next training step draws.
No network in here.

$ python curriculum.py                  # Eq. 2 to 4 on twelve steps of a loss that can be followed by hand
$ python -m lab.simulate_curriculum     # what the feedback does to the loss of simulated learners

A sample's difficulty has two sides: its task (interpolation < prediction < generation) and its number of
valid frames k (3 < ... < 8), together 18 levels. The curriculum gives each level a probability, half from
  - a static part (Eq. 2): the share of interpolation falls over the training, the others rise; k is uniform;
  - an adaptive part (Eqs. 3-4): a feedback loop reads the training loss. Loss above its usual distance to
    its history -> easier samples next, below -> harder ones. So it damps swings, as a PID controller does.
"""

import math

import numpy as np

from masks import LENGTHS, TASKS
from support.common import UserError

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
# The feedback loop: what it keeps from step to step, and what it says about the next sample

STATE = dict(count=0, L_c=0.0, history=0.0, L_s=0.0, integral=0.0, P_star_mean=0.0)
OUTPUT = dict(p=0.0, i=0.0, d=0.0, p_star=0.0, target=0.5)


def feedback(state, loss):
    """One turn of the loop: the state and the loss of the step just done -> (new state, output).

    `loss` is a float, or an array of independent runs; so are all values but "count". Every mean is a plain
    running mean until as many steps have passed as it looks back, and exponential from then on: no warm-up,
    no list of old values.
    """
    count = state["count"] + 1
    slow, fast = min(count, HORIZON), min(count, SMOOTHING)
    loss = np.clip(loss, -LARGEST_LOSS, LARGEST_LOSS)
    L_c = state["L_c"] + (loss - state["L_c"]) / fast
    history = state["history"] + (L_c - state["history"]) / slow
    L_s = loss_signal(L_c, history)
    integral = state["integral"] + (L_s - state["integral"]) / slow
    derivative = L_s - state["L_s"]  # the first L_s is 0, and so is this one
    p, i, d = feedback_terms(L_s, integral, derivative)
    p_star = p + i + d
    P_star_mean = state["P_star_mean"] + (p_star - state["P_star_mean"]) / slow
    state = dict(count=count, L_c=L_c, history=history, L_s=L_s, integral=integral, P_star_mean=P_star_mean)
    output = dict(p=p, i=i, d=d, p_star=p_star, target=target_difficulty(p_star, P_star_mean))
    return state, output


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
        self.state, self.output = dict(STATE), dict(OUTPUT)

    def probabilities(self, step):
        """P(task, k) for the 0-based `step`: float64 (3, 6) of sum 1. ValueError if not below total_steps."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside this curriculum's 0..{self.total_steps - 1}")
        if self.strategy == "none":
            return np.full((len(TASKS), len(LENGTHS)), 1 / (len(TASKS) * len(LENGTHS)))
        static = static_probabilities(step / max(self.total_steps - 1, 1))
        if self.strategy == "linear":
            return np.repeat(static[:, None] / len(LENGTHS), len(LENGTHS), axis=1)
        return balance(static, difficulty_map(self.output["target"]))

    def update(self, loss):
        """Take the loss of the step just done, averaged over ranks and micro-batches.

        ValueError if it is not finite: such a step teaches the network nothing, and the curriculum neither.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}: give the curriculum finite losses, leave such a step out")
        state, output = feedback(self.state, float(loss))
        self.state = {name: type(STATE[name])(value) for name, value in state.items()}  # for JSON
        self.output = {name: float(value) for name, value in output.items()}

    @property
    def terms(self):
        """For logs: the terms of Eq. 4 "p", "i", "d", their sum "p_star", the target difficulty u "target".

        Under "linear" and "none" they tell what the feedback would have asked for. Before any loss the terms
        are 0 and the target is 0.5, the middle.
        """
        return dict(self.output)

    def state_dict(self):
        """Everything a resumed run needs: plain numbers and one string, which JSON keeps to the last bit."""
        return dict(strategy=self.strategy, total_steps=self.total_steps, **self.state, **self.output)

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
        missing = (STATE | OUTPUT).keys() - saved.keys()
        if missing:
            raise UserError(
                f"the saved curriculum lacks {', '.join(sorted(missing))}: resume from another checkpoint."
            )
        self.state = {name: saved[name] for name in STATE}
        self.output = {name: saved[name] for name in OUTPUT}


# ------------------------------------------------------------------------------------------------------------
# python curriculum.py

INTRODUCTION = f"""\
Twelve steps of a short training. Step t reads the loss of step t - 1, and says what step t draws.

Eq. 2  P(task) in the static part: a straight line from {STATIC_START} to {STATIC_END},
       for {", ".join(TASKS)}
Eq. 3  L_s = (L_c - history) / history    L_c: running mean of the loss, history: running mean of L_c
Eq. 4  P* = P + I + D,   P = {K_P:g} L_s,   I = {K_I:g} (running mean of L_s),   D = {K_D:g} (change of L_s)
       u = sigmoid(mean P* - P*)          the difficulty to aim at, from 0 to 1
draws  P(task, k): half Eq. 2 with uniform k, half a bell over the levels (task, k) around difficulty u

By hand, at t = 5: L_c = (1 + 1 + 1 + 0.5) / 4 = 0.875, history = (1 + 1 + 1 + 0.875) / 4 = 0.969,
L_s = (0.875 - 0.969) / 0.969 = -0.097, P = {K_P:g} L_s, I = {K_I:g} (0 + 0 + 0 + L_s) / 4, D = {K_D:g} L_s.

 t  loss     L_c history     L_s       P       I       D      P* mean P*       u   Eq. 2, %   P(task)%  mean k
"""
NUMBERS = ("L_c", "history", "L_s", "p", "i", "d", "p_star", "P_star_mean", "target")
PHASES = (  # what the reader sees, and the losses that the steps read
    ("No loss yet: the feedback says nothing, and u is the middle.", [None]),
    ("The loss equals its history: L_s stays 0, and only Eq. 2 moves P(task).", [1.0] * 3),
    ("The loss falls: P* < 0 and u rises. Harder samples: more generation, more frames.", [0.5] * 4),
    ("The loss jumps. D answers first, I last; u falls. Easier samples, against Eq. 2.", [2.0] * 4),
)


def print_step(step, loss, curriculum):
    """One line: the loss that the 0-based `step` reads, what Eq. 2 to 4 make of it, and what it draws."""
    values, P = curriculum.state_dict(), curriculum.probabilities(step)
    read = "-" if loss is None else f"{loss:.2f}"
    numbers = "".join(f"{values[name]:8.3f}" for name in NUMBERS)
    static = static_probabilities(step / (curriculum.total_steps - 1))
    shares = "".join(f"   {a:2.0f} {b:2.0f} {c:2.0f}" for a, b, c in (100 * static, 100 * P.sum(1)))
    print(f"{step + 1:2} {read:>5}{numbers}{shares}    {(P * LENGTHS).sum():.2f}")


def main():
    curriculum, step = Curriculum("dcl", total_steps=12), 0
    print(INTRODUCTION, end="")
    for sentence, losses in PHASES:
        print(sentence)
        for loss in losses:
            if loss is not None:
                curriculum.update(loss)
            print_step(step, loss, curriculum)
            step += 1
    print("\nP(task, k) of the last step, in percent. The bell is around u, Eq. 2 gives each row its share.")
    print(" " * 13 + "".join(f"  k = {k}" for k in LENGTHS))
    for task, row in zip(TASKS, 100 * curriculum.probabilities(step - 1)):
        print(f"{task:13}" + "".join(f"{p:7.1f}" for p in row))


if __name__ == "__main__":
    main()
