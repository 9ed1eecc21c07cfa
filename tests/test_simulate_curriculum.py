"""
The simulation runs the curriculum that trains, all its arms see the same random numbers, and what it prints,
draws and measures is what it says.
"""

import json
import math
import sys

import numpy as np
import pytest

from curriculum import DIFFICULTY, NUM_RANGES, Curriculum
from lab import simulate_curriculum
from lab.simulate_curriculum import (
    ARMS,
    DCL,
    LEARNERS,
    LEVELS,
    LINEAR,
    NO_FEEDBACK,
    REVERSED,
    YOKED,
    levels_of,
    read_levels,
    simulate,
)
from masks import LENGTHS, TASKS

NOISE, SLOW, STEPS, STRONG = range(len(LEARNERS))
SHAPE = (len(TASKS), len(LENGTHS))
RISING = {"relative": np.linspace(0.5, 1.5, 18).reshape(SHAPE), "noise": 0.4, "from": "made up"}
EQUAL = RISING | {"relative": np.ones(SHAPE)}


@pytest.fixture(scope="module")
def log():
    """As the program runs it, with half of the seeds."""
    return simulate(read_levels(LEVELS), seeds=range(8))


@pytest.fixture(scope="module")
def short():
    return simulate(RISING, seeds=range(3), total_steps=100)


# The curricula


@pytest.mark.parametrize("learner", range(len(LEARNERS)))
def test_dcl_is_the_curriculum_that_trains(short, learner):
    this, seed = Curriculum("dcl", 100), 1
    assert short["horizon"] == this.horizon
    for step in range(100):
        np.testing.assert_allclose(short["P"][step, learner, DCL, seed], this.probabilities(step), rtol=1e-9)
        assert short["aim"][step, learner, DCL, seed] == pytest.approx(this.aim(step), rel=1e-9)
        assert short["L_s"][step, learner, DCL, seed] == pytest.approx(float(this.state["L_s"]), rel=1e-9)
        this.update(short["losses"][step, learner, DCL, seed], short["counts"][step, seed])
    assert abs(this.aim(99) - this.terms(99)["set_point"]) > 0.01  # so the loop was closed


def test_linear_is_the_curriculum_that_trains_and_reversed_its_way_back(short):
    this, P = Curriculum("linear", 100), short["P"]
    for step in range(100):
        assert (abs(P[step, :, LINEAR] - this.probabilities(step)) < 1e-12).all()
        assert (abs(P[step, :, REVERSED] - this.probabilities(99 - step)) < 1e-12).all()


def test_without_feedback_the_aim_is_the_set_point(short):
    this = Curriculum("dcl", 100)  # told nothing
    for step in range(100):
        assert (abs(short["P"][step, :, NO_FEEDBACK] - this.probabilities(step)) < 1e-12).all()


def test_yoked_replays_the_course_of_the_next_seed(short):
    P = short["P"]
    for seed, other in ((0, 1), (1, 2), (2, 0)):
        assert (P[:, :, YOKED, seed] == P[:, :, DCL, other]).all()
        assert (P[-1, :, YOKED, seed] != P[-1, :, DCL, seed]).any(axis=(-1, -2)).all()  # by learner


def test_without_levels_that_differ_the_feedback_changes_no_loss():
    log = simulate(EQUAL, seeds=range(2), total_steps=200)
    losses = log["losses"][:, :STRONG]
    assert (losses == losses[:, :, :1]).all()
    assert (log["L_s"][:, :STRONG] == log["L_s"][:, :STRONG, :1]).all()
    assert (log["aim"][20:, :, DCL] != log["aim"][20:, :, NO_FEEDBACK]).mean() > 0.99  # though it acts


# The learners


def test_all_arms_see_the_same_random_numbers(short, monkeypatch):
    losses, horizon = short["losses"], short["horizon"]
    assert (losses[:horizon, :, [DCL, YOKED]] == losses[:horizon, :, [NO_FEEDBACK] * 2]).all()  # equal P
    assert (losses[horizon:, :, DCL] != losses[horizon:, :, NO_FEEDBACK]).any()

    def the_same(progress, P_star, usual):
        P = np.random.default_rng(0).dirichlet(np.ones(18)).reshape(SHAPE)
        return np.broadcast_to(P, (*P_star.shape, *SHAPE)), 0 * P_star

    monkeypatch.setattr(simulate_curriculum, "probabilities", the_same)
    losses = simulate(RISING, seeds=range(2), total_steps=20)["losses"]
    assert (losses == losses[:, :, :1]).all()
    assert (losses[:, :, :, 0] != losses[:, :, :, 1]).any(axis=(0, 1, 2, 3))  # seeds are not


