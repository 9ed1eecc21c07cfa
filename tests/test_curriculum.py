"""
The curriculum's promises: it always gives probabilities, follows Eqs. 2-4, goes from easy to hard, pushes the
loss back, is not moved by the timesteps that are drawn, and resumes exactly.
"""

import json
import math
import re

import numpy as np
import pytest

import curriculum
from curriculum import DIFFICULTY, NUM_RANGES, STRATEGIES, Curriculum
from masks import LENGTHS, TASKS

HOSTILE = {  # losses of one sample, step by step
    "zeros": [0.0] * 50,
    "constant": [0.3] * 300,
    "negative zero": [-0.0, 0.0, -0.0, 1.0, -0.0],
    "spikes": [0.1, 1e6, 0.1, 0.0, 1e6, 0.1] * 20,
    "huge": [1e300, 1.7e308, 0.1, 1e300, 0.0, 1e300],
    "denormal": [5e-324, 1e-310, 0.0, 5e-324, 1.0, 5e-324],
    "zero then one": [0.0] * 30 + [1.0] * 30,
    "one then zero": [1.0] * 30 + [0.0] * 300,
}
DRAWN = {  # which ranges of timesteps a step has samples of
    "all": lambda step: np.ones(NUM_RANGES),
    "one": lambda step: np.eye(NUM_RANGES)[step % NUM_RANGES],
    "some, several times": lambda step: np.arange(NUM_RANGES) * (np.arange(NUM_RANGES) % 3 == step % 3),
    "now and then none": lambda step: np.full(NUM_RANGES, step % 2),
}


def one_each(loss):
    """What Curriculum.update takes after a step of one sample in every range, all of the same loss."""
    return np.full(NUM_RANGES, loss), np.ones(NUM_RANGES)


def after(losses, strategy="dcl", total_steps=1000):
    """The curriculum after steps of these losses; its horizon is a tenth of total_steps."""
    this = Curriculum(strategy, total_steps)
    for loss in losses:
        this.update(*one_each(loss))
    return this


def feedback_of(this):
    """P*, the sum of the three terms."""
    return sum(float(this.state[name]) for name in "pid")


def mean_k(P):
    return float((P * LENGTHS).sum())


def assert_distribution(P):
    assert P.shape == (len(TASKS), len(LENGTHS)) and P.dtype == np.float64
    assert (P >= 0).all() and (P <= 1).all() and abs(P.sum() - 1) < 1e-12


