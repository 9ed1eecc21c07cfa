"""
Courses: what a training draws, step by step. Those of the curricula, and the controls of Table 4.
"""

import json
from pathlib import Path

import numpy as np

import curriculum
from curriculum import Curriculum
from masks import LENGTHS, NUM_FRAMES, TASKS
from support.common import UserError, printable


class Course(Curriculum):
    """Draws from given probabilities, (steps, 3, 6), whatever the loss."""

    def __init__(self, course, strategy="none"):
        super().__init__(strategy, len(course))
        self.course = course

    def probabilities(self, step):
        return self.course[step]


def course_of(strategy, total_steps, aims=()):
    """P(task, k) at every step of a curriculum, (steps, 3, 6); of "dcl" from its aims at every step."""
    if strategy != "dcl":
        return np.stack(
            [Curriculum(strategy, total_steps).probabilities(step) for step in range(total_steps)]
        )
    if len(aims) != total_steps:
        raise UserError(f"the course has {len(aims)} steps, not {total_steps}: give a run of as many.")
    static = [curriculum.static_probabilities(step / max(total_steps - 1, 1)) for step in range(total_steps)]
    adaptive = [curriculum.difficulty_map(aim) for aim in aims]
    return np.stack([curriculum.balance(*pair) for pair in zip(static, adaptive)])


def make_course(name, total_steps, average=False):
    """ "linear": that curriculum; "reversed": the same, backwards; "set_point": dcl without feedback; a task:
    that alone; else the folder of an arm whose course is replayed. average: its mean, at every step."""
    if average:
        course = make_course(name, total_steps)
        return np.broadcast_to(course.mean(axis=0), course.shape)
    if name == "set_point":
        aims = [curriculum.set_point(step / max(total_steps - 1, 1)) for step in range(total_steps)]
        return course_of("dcl", total_steps, aims)
    linear = course_of("linear", total_steps)
    if name in ("linear", "reversed"):
        return linear if name == "linear" else linear[::-1]
    if name in TASKS:
        one = np.zeros(linear.shape[1:])
        one[TASKS.index(name), LENGTHS.index(NUM_FRAMES)] = 1
        return np.broadcast_to(one, linear.shape)
    path = Path(name) / "arm.json"
    if not path.is_file():
        raise UserError(f"--course {name} has no arm.json: finish that run first.")
    return course_of("dcl", total_steps, json.loads(path.read_text())["aims"])


def set_order(path):
    """The levels take the difficulties of a JSON file, 3 x 6 numbers of 0..1, in the place of the paper's.
    Raises UserError."""
    try:
        order = np.array(json.loads(Path(path).read_text(encoding="utf-8")), float)
    except (OSError, ValueError, TypeError, RecursionError):
        order = np.zeros(0)
    if order.shape != curriculum.DIFFICULTY.shape or not ((order >= 0) & (order <= 1)).all():
        rows = f"{len(TASKS)} lists of {len(LENGTHS)} numbers of 0..1"
        raise UserError(f"--order {printable(path)} is no file of difficulties: it needs {rows}, as JSON.")
    curriculum.DIFFICULTY = order