@pytest.mark.parametrize("task, k", [(0, 0), (1, 4), (2, 1), (2, 5)])
def test_a_loss_is_base_times_level(monkeypatch, task, k):
    P = np.zeros(SHAPE)
    P[task, k] = 1
    monkeypatch.setattr(
        simulate_curriculum,
        "probabilities",
        lambda _, P_star, __: (np.broadcast_to(P, (*P_star.shape, *SHAPE)), P_star),
    )
    log = simulate(RISING | {"noise": 0.0}, seeds=[3], total_steps=30)
    base = simulate_curriculum.base(30) * log["counts"][:, 0]  # (steps, NUM_RANGES)
    expected = base[:, None] * RISING["relative"][task, k]
    np.testing.assert_allclose(log["losses"][:, NOISE, :, 0], np.broadcast_to(expected, (30, 5, NUM_RANGES)))
    factor = log["losses"][:, STRONG, 0, 0].sum(-1) / log["losses"][:, SLOW, 0, 0].sum(-1)
    np.testing.assert_allclose(factor, (0.5 + DIFFICULTY[task, k]) / RISING["relative"][task, k])


def test_base_falls_and_is_larger_at_small_timesteps():
    base = simulate_curriculum.base(500)
    assert base.shape == (500, NUM_RANGES)
    assert (np.diff(base, axis=0) < 0).all() and (np.diff(base, axis=1) <= 0).all()
    assert 5 < base[0, 0] / base[0, -1] < 10


def test_levels_come_as_often_as_their_probability():
    P = np.random.default_rng(1).dirichlet(np.ones(18), (1, 2, 1)).reshape(1, 2, 1, *SHAPE)
    uniform = (np.arange(20_000) + 0.5)[None] / 20_000
    drawn = simulate_curriculum.draw_levels(P, uniform)
    for arm in range(2):
        share = np.bincount(drawn[0, arm, 0], minlength=18) / 20_000
        expected = P[0, arm, 0].ravel()[np.argsort(DIFFICULTY, axis=None, kind="stable")]
        np.testing.assert_allclose(share, expected, atol=1e-4)


def test_timesteps_are_spread_over_a_batch_and_uniform(log):
    counts = log["counts"]  # (steps, seeds, NUM_RANGES)
    assert counts.max() == 1 and (counts.sum(-1) == 8).all()  # eight samples, no two of them in one range
    np.testing.assert_allclose(counts.mean((0, 1)), 0.8, atol=0.02)


def test_noise_has_mean_1_and_the_deviation_that_is_asked_for():
    log = simulate(EQUAL | {"noise": 0.8}, seeds=range(8), total_steps=300)
    factor = (
        log["losses"][:, NOISE, LINEAR] / simulate_curriculum.base(300)[:, None]
    )  # (steps, seeds, NUM_RANGES)
    factor = factor[log["counts"] == 1]  # single samples
    assert len(factor) == 300 * 8 * 8
    assert factor.mean() == pytest.approx(1, abs=0.03)
    assert np.log(factor).std() == pytest.approx(0.8, abs=0.02)


def test_disturbances_are_those_that_are_named():
    _, _, _, disturbance = simulate_curriculum.draw(range(32), 2000, 1)  # (steps, learners, seeds)
    noise, slow, steps, strong = np.moveaxis(disturbance, 1, 0)
    assert not noise.any() and (strong == slow).all() and set(np.unique(steps)) == {-0.15, 0.15}
    assert slow.std() == pytest.approx(0.1, abs=0.01)
    later = [np.corrcoef(slow[:-lag].ravel(), slow[lag:].ravel())[0, 1] for lag in (1, 100)]
    assert later == pytest.approx([math.exp(-0.01), math.exp(-1)], abs=0.08)  # 100 steps: a twentieth
    turns = [np.diff(np.flatnonzero(np.diff(run))) for run in steps.T]
    assert all((turn == 100).all() and len(turn) >= 17 for turn in turns)


