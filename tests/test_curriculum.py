"""
The curriculum's promises: it always gives probabilities, follows Eqs. 2-4, pushes the loss back, and resumes
exactly; its simulation measures what it says.
"""

import json
import math
import re
import sys

import numpy as np
import pytest

import curriculum
from curriculum import Curriculum
from lab import simulate_curriculum
from lab.simulate_curriculum import PLANTS, measure, simulate
from masks import LENGTHS, TASKS

HOSTILE = {
    "zeros": [0.0] * 50,
    "constant": [0.3] * 1500,
    "negative zero": [-0.0, 0.0, -0.0, 1.0, -0.0],
    "spikes": [0.1, 1e6, 0.1, 0.0, 1e6, 0.1] * 20,
    "huge": [1e300, 1.7e308, 0.1, 1e300, -1.7e308, 1e300],
    "denormal": [5e-324, 1e-310, 0.0, 5e-324, 1.0, 5e-324],
    "negative": [-1.0, 1.0, -1.0, 1.0, -1e6, 3.0],
    "zero then one": [0.0] * 30 + [1.0] * 30,
    "one then zero": [1.0] * 30 + [0.0] * 1500,
}


def expected_difficulty(P):
    return float((P * curriculum.DIFFICULTY).sum())


def after(losses, strategy="dcl", total_steps=10_000):
    this = Curriculum(strategy, total_steps)
    for loss in losses:
        this.update(loss)
    return this


# Always a distribution


@pytest.mark.parametrize("strategy", curriculum.STRATEGIES)
@pytest.mark.parametrize("name", HOSTILE)
def test_any_finite_losses_leave_a_distribution(strategy, name):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        this = Curriculum(strategy, 2000)
        for step, loss in enumerate(HOSTILE[name]):
            P = this.probabilities(step)
            assert P.shape == (len(TASKS), len(LENGTHS)) and P.dtype == np.float64
            assert (P >= 0).all() and (P <= 1).all() and abs(P.sum() - 1) < 1e-12
            this.update(loss)
            assert all(math.isfinite(value) for value in this.terms.values())
            assert 0 <= this.terms["target"] <= 1


@pytest.mark.parametrize("seed", range(5))
def test_losses_of_any_magnitude_and_sign_leave_a_distribution(seed):
    rng = np.random.default_rng((seed, 0, 0))
    this = Curriculum("dcl", 400)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for step, (exponent, sign) in enumerate(zip(rng.uniform(-320, 308, 400), rng.choice([-1, 1], 400))):
            P = this.probabilities(step)
            assert (P >= 0).all() and (P <= 1).all() and abs(P.sum() - 1) < 1e-12
            this.update(sign * 10.0**exponent)


def test_dcl_never_starves_a_level():
    for name, losses in HOSTILE.items():
        assert after(losses).probabilities(9_999).min() > 0.01, name


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_leaves_no_trace(loss):
    this = after([0.5, 0.4])
    before = this.state_dict()
    with pytest.raises(ValueError, match="finite"):
        this.update(loss)
    assert this.state_dict() == before