# Always a distribution


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("name", HOSTILE)
def test_any_finite_losses_leave_a_distribution(strategy, drawn, name):
    """In a training whose horizon is short, so that the feedback speaks, and in a long one."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        losses = HOSTILE[name]
        for this in (Curriculum(strategy, len(losses)), Curriculum(strategy, 1000)):
            for step, loss in enumerate(losses):
                assert_distribution(this.probabilities(step))
                counts = DRAWN[drawn](step)
                this.update(loss * (counts > 0), counts)
                terms = this.terms(step)
                assert all(math.isfinite(value) for value in terms.values())
                assert 0 <= terms["aim"] <= 1 and 0 <= terms["difficulty"] <= 1


@pytest.mark.parametrize("seed", range(5))
def test_losses_of_any_magnitude_leave_a_distribution(seed):
    rng = np.random.default_rng((seed, 0, 0))
    this = Curriculum("dcl", 400)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for step in range(400):
            assert_distribution(this.probabilities(step))
            counts = rng.integers(0, 3, NUM_RANGES)
            this.update(10.0 ** rng.uniform(-320, 308, NUM_RANGES) * (counts > 0), counts)


def test_dcl_never_starves_a_level():
    for name, losses in HOSTILE.items():
        total = len(losses)
        for step in (0, total // 2, total - 1):
            assert after(losses, total_steps=total).probabilities(step).min() > 0.01, (name, step)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -1e-9])
def test_a_loss_that_is_not_finite_or_negative_is_refused_and_leaves_no_trace(loss):
    this = after([0.5, 0.4])
    before = this.state_dict()
    losses, counts = one_each(0.5)
    losses[3] = loss
    with pytest.raises(ValueError, match="finite ones of at least 0"):
        this.update(losses, counts)
    assert this.state_dict() == before


@pytest.mark.parametrize("arguments", [("random", 10), ("DCL", 10), (None, 10), ("dcl", 0), ("dcl", 1.5)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        Curriculum(*arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_training_is_refused(strategy, step):
    this = Curriculum(strategy, 10)
    for function in (this.probabilities, this.aim, this.terms):
        with pytest.raises(ValueError, match="outside"):
            function(step)


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
    calm, wild = [0.1] * 200, [0.1, 5.0] * 100
    assert (after(calm, strategy).probabilities(200) == after(wild, strategy).probabilities(200)).all()
    assert (after(calm).probabilities(200) != after(wild).probabilities(200)).any()


def test_a_training_of_one_step_works():
    for strategy in STRATEGIES:
        this = Curriculum(strategy, 1)
        assert_distribution(this.probabilities(0))
        this.update(*one_each(0.5))


# From easy to hard


def test_the_set_point_rises_over_the_training_and_a_steady_loss_leaves_the_aim_on_it():
    this, aims = Curriculum("dcl", 500), []
    for step in range(500):
        terms = this.terms(step)
        assert terms["aim"] == pytest.approx(terms["set_point"], abs=1e-12)
        aims.append(terms["aim"])
        this.update(*one_each(0.2))
    assert aims[0] == pytest.approx(0.05) and aims[-1] == pytest.approx(0.95)
    np.testing.assert_allclose(np.diff(aims), 0.9 / 499)


def test_with_a_steady_loss_dcl_goes_from_easy_to_hard_in_task_and_in_k():
    this, difficulties, lengths = Curriculum("dcl", 500), [], []
    for step in range(500):
        P = this.probabilities(step)
        difficulties.append(this.terms(step)["difficulty"])
        assert difficulties[-1] == pytest.approx((P * DIFFICULTY).sum())
        lengths.append(mean_k(P))
        this.update(*one_each(0.2))
    assert (np.diff(difficulties) > 0).all() and (np.diff(lengths) > 0).all()
    assert difficulties[-1] - difficulties[0] >= 0.3
    assert lengths[-1] - lengths[0] >= 1  # of six lengths, half of whose probability is uniform
    assert mean_k(Curriculum("linear", 500).probabilities(499)) == pytest.approx(5.5)


def test_a_higher_aim_always_means_harder_samples_and_every_level_has_its_turn():
    maps = curriculum.difficulty_map(np.linspace(0, 1, 101))  # (101, 3, 6)
    assert (np.diff((maps * DIFFICULTY).sum((1, 2))) > 0).all()
    assert maps[0].argmax() == 0 and maps[-1].argmax() == 17
    assert (maps * DIFFICULTY).sum((1, 2))[50] == pytest.approx(0.5)
    assert (np.diff(DIFFICULTY, axis=0) > 0).all()  # H(IPT, N) <= H(PDT, N) <= H(GRT, N)
    assert (np.diff(DIFFICULTY, axis=1) > 0).all()  # H(*, N-1) <= H(*, N)


def test_dcl_is_half_static_and_half_adaptive():
    this = after([1.0, 2.0, 0.5] * 10, total_steps=101)
    assert this.aim(70) != pytest.approx(this.terms(70)["set_point"], abs=0.01)
    static = Curriculum("linear", 101).probabilities(70)
    adaptive = curriculum.difficulty_map(this.aim(70))
    np.testing.assert_allclose(this.probabilities(70), (static + adaptive) / 2, rtol=1e-12)


# Feedback, Eqs. 3 and 4


@pytest.mark.parametrize("step", [300, 500, 900])
def test_loss_above_history_makes_the_next_sample_easier_and_below_harder(step):
    def difficulty(recent):
        return after([0.2] * (step - 20) + [recent] * 20).terms(step)["difficulty"]

    assert difficulty(0.4) < difficulty(0.2) - 0.03 and difficulty(0.1) > difficulty(0.2) + 0.03


def test_which_timesteps_were_drawn_moves_nothing():
    """Losses of the ranges differ a hundredfold, so that the mean loss of a step tells its timesteps."""
    rng, total = np.random.default_rng((2, 0, 0)), 300
    loss, this, means = np.geomspace(0.01, 1, NUM_RANGES), Curriculum("dcl", total), []
    for step in range(total):
        counts = rng.integers(0, 3, NUM_RANGES) * (rng.random(NUM_RANGES) < 0.3)
        this.update(loss * counts, counts)
        means.append((loss * counts).sum() / max(counts.sum(), 1))
        assert abs(float(this.state["L_s"])) < 1e-9
    assert np.std(means) > 0.3 * np.mean(means)
    assert this.aim(total - 1) == pytest.approx(0.95)
    np.testing.assert_allclose(this.state["history"], loss)


def test_a_range_whose_loss_rises_is_noticed_whichever_it_is():
    for where in range(NUM_RANGES):
        this, counts = after([0.2] * 200), np.eye(NUM_RANGES)[where]
        this.update(0.4 * counts, counts)
        assert float(this.state["L_s"]) == pytest.approx(1 / 20)


def test_the_scale_of_the_loss_does_not_matter():
    losses = np.random.default_rng((0, 0, 0)).uniform(0.5, 1.5, 200)
    small, large = after(1e-4 * losses), after(1e6 * losses)
    assert feedback_of(small) != pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(small.probabilities(200), large.probabilities(200), rtol=1e-9)


def test_equations_3_and_4_against_numbers_by_hand():
    """Two ranges of timesteps, a training of 30 steps, hence a horizon of three."""
    this = Curriculum("dcl", 30)

    def update(first_loss, first_count, second_loss, second_count):
        losses, counts = np.zeros((2, NUM_RANGES))
        losses[[0, 7]], counts[[0, 7]] = (first_loss, second_loss), (first_count, second_count)
        this.update(losses, counts)
        return {name: float(this.state[name]) for name in ("L_s", "integral", "p", "i", "d")}

    def aim(s, P_star):
        return 1 / (1 + (1 - s) / s * math.exp(P_star))

    # One sample of loss 1: there is nothing to compare it with.
    assert update(1, 1, 0, 0) == dict(L_s=0, integral=0, p=0, i=0, d=0)
    # Two samples of mean 1.5 where 1 is usual: 3 / 2 - 1 is a half. The other range is new, and not compared.
    terms = dict(p=5 / 4, i=3 / 8, d=1.3 / 4)
    assert update(3, 2, 10, 1) == pytest.approx(dict(L_s=1 / 4, integral=1 / 8, **terms))
    assert this.aim(2) == pytest.approx(0.05 + 0.9 * 2 / 29)  # no horizon has passed
    usual = sum(terms.values()) / 2
    # Histories are 1.25 and 10: 1.25 and twice 7.5, where 21.25 is usual, so 16.25 / 21.25 - 1 = -4 / 17.
    L_s = (1 / 4 + 1 / 4 - 4 / 17) / 3
    integral = (1 / 8 + 1 / 8 + L_s) / 3
    terms = dict(p=5 * L_s, i=3 * integral, d=1.3 * (L_s - 1 / 4))
    assert update(1.25, 1, 15, 2) == pytest.approx(dict(L_s=L_s, integral=integral, **terms))
    P_star = sum(terms.values())
    usual = (2 * usual + P_star) / 3
    assert this.aim(3) == pytest.approx(aim(0.05 + 0.9 * 3 / 29, P_star - usual))
    assert [this.terms(3)[f"{name}_term"] for name in "pid"] == pytest.approx(list(terms.values()))
    # 2 where 1.25 is usual: 2 / 1.25 - 1 = 0.6. Beyond the horizon a mean moves by a third of the way.
    before, L_s = L_s, (3 * L_s + 0.6) / 4
    integral += (L_s - integral) / 3
    terms = dict(p=5 * L_s, i=3 * integral, d=1.3 * (L_s - before))
    assert update(2, 1, 0, 0) == pytest.approx(dict(L_s=L_s, integral=integral, **terms))
    assert this.state["history"][[0, 7]].tolist() == pytest.approx([1.5, 8.75])


def test_the_feedback_says_nothing_until_a_horizon_has_passed():
    this = Curriculum("dcl", 100)
    for step, loss in enumerate([1.0, 5.0, 0.1, 3.0, 2.0, 0.5, 4.0, 1.0, 9.0]):
        assert this.aim(step) == pytest.approx(this.terms(step)["set_point"])
        this.update(*one_each(loss))
    assert abs(feedback_of(this)) > 1
    this.update(*one_each(9.0))
    assert feedback_of(this) > 1 and this.aim(10) < this.terms(10)["set_point"]


def test_a_loss_that_falls_steadily_leaves_the_set_point():
    """It lies below its history all the time: that is usual, and moves nothing for long."""
    this = Curriculum("dcl", 1000)
    for step in range(900):
        this.update(*one_each(math.exp(-step / 150)))
    assert feedback_of(this) < -1 and this.aim(900) == pytest.approx(this.terms(900)["set_point"], abs=0.01)


@pytest.mark.parametrize("total, horizon", [(1000, 100), (50_000, 5000), (30, 3), (6, 1), (1, 1)])
def test_the_horizon_is_a_tenth_of_the_training(total, horizon):
    assert Curriculum("dcl", total).horizon == horizon


def test_means_are_exponential_beyond_their_horizon():
    this = after([1.0] * 500 + [2.0])  # a plain running mean would move by 1/501 of the way
    assert float(this.state["L_s"]) == pytest.approx(1 / 20)
    np.testing.assert_allclose(this.state["history"], 1 + 1 / 100)
    assert float(this.state["integral"]) == pytest.approx(1 / 20 / 100)


def test_many_runs_at_once_are_each_run_alone():
    rng, runs, horizon = np.random.default_rng((3, 0, 0)), 6, 8
    together = curriculum.initial_state((2, 3))
    alone = [curriculum.initial_state() for _ in range(runs)]
    for _ in range(40):
        counts = rng.integers(0, 3, (2, 3, NUM_RANGES))
        losses = rng.lognormal(0, 1, counts.shape) * counts
        together = curriculum.feedback(together, losses, counts, horizon)
        each = zip(alone, losses.reshape(runs, NUM_RANGES), counts.reshape(runs, NUM_RANGES))
        alone = [curriculum.feedback(state, *step, horizon) for state, *step in each]
    assert together.keys() == alone[0].keys() and together["count"] == alone[0]["count"] == 40
    for name in together.keys() - {"count"}:
        values = together[name].reshape(runs, *np.shape(alone[0][name]))
        assert np.unique(values).size > 1
        np.testing.assert_allclose(values, [state[name] for state in alone], rtol=1e-12, err_msg=name)


# Saving and resuming


def test_a_resumed_curriculum_repeats_the_unbroken_one_bit_for_bit():
    rng = np.random.default_rng((1, 0, 0))
    unbroken, resumed = Curriculum("dcl", 1000), None
    for step in range(800):
        if step in (0, 1, 7, 99, 100, 400):  # also before any loss, and where the feedback begins
            resumed = Curriculum("dcl", 1000)
            resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
        assert (unbroken.probabilities(step) == resumed.probabilities(step)).all()
        assert unbroken.terms(step) == resumed.terms(step)
        counts = rng.integers(0, 3, NUM_RANGES)
        losses = rng.lognormal(-2, 1, NUM_RANGES) * counts
        unbroken.update(losses, counts)
        resumed.update(losses, counts)
    assert unbroken.state_dict() == resumed.state_dict()


def test_a_saved_state_does_not_change_with_the_run():
    this = after([0.5])
    state = this.state_dict()
    copy = json.loads(json.dumps(state))
    this.update(*one_each(3.0))
    assert state == copy != this.state_dict()


@pytest.mark.parametrize("change", [dict(strategy="linear"), dict(total_steps=11)])
def test_a_state_of_another_run_is_refused(change):
    state = after([0.5, 0.3], total_steps=10).state_dict()
    with pytest.raises(ValueError, match=next(iter(change))):
        Curriculum("dcl", 10).load_state_dict({**state, **change})


@pytest.mark.parametrize("name", curriculum.initial_state())
def test_an_incomplete_state_is_refused(name):
    state = Curriculum("dcl", 10).state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"lacks {name}:"):
        Curriculum("dcl", 10).load_state_dict(state)


# python curriculum.py

NUMBER = r"-?\d+\.\d+"


@pytest.fixture
def printed(capsys):
    """What the thirty lines say: a dict of columns, (30,) each; static and drawn, in percent, (30, 3). And
    `text`, all that is printed."""
    curriculum.main()
    text = capsys.readouterr().out
    lines = re.findall(r"^ ?\d+ +(?:-|\d).*$", text, re.MULTILINE)
    values = np.array([line.replace(" - ", " nan ").split() for line in lines], float)  # (30, 16)
    columns = dict(zip(("t", "loss", "L_s", "p", "i", "d", "s", "u", "difficulty"), values.T))
    return columns | dict(static=values[:, 9:12], drawn=values[:, 12:15], mean_k=values[:, 15], text=text)


def test_the_printed_steps_obey_the_equations(printed):
    """Worked out here once more, for losses that are the same at all timesteps."""
    assert printed["t"].tolist() == list(range(1, 31)) and math.isnan(printed["loss"][0])
    L_s = integral = p = i = d = usual = 0
    history = math.nan
    for step, loss in enumerate(printed["loss"]):
        if step == 1:
            history = loss
        elif step:
            before, L_s = L_s, L_s + (loss / history - 1 - L_s) / min(step, 20)
            integral += (L_s - integral) / min(step, 3)
            history += (loss - history) / min(step, 3)
            p, i, d = 5 * L_s, 3 * integral, 1.3 * (L_s - before)
            usual += (p + i + d - usual) / min(step, 3)
        s = 0.05 + 0.9 * step / 29
        u = 1 / (1 + (1 - s) / s * math.exp(p + i + d - usual))  # until step 3 all losses are equal
        expected = dict(L_s=L_s, p=p, i=i, d=d, s=s, u=u)
        for name, value in expected.items():
            assert printed[name][step] == pytest.approx(value, abs=6e-4), (name, step + 1)


def test_the_printed_steps_are_those_of_the_curriculum_that_trains(printed):
    this, linear = Curriculum("dcl", 30), Curriculum("linear", 30)
    for step in range(30):
        if step:
            this.update(*one_each(printed["loss"][step]))
        P, terms = this.probabilities(step), this.terms(step)
        names = dict(p="p_term", i="i_term", d="d_term", s="set_point", u="aim", difficulty="difficulty")
        for column, name in names.items():
            assert printed[column][step] == pytest.approx(terms[name], abs=6e-4), (name, step + 1)
        static = linear.probabilities(step).sum(1)
        np.testing.assert_allclose(printed["static"][step], 100 * static, atol=0.51)
        np.testing.assert_allclose(printed["drawn"][step], 100 * P.sum(1), atol=0.51)
        assert printed["mean_k"][step] == pytest.approx(mean_k(P), abs=0.006)
    rows = [re.search(rf"^{task} +([\d. ]+)$", printed["text"], re.MULTILINE)[1].split() for task in TASKS]
    np.testing.assert_allclose(np.array(rows, float), 100 * P, atol=0.06)


def test_the_sentences_between_the_printed_steps_are_true(printed):
    """Of the lines that read the losses which a sentence speaks of."""
    loss, u, s, P_star = printed["loss"], printed["u"], printed["s"], sum(printed[name] for name in "pid")
    steady, falls, jumps = (loss == 1) | np.isnan(loss), loss == 0.5, loss == 1.5
    assert (steady.sum(), falls.sum(), jumps.sum()) == (13, 8, 9)

    assert not printed["L_s"][steady].any() and (u[steady] == s[steady]).all()
    assert (P_star[falls] < 0).all() and (u[falls] > s[falls]).all()
    assert (np.diff((u - s)[falls])[3:] < 0).all()  # then that is usual
    assert (u[jumps] < s[jumps]).all()
    terms = np.array([printed[name][jumps] for name in "pid"])  # (3, 9)
    assert terms[2, 0] == terms[:, 0].max() > 0 > terms[1, 0]  # D first
    p_peak, i_peak, d_peak = terms.argmax(axis=1)
    assert d_peak == 0 < p_peak < i_peak == 8  # I last

    as_usual = [Curriculum("dcl", 30).probabilities(step) for step in range(30)]  # with a steady loss
    for where, sign in ((falls, 1), (jumps, -1)):
        usual = np.array([(*P.sum(1), mean_k(P)) for P in as_usual])[where]  # (lines, 4)
        change = printed["drawn"][where, 2] - 100 * usual[:, 2]  # of generation
        assert (sign * change[:5] > 1).all()  # then the new loss is usual
        assert (sign * (printed["mean_k"][where] - usual[:, 3])[:5] > 0.02).all()
        difficulty = np.array([(P * DIFFICULTY).sum() for P in as_usual])[where]
        assert (sign * (printed["difficulty"][where] - difficulty) > 0).all()


def test_each_sentence_stands_above_the_lines_that_it_speaks_of(printed):
    """Line t reads the loss of step t - 1."""
    parts = re.split(r"^The loss (?=equals|falls|jumps)", printed["text"], flags=re.MULTILINE)[1:]
    read = [set(re.findall(r"^ ?\d+ +(-|[\d.]+)", part, re.MULTILINE)) for part in parts]
    assert read == [{"-", "1.00"}, {"0.50"}, {"1.50"}]


def test_the_numbers_by_hand_are_those_of_the_line_that_they_name(printed):
    said = re.search(r"By hand, at t = (\d+): (.*?)\n\n", printed["text"], re.DOTALL)
    line, text = int(said[1]) - 1, " ".join(said[2].split())
    shown = {name: printed[name][line] for name in ("L_s", "p", "i", "d", "s", "u")}

    def number(before):
        return float(re.search(rf"{re.escape(before)}({NUMBER})", text)[1])

    assert printed["loss"][line - 1 : line + 1].tolist() == [1.0, 0.5]
    assert number("(12 * 0 + 0.5 / 1 - 1) / 13 = ") == shown["L_s"] == pytest.approx(-0.5 / 13, abs=6e-4)
    P_star = number("P* = ")
    assert P_star == pytest.approx(shown["p"] + shown["i"] + shown["d"], abs=2e-3)
    assert shown["p"] == pytest.approx(5 * shown["L_s"], abs=3e-3)
    assert shown["i"] == pytest.approx(3 * shown["L_s"] / 3, abs=1e-3)
    assert shown["d"] == pytest.approx(1.3 * shown["L_s"], abs=2e-3)
    s, logit = map(float, re.search(rf"logit\(({NUMBER})\) = ({NUMBER})", text).groups())
    assert s == shown["s"] and logit == pytest.approx(math.log(s / (1 - s)), abs=2e-3)
    usual = number("its mean over three steps is ")
    assert usual == pytest.approx(P_star / 3, abs=1e-3)
    assert number("u = sigmoid(") == logit and number(f"sigmoid({logit} + ") == pytest.approx(usual - P_star)
    assert shown["u"] == pytest.approx(1 / (1 + math.exp(P_star - usual - logit)), abs=1e-3)