# What is measured


def test_swings_are_what_a_running_mean_leaves():
    assert simulate_curriculum.swings(np.array([4.0, 0, 6, 6]), 2).tolist() == [0, -2, 2, 1]  # 4, 2, 4, 5
    falls = np.linspace(1, 0, 1000)
    assert simulate_curriculum.swings(falls, 50)[200:].std() < 1e-3 < falls[200:].std()


def test_measure_by_hand(monkeypatch):
    monkeypatch.setattr(simulate_curriculum, "swings", lambda L_s, horizon: L_s)
    L_s, aim = np.zeros((6, 4, 5, 2)), np.zeros((6, 4, 5, 2))
    L_s[:2] = 1000  # before the horizon: does not count
    L_s[2:, :, YOKED] = np.array([0, 0, 4, -4])[:, None, None]
    L_s[2:, :, DCL] = np.array([1, -1, 1, -1])[:, None, None]
    L_s[2:, :, [LINEAR, REVERSED, NO_FEEDBACK]] = np.array([2, -2, 2, -2])[:, None, None, None]
    aim[2:, :, DCL] = np.array([0.1, 0.3, 0.1, 0.3])[:, None, None]
    measured = simulate_curriculum.measure(dict(L_s=L_s, aim=aim, horizon=2))
    expected = dict(zip(ARMS, (2, 2, 2, 1, 8**0.5)))
    expected |= {"dcl / yoked": 8**-0.5, "dcl / no feedback": 0.5, "dcl / linear": 0.5}
    expected |= {"mean of aim - set point": 0.2, "deviation of aim - set point": 0.1}
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], np.full((4, 2), value), err_msg=name)


def test_where_levels_differ_the_loop_steadies_the_loss_and_else_it_does_little(log):
    """Against yoked, which has the same order without the loop."""
    ratio = simulate_curriculum.measure(log)["dcl / yoked"]  # (learners, seeds)
    difference = ratio.mean(axis=1) - 1
    se = ratio.std(axis=1, ddof=1) / ratio.shape[1] ** 0.5
    assert difference[STRONG] < -2 * se[STRONG] and difference[STRONG] < -0.05
    assert (abs(difference[[NOISE, SLOW, STEPS]]) < 0.03).all()


def test_the_table_has_means_and_standard_errors_over_seeds():
    values = np.array([[1.0, 2.0, 3.0]] * 4) * [[1], [2], [3], [4]]
    header, _, line = simulate_curriculum.table_of({"name": values}).splitlines()
    assert all(name in header for name in LEARNERS)
    assert "| name | 2.0000 ± 0.5774 | 4.0000 ± 1.1547 |" in line


# Levels


def arm_of(relative, noise):
    """An arm.json with this number for (task, k), a (3, 6) list."""
    levels = [(t, k) for t in range(3) for k in range(6)]
    cell = lambda t, k: dict(mean=9.0, se=9.0, relative=relative[t][k], noise=noise[t][k])
    return dict(cells={f"{TASKS[t]}, {LENGTHS[k]}": cell(t, k) for t, k in levels}, about={})


def test_levels_are_means_over_runs_of_mean_1():
    one, two = np.arange(1.0, 19).reshape(3, 6), 19 * np.ones((3, 6))
    levels = levels_of([arm_of(one, np.full((3, 6), 0.2)), arm_of(two, np.full((3, 6), 0.6))])
    mean = (one + two) / 2  # 10, 10.5, ... 18.5
    np.testing.assert_allclose(levels["relative"], mean / 14.25)
    assert np.mean(levels["relative"]) == pytest.approx(1)
    assert levels["noise"] == pytest.approx(0.38525, abs=1e-5)  # sqrt(log(1 + 0.4^2))
    z = np.random.default_rng(0).standard_normal(200_000)
    drawn = np.exp(levels["noise"] * z - levels["noise"] ** 2 / 2)
    assert drawn.std() / drawn.mean() == pytest.approx(0.4, abs=0.01)


def test_the_levels_that_ship_were_measured():
    levels = read_levels(LEVELS)
    assert "trained networks" in levels["from"]
    assert np.mean(levels["relative"]) == pytest.approx(1)