@pytest.mark.parametrize("arguments", [("random", 10), ("DCL", 10), (None, 10), ("dcl", 0), ("dcl", 1.5)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        Curriculum(*arguments)


@pytest.mark.parametrize("strategy", curriculum.STRATEGIES)
@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_training_is_refused(strategy, step):
    with pytest.raises(ValueError, match="outside"):
        Curriculum(strategy, 10).probabilities(step)


# Static part, Eq. 2


def test_static_part_is_monotone_and_has_the_designs_end_points():
    this = Curriculum("linear", 1001)
    tasks = np.stack([this.probabilities(step).sum(1) for step in range(1001)])  # (steps, 3)
    change = np.diff(tasks, axis=0)
    assert (change[:, 0] < 0).all() and (change[:, 1:] > 0).all()
    np.testing.assert_allclose(tasks[0], (0.5, 0.2, 0.3))
    np.testing.assert_allclose(tasks[500], (0.35, 0.25, 0.4))
    np.testing.assert_allclose(tasks[-1], (0.2, 0.3, 0.5))


def test_k_is_uniform_in_the_static_part_and_everything_is_without_a_curriculum():
    P = Curriculum("linear", 10).probabilities(3)
    assert (P == P[:, :1]).all()
    assert (Curriculum("none", 10).probabilities(3) == 1 / 18).all()


@pytest.mark.parametrize("strategy", ["none", "linear"])
def test_only_dcl_listens_to_the_loss(strategy):
    calm, wild = after([0.1] * 40, strategy), after([0.1, 5.0] * 20, strategy)
    assert (calm.probabilities(40) == wild.probabilities(40)).all()
    assert (after([0.1] * 40).probabilities(40) != after([0.1, 5.0] * 20).probabilities(40)).any()


def test_a_training_of_one_step_works():
    for strategy in curriculum.STRATEGIES:
        assert abs(Curriculum(strategy, 1).probabilities(0).sum() - 1) < 1e-12


# Feedback, Eqs. 3 and 4


def test_before_and_at_the_first_loss_the_feedback_says_nothing():
    this = Curriculum("dcl", 10)
    fresh = dict(p=0, i=0, d=0, p_star=0, target=0.5)
    assert this.terms == fresh
    this.update(0.7)  # there is no history yet that it could differ from
    assert this.terms == fresh


def test_equations_3_and_4_against_numbers_by_hand():
    # Losses 1, 2, 3: smoothed 1, 1.5, 2; history 1, 1.25, 1.5; so L_s = 0, 1/5, 1/3, and its mean 0, 1/10,
    # 8/45.
    this = after([1.0, 2.0])
    assert this.terms == pytest.approx(
        dict(p=1.0, i=0.3, d=0.26, p_star=1.56, target=1 / (1 + math.exp(1.56 - 0.78)))
    )
    this.update(3.0)
    p_star = 5 / 3 + 3 * 8 / 45 + 1.3 * (1 / 3 - 1 / 5)
    assert this.terms == pytest.approx(
        dict(
            p=5 / 3,
            i=8 / 15,
            d=1.3 * 2 / 15,
            p_star=p_star,
            target=1 / (1 + math.exp(p_star - (0 + 1.56 + p_star) / 3)),
        )
    )


def test_means_are_exponential_beyond_their_horizon():
    this = after([1.0] * 5000 + [2.0])  # a plain running mean would move by 1/5001 of the way
    state = this.state_dict()
    assert state["L_c"] == pytest.approx(1 + 1 / 20)
    assert state["history"] == pytest.approx(1 + (1 / 20) / 1000)
    assert state["integral"] == pytest.approx(state["L_s"] / 1000)


def test_the_scale_of_the_loss_does_not_matter():
    losses = np.random.default_rng((0, 0, 0)).uniform(0.5, 1.5, 200)
    small, large = after(1e-4 * losses), after(1e6 * losses)
    np.testing.assert_allclose(small.probabilities(200), large.probabilities(200), rtol=1e-9)


def test_loss_above_history_makes_the_next_sample_easier_and_below_harder():
    usual = expected_difficulty(after([0.2] * 300).probabilities(300))
    above = expected_difficulty(after([0.2] * 300 + [0.4] * 20).probabilities(300))
    below = expected_difficulty(after([0.2] * 300 + [0.1] * 20).probabilities(300))
    assert above < usual - 0.05 and below > usual + 0.05


def test_a_steady_loss_asks_for_the_middle():
    assert after([0.2] * 3000).terms["target"] == 0.5
    assert expected_difficulty(curriculum.difficulty_map(0.5)) == pytest.approx(0.5)


def test_a_higher_target_always_means_harder_samples_and_every_level_has_its_turn():
    maps = curriculum.difficulty_map(np.linspace(0, 1, 101))  # (101, 3, 6)
    assert (np.diff((maps * curriculum.DIFFICULTY).sum((1, 2))) > 0).all()
    assert maps[0].argmax() == 0 and maps[-1].argmax() == 17
    assert (np.diff(curriculum.DIFFICULTY, axis=0) > 0).all()  # H(IPT, N) <= H(PDT, N) <= H(GRT, N)
    assert (np.diff(curriculum.DIFFICULTY, axis=1) > 0).all()  # H(*, N-1) <= H(*, N)


def test_dcl_is_half_static_and_half_adaptive():
    this = after([1.0, 2.0, 0.5], total_steps=101)
    static = Curriculum("linear", 101).probabilities(70)
    adaptive = curriculum.difficulty_map(this.terms["target"])
    np.testing.assert_allclose(this.probabilities(70), (static + adaptive) / 2, rtol=1e-12)


# Saving and resuming


def test_a_resumed_curriculum_repeats_the_unbroken_one_bit_for_bit():
    losses = np.random.default_rng((1, 0, 0)).lognormal(-2, 1, 2400)
    unbroken, resumed = Curriculum("dcl", 3000), None
    for step, loss in enumerate(losses):
        if step in (0, 1, 7, 1200):  # also within the running means, and before any loss
            resumed = Curriculum("dcl", 3000)
            resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
        assert (unbroken.probabilities(step) == resumed.probabilities(step)).all()
        assert unbroken.terms == resumed.terms
        unbroken.update(loss)
        resumed.update(loss)
    assert unbroken.state_dict() == resumed.state_dict()


def test_a_saved_state_does_not_change_with_the_run():
    this = after([0.5])
    state = this.state_dict()
    copy = dict(state)
    this.update(3.0)
    assert state == copy


@pytest.mark.parametrize("change", [dict(strategy="linear"), dict(total_steps=11)])
def test_a_state_of_another_run_is_refused(change):
    state = after([0.5, 0.3], total_steps=10).state_dict()
    with pytest.raises(ValueError, match=next(iter(change))):
        Curriculum("dcl", 10).load_state_dict({**state, **change})


def test_an_incomplete_state_is_refused():
    state = Curriculum("dcl", 10).state_dict()
    del state["integral"]
    with pytest.raises(ValueError, match="integral"):
        Curriculum("dcl", 10).load_state_dict(state)


# python curriculum.py


@pytest.fixture
def printed(capsys):
    """What the twelve lines say: a dict of columns, (12,) each; tasks and drawn, in percent, (12, 3)."""
    curriculum.main()
    lines = re.findall(r"^ ?\d+ +(?:-|\d).*$", capsys.readouterr().out, re.MULTILINE)
    values = np.array([line.replace(" - ", " nan ").split() for line in lines], float)  # (12, 18)
    names = ("t", "loss", "L_c", "history", "L_s", "p", "i", "d", "P_star", "mean", "u")
    columns = dict(zip(names, values.T), mean_k=values[:, -1])
    return columns | dict(static=values[:, 11:14], drawn=values[:, 14:17])


def test_the_printed_steps_obey_the_equations(printed):
    def running_mean(values):
        return np.cumsum(values) / np.arange(1, len(values) + 1)

    assert printed["t"].tolist() == list(range(1, 13)) and math.isnan(printed["loss"][0])
    this = {name: column[1:] for name, column in printed.items()}  # of the steps that read a loss
    for name, expected in dict(
        L_c=running_mean(this["loss"]),
        history=running_mean(this["L_c"]),
        L_s=(this["L_c"] - this["history"]) / this["history"],
        p=curriculum.K_P * this["L_s"],
        i=curriculum.K_I * running_mean(this["L_s"]),
        d=curriculum.K_D * np.diff(this["L_s"], prepend=0),
        P_star=this["p"] + this["i"] + this["d"],
        mean=running_mean(this["P_star"]),
        u=1 / (1 + np.exp(this["P_star"] - this["mean"])),
    ).items():
        np.testing.assert_allclose(this[name], expected, atol=4e-3, err_msg=name)  # three digits, times K_P


def test_the_printed_steps_are_those_of_the_curriculum_that_trains(printed):
    this, linear = Curriculum("dcl", 12), Curriculum("linear", 12)
    for step in range(12):
        if step:
            this.update(printed["loss"][step])
        P = this.probabilities(step)
        np.testing.assert_allclose(
            printed["static"][step], 100 * linear.probabilities(step).sum(1), atol=0.51
        )
        np.testing.assert_allclose(printed["drawn"][step], 100 * P.sum(1), atol=0.51)
        assert printed["mean_k"][step] == pytest.approx((P * LENGTHS).sum(), abs=0.006)


def test_the_sentences_between_the_printed_steps_are_true(printed):
    steady, falls, jumps = slice(0, 4), slice(4, 8), slice(8, 12)
    u, L_s, mean_k = printed["u"], printed["L_s"], printed["mean_k"]
    interpolation, _, generation = printed["drawn"].T
    assert (u[steady] == 0.5).all() and not L_s[steady].any()
    assert (printed["P_star"][falls] < 0).all() and (u[falls] > 0.5).all()
    assert (generation[falls] > generation[3]).all() and (mean_k[falls] > mean_k[3]).all()
    assert (u[jumps] < 0.5).all() and (mean_k[jumps] < mean_k[3]).all()
    assert (interpolation[jumps] > interpolation[7]).all() and (np.diff(printed["static"][:, 0]) < 0).all()
    assert printed["d"][8] > 0 > printed["p"][8] and printed["p"][9] > 0 > printed["i"][-1]  # D first, I last
    by_hand = [printed[name][4] for name in ("L_c", "history", "L_s")]
    assert by_hand == [0.875, 0.969, -0.097]


# The simulation


@pytest.fixture(scope="module")
def log():
    return simulate(seeds=range(4))  # half of them, and twice as fast


@pytest.fixture(scope="module")
def measured(log):
    return measure(log["relative_loss"])


def test_dcl_nowhere_spreads_the_loss_more_than_the_linear_curriculum(measured):
    _, linear, dcl, _ = measured["spread"].transpose(1, 0, 2)  # (plants, seeds) each
    assert dcl.shape == (4, 4)
    assert (dcl / linear).max() <= 1.02  # no plant, no seed


def test_dcl_damps_slow_swings_under_disturbance(measured):
    for plant in ("slow", "steps"):
        _, linear, dcl, no_feedback = measured["slow"][PLANTS.index(plant)].mean(-1)
        assert dcl <= 0.95 * linear
        assert dcl <= 0.95 * no_feedback  # it is the feedback that does it


def test_the_simulation_runs_the_curriculum_that_trains():
    log = simulate(seeds=range(3, 5), total_steps=60, batch_size=4)
    for plant in range(len(PLANTS)):
        this = Curriculum("dcl", 60)
        for step in range(60):
            P = this.probabilities(step)
            np.testing.assert_allclose(log["task"][step, plant, 2], P.sum(1), rtol=1e-9)
            np.testing.assert_allclose(log["mean_k"][step, plant, 2], (P * LENGTHS).sum(), rtol=1e-9)
            assert log["target"][step, plant] == pytest.approx(this.terms["target"])
            this.update(log["base"][step] * log["relative_loss"][step, plant, 2, 0])


def test_detrending_takes_away_trends_and_leaves_swings():
    steps = np.arange(6000)
    straight = np.exp(1 - steps / 3000)[:, None, None, None]
    swing = np.exp(0.1 * np.sin(2 * np.pi * steps / 400))[:, None, None, None]
    assert measure(straight)["spread"].item() < 1e-9
    both = measure(straight * swing)
    assert both["spread"].item() == pytest.approx(0.1 / math.sqrt(2), rel=0.02)
    assert both["slow"].item() == pytest.approx(0.9 * 0.1 / math.sqrt(2), rel=0.02)  # sinc(100 / 400) = 0.9


@pytest.fixture
def run(log, monkeypatch):
    """Calls the program with these flags; the simulation has been done."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["simulate_curriculum.py", *map(str, flags)])
        monkeypatch.setattr(simulate_curriculum, "simulate", lambda: log)
        simulate_curriculum.main()

    return run


def test_the_simulation_prints_a_table_and_writes_the_plot_and_nothing_else(run, tmp_path, capsys):
    run("--plot", tmp_path / "curve.png")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == list(PLANTS)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_is_no_png_is_one_sentence(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run("--plot", tmp_path / "curve.txt")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "ends in .png" in said and said.count("\n") == 1