# The program


@pytest.fixture
def run(short, monkeypatch, capsys):
    """Calls the program with these flags; a short simulation has been done. Returns its exit status, and what
    it said on both streams."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["simulate_curriculum", *map(str, flags)])
        monkeypatch.setattr(simulate_curriculum, "simulate", lambda levels: short)
        try:
            simulate_curriculum.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_it_prints_a_table_and_writes_the_plot_and_nothing_else(run, tmp_path):
    status, out, _ = run("--plot", tmp_path / "curve.png")
    assert status == 0 and read_levels(LEVELS)["from"] in out
    rows = [line.split(" | ")[0].strip("| ") for line in out.splitlines() if line.startswith("| ")]
    assert rows[2 : 2 + len(ARMS)] == list(ARMS) and "dcl / yoked" in rows
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_is_no_png_is_one_sentence(run, tmp_path):
    status, out, said = run("--plot", tmp_path / "curve.txt")
    assert status == 2 and not out and "ends in .png" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


GOOD = dict(relative=np.ones(SHAPE).tolist(), noise=0.4, **{"from": "here"})
BROKEN = {
    "cut short": json.dumps(GOOD)[:50],
    "no dict": "[1, 2]",
    "no noise": json.dumps({name: GOOD[name] for name in ("relative", "from")}),
    "no sentence": json.dumps({name: GOOD[name] for name in ("relative", "noise")}),
    "noise not a number": json.dumps(GOOD | dict(noise=math.nan)),
    "negative noise": json.dumps(GOOD | dict(noise=-0.1)),
    "mean 2": json.dumps(GOOD | dict(relative=[[2.0] * 6] * 3)),
    "a level of 0": json.dumps(GOOD | dict(relative=[[0.0, 2.0] * 3] * 3)),
    "two tasks": json.dumps(GOOD | dict(relative=[[1.0] * 6] * 2)),
    "ragged": json.dumps(GOOD | dict(relative=[[1.0] * 6, [1.0], [1.0]])),
    "words": json.dumps(GOOD | dict(relative="hard")),
    "infinite": json.dumps(GOOD | dict(relative=[[math.inf] * 6] * 3)),
    "huge": json.dumps(GOOD | dict(noise=10**400)),
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_levels_is_one_sentence(run, tmp_path, name):
    path, text = tmp_path / "levels.json", BROKEN[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, said = run("--levels", path)
    assert status == 2 and not out and said.count("\n") == 1 and f"--levels {path}" in said
    path.write_text(json.dumps(GOOD))
    assert run("--levels", path)[:1] == (0,)


def test_a_file_of_levels_that_is_missing_is_one_sentence(run, tmp_path):
    status, _, said = run("--levels", tmp_path / "none.json")
    assert status == 2 and said.count("\n") == 1 and "none.json" in said


def test_levels_are_measured_from_runs_and_read_back(run, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"ddu-{seed}").mkdir()
        arm = arm_of(RISING["relative"] * (1 + seed), np.full(SHAPE, 0.5))
        (tmp_path / f"ddu-{seed}" / "arm.json").write_text(json.dumps(arm))
    path = tmp_path / "levels.json"
    status, out, _ = run("--measure", tmp_path / "ddu-0", tmp_path / "ddu-1", "--levels", path)
    assert status == 0 and out == f"wrote {path}\n"
    levels = read_levels(path)
    np.testing.assert_allclose(levels["relative"], RISING["relative"])
    assert levels["noise"] == pytest.approx(math.sqrt(math.log(1.25)))
    assert "ddu-0, ddu-1" in levels["from"] and "2 trained" in levels["from"]
    assert levels["from"] in run("--levels", path)[1]


@pytest.mark.parametrize("text", [None, "{", "{}", '{"cells": {"image, 3": {}}}', '{"cells": []}', "[]"])
def test_a_run_without_measured_levels_is_one_sentence(run, tmp_path, text):
    if text:
        (tmp_path / "arm.json").write_text(text)
    path = tmp_path / "levels.json"
    status, out, said = run("--measure", tmp_path, "--levels", path)
    assert status == 2 and not out and said.count("\n") == 1 and f"--measure {tmp_path}" in said
    assert not path.exists()
