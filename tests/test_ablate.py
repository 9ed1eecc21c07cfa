"""The ablation's numbers by hand, its runs with a stand-in for the program, and one arm at toy size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import curriculum
from curriculum import Curriculum
from lab import ablate, ablation_tables, arm, courses
from masks import LENGTHS, TASKS
from support.common import UserError
from support.log import read_log

LEVELS = [f"{task}, {k}" for task in TASKS for k in LENGTHS]


def fake_log(losses, every=10):
    """An entry per step, of which every tenth has looked at the fixed batch, and at held-out clips."""
    log = []
    for step in range(1, every * len(losses) + 1):
        terms = dict(mean_k=5.0, p_term=0.1, aim=0.4, set_point=0.5, difficulty=0.45, loss=1 / step)
        log.append(dict(step=step, **terms))
        if step % every == 0:
            G1 = losses[step // every - 1]
            log[-1] |= dict(probe=1 / step, G1=G1, G1_ranges=[G1] * 5)
    return log


def write_arm(folder, losses, condition_masks=True, cells=True):
    folder.mkdir(parents=True)
    scores = {"image": {"network": dict(frechet=2.0, psnr=15.0), "cross-fade": dict(frechet=9.0, psnr=12.0)}}
    if condition_masks:
        scores["interpolation"] = {"network": dict(frechet=3.0, psnr=16.0)}
    log = fake_log(losses)
    result = dict(about=dict(clips=300), scores=scores, aims=[entry["aim"] for entry in log])
    result |= ablation_tables.digest(log)
    if cells:
        result["cells"] = {level: dict(mean=1.0, relative=float(i)) for i, level in enumerate(LEVELS)}
        result["drawn"] = {"no frame given": 0.25, **dict.fromkeys(LEVELS, 1 / 24)}
    (folder / "arm.json").write_text(json.dumps(result))


def read(tmp_path, losses):
    """losses: {(row, clips, seed): G1 at each look} -> {the same: of read_arm}"""
    arms = {}
    for (row, clips, seed), values in losses.items():
        folder = tmp_path / f"{row}-{clips}-{seed}"
        write_arm(folder, values, condition_masks=row != "sti", cells=row == "ddu")
        arms[row, clips, seed] = ablation_tables.read_arm(folder)
    return arms


# Numbers


def test_rows_and_differences_by_hand(tmp_path):
    losses = {("sti", 300, 0): [9, 6, 5, 6], ("sti", 300, 1): [9, 6, 5, 8]}
    losses |= {("ddu", 300, 0): [9, 8, 6, 4], ("ddu", 300, 1): [9, 8, 6, 5], ("ddu", "all", 0): [9, 8, 6, 1]}
    result = ablation_tables.summarize(read(tmp_path, losses), [("ddu", "sti")])
    row = result["rows"]["sti, 300"]
    assert row["loss"] == dict(mean=7.0, se=pytest.approx(1.0), seeds=2)
    assert row["lowest loss"]["mean"] == 5.0 and row["loss at 1/4"]["mean"] == 9.0
    assert result["rows"]["ddu, all"]["loss"] == dict(mean=1.0, se=None, seeds=1)
    difference = result["pairs"]["ddu - sti, 300"]["loss"]  # -2 and -3
    assert (difference["mean"], difference["se"]) == (-2.5, pytest.approx(0.5))
    assert difference["could be seen"] == pytest.approx(12.706 * 0.5, rel=1e-4)
    assert "ddu - sti, all" not in result["pairs"]  # there is no sti on all clips


def test_a_difference_has_its_error_over_clips(tmp_path):
    arms = read(tmp_path, {(row, 300, seed): [4, 3] for row in ("sti", "ddu") for seed in (0, 1)})
    for (row, _, seed), this in arms.items():
        this["losses"] = {"image": {"by clip": [3 + seed, 4 + seed + (row == "ddu")]}}  # apart by 0 and 1
    pairs = ablation_tables.summarize(arms, [("ddu", "sti")])["pairs"]
    assert pairs["ddu - sti, 300"]["loss"]["se over clips"] == pytest.approx(0.5)


def test_jumps_are_no_part_of_the_course():
    rng, steps = np.random.default_rng(0), np.arange(4000)
    assert ablation_tables.jumps(np.exp(-steps / 400)) < 1e-6
    noisy = np.exp(-steps / 400 + 0.03 * rng.standard_normal(4000))
    assert ablation_tables.jumps(noisy) == pytest.approx(0.03, rel=0.1)


def test_the_measured_order_is_that_of_the_losses(tmp_path):
    read(tmp_path, {("ddu", "all", 0): [1, 1, 1, 1]})
    order = ablate.measured_order([tmp_path / "ddu-all-0"])
    assert order.shape == (3, 6) and order.flatten().tolist() == pytest.approx(np.linspace(0, 1, 18).tolist())


def test_a_table_has_the_scores_of_the_gaussian_beside_those_of_its_networks(tmp_path):
    losses = {("ddu", 300, 0): [4, 3], ("sti-prior", 300, 0): [4, 2], ("ddu-prior", 300, 0): [4, 1]}
    read(tmp_path, losses)
    for name in ("sti-prior", "ddu-prior"):
        path = tmp_path / f"{name}-300-0" / "arm.json"
        result = json.loads(path.read_text())
        result["gaussian"] = {"image": dict(mean=2.5, balanced=3.0)}
        result["gaussian hidden"] = {"image": dict(mean=2.5, balanced=4.0)}
        result["scores"]["image"]["Gaussian"] = dict(frechet=7.0, psnr=11.0)
        path.write_text(json.dumps(result))
    arms = {key: ablation_tables.read_arm(tmp_path / "{}-{}-{}".format(*key)) for key in losses}
    ablation_tables.write_tables(3, arms, ablate.parse_args(["--table", "3", "--output_dir", str(tmp_path)]))
    text = (tmp_path / "table3.md").read_text()
    assert "image, Gaussian: Frechet 7.00, 11.00 dB" in text
    with_it, without = ablation_tables.NAMES["sti-prior"], ablation_tables.NAMES["ddu"]
    assert f"| {with_it} | 1 | 2.0000 | 2.0000 | 2.5000 |" in text
    assert f"| {without} | 1 | 3.0000 | 3.0000 | - |" in text
    shown = arms["sti-prior", 300, 0]["numbers"]["the same, Gaussian: image"]
    assert shown == 0.75  # by the weights of its training, 3 / 4


@pytest.mark.parametrize("signs, share", [((1, 1), 1.0), ((1, -1), 0.0), ((3, 1), 0.8)])
def test_what_the_feedback_of_all_seeds_has_in_common(signs, share):
    looks = np.array([0, 0.1, -0.2])
    arms = {}
    for seed, sign in enumerate(signs):
        log = [dict(aim=0.5 + sign * x, set_point=0.5) for x in looks]
        arms["dcl", "all", seed] = dict(log=log)
    assert ablation_tables.common_share(arms) == pytest.approx(share)
    assert ablation_tables.common_share({("dcl", "all", 0): arms["dcl", "all", 0]}) is None


def test_given_frames_are_hidden_and_nothing_else():
    calls = []
    given = torch.tensor([[True, False]])
    arm.blind(lambda *inputs: calls.append(inputs))("noisy", "latents", given, "timestep", "text", "valid")
    ((noisy, latents, shown, *rest),) = calls
    assert (noisy, latents, rest) == ("noisy", "latents", ["timestep", "text", "valid"])
    assert shown.shape == given.shape and not shown.any() and given.any()


# Courses


def test_the_controls_of_the_curriculum():
    linear = courses.course_of("linear", 50)
    constant, backwards = courses.make_course("linear", 50, average=True), courses.make_course("reversed", 50)
    np.testing.assert_allclose(constant[7], linear.mean(axis=0))
    np.testing.assert_allclose(backwards[0], linear[-1])
    for course in (linear, constant, backwards):  # equal shares of all levels, in another order
        np.testing.assert_allclose(course.sum(axis=(1, 2)), 1)
        np.testing.assert_allclose(course.mean(axis=0), linear.mean(axis=0))


def test_the_course_of_the_set_point_is_dcl_whose_loss_is_as_usual():
    this, course = Curriculum("dcl", 60), courses.make_course("set_point", 60)
    for step, drawn in enumerate(course):
        np.testing.assert_allclose(drawn, this.probabilities(step))
        this.update(np.ones(curriculum.NUM_RANGES), np.ones(curriculum.NUM_RANGES))
    assert not np.allclose(course[0], course[-1])


def test_a_yoked_course_is_what_the_other_run_drew(tmp_path):
    this, aims, drawn = Curriculum("dcl", 60), [], []
    rng = np.random.default_rng(0)
    for step in range(60):
        drawn.append(this.probabilities(step))
        aims.append(this.terms(step)["aim"])
        this.update(rng.uniform(0.5, 1.5, curriculum.NUM_RANGES), np.ones(curriculum.NUM_RANGES))
    (tmp_path / "arm.json").write_text(json.dumps(dict(aims=aims)))
    course = courses.make_course(tmp_path, 60)
    assert (course == np.stack(drawn)).all()
    always = courses.make_course(tmp_path, 60, average=True)
    np.testing.assert_allclose(always[3], course.mean(axis=0))
    assert not np.allclose(course, always)
    follower = courses.Course(course)
    follower.update(
        np.full(curriculum.NUM_RANGES, 1e6), np.ones(curriculum.NUM_RANGES)
    )  # whatever its own loss
    assert (follower.probabilities(33) == drawn[33]).all()
    with pytest.raises(UserError, match="has 60 steps, not 61"):
        courses.make_course(tmp_path, 61)
    with pytest.raises(UserError, match="elsewhere has no arm.json"):
        courses.make_course(tmp_path / "elsewhere", 60)


# Runs


@pytest.fixture
def called(monkeypatch):
    """A stand-in for lab.arm: the words of its calls, and what it leaves behind."""
    calls = []

    def run(words, log, quiet, threads):
        calls.append(words)
        folder = Path(words[words.index("--output_dir") + 1])
        write_arm(folder, [4, 3, 2, 1], "off" not in words, cells="--ddu" not in words)

    monkeypatch.setattr(ablate, "run", run)
    for name, runs in (("plot_table3", 32), ("plot_table4", 27)):  # only of all runs, for the sake of time
        plot = getattr(ablation_tables, name)
        monkeypatch.setattr(
            ablation_tables,
            name,
            lambda arms, plot=plot, runs=runs: plot(arms) if len(arms) == runs else None,
        )
    return calls


def call(*words):
    ablate.ablate(ablate.parse_args(list(map(str, words))))


def test_finished_runs_are_not_repeated_and_settings_stay(tmp_path, called):
    words = [
        "--table",
        3,
        "--output_dir",
        tmp_path,
        "--rows",
        "conv3d",
        "ddu",
        "--seeds",
        0,
        1,
        "--clips",
        100,
    ]
    for _ in range(2):
        call(*words)
        assert len(called) == 4
    assert sum("conv3d" in words for words in called) == 2
    assert all("latest" in words and "--no-prior" in words and "100" in words for words in called)
    with pytest.raises(UserError, match="--max_train_steps is 7"):
        call(*words, "--max_train_steps", 7)


def test_a_table_shows_from_its_start_on_what_is_finished(tmp_path, called, monkeypatch):
    write_arm(tmp_path / "dcl-100-1", [4, 3, 2, 1])
    write_arm(tmp_path / "dcl-100-7", [4, 3, 2, 1])
    tables = []
    monkeypatch.setattr(ablate, "write_tables", lambda table, arms, args: tables.append(set(arms)))
    write_arm(tmp_path / "sti-100-0", [4, 3, 2, 1])  # a row that is not asked for
    call("--table", 3, "--output_dir", tmp_path, "--rows", "dcl", "--clips", 100, "--jobs", 1)
    finished = {
        ("sti", 100, 0),
        ("dcl", 100, 1),
        ("dcl", 100, 7),
    }  # 7 is none of the seeds that are asked for
    made = {("dcl", 100, 0)}, {("dcl", 100, 0), ("dcl", 100, 2)}
    assert tables == [finished, *(finished | more for more in made)]
    assert len(called) == 2


def test_what_table_3_leaves(tmp_path, called):
    call("--table", 3, "--output_dir", tmp_path, "--seeds", 0, 1, "--clips", 100, "all")
    page = (tmp_path / "table3.md").read_text()
    assert "| 100 | DFGN w/ DDU, no curriculum | 2 | 1.0000 ± 0.0000 |" in page and "cross-fade" in page
    rows = json.loads((tmp_path / "table3.json").read_text())["rows"]
    every = {f"{row}, {clips}" for row in ablate.TABLES[3] for clips in (100, "all")}
    assert set(rows) == every - {f"{row}, all" for row in ablate.AT_ONE_COUNT}
    assert Image.open(tmp_path / "table3.png").format == "PNG"
    assert not list(tmp_path.glob(".*"))


def test_what_table_4_leaves(tmp_path, called):
    tmp_path = tmp_path / "my runs"
    call("--table", 4, "--output_dir", tmp_path, "--seeds", 0, 1, 2, "--jobs", 1)
    last = [
        words for words in called if "--course" in words and "dcl-all" in words[words.index("--course") + 1]
    ]
    assert (
        len(last) == 3 and called[-9:-3].count(last[0]) == 1
    )  # the yoked ones wait for those that they follow
    assert last[0][last[0].index("--course") + 1].endswith("dcl-all-1")
    averages = [words for words in called if "--average" in words and "--order" in words]
    assert averages == called[-3:]  # after the measured ones, whose course they take the average of
    assert averages[2][averages[2].index("--course") + 1].endswith("measured-all-2")
    assert np.ptp(json.loads((tmp_path / "order-all.json").read_text())) == 1
    page = (tmp_path / "table4.md").read_text()
    assert "| all | DCL, yoked: the course of another seed | 3 |" in page and "| generation |" in page
    assert Image.open(tmp_path / "table4.png").format == "PNG"


def test_a_failed_run_is_named_and_the_others_are_made(tmp_path, called, monkeypatch):
    run = ablate.run

    def fails(words, *more):
        if "conv3d" in words:
            raise RuntimeError("lab.arm for conv3d-100-0 ended with status 1")
        run(words, *more)

    monkeypatch.setattr(ablate, "run", fails)
    with pytest.raises(UserError, match="1 of 2 runs failed, the first: lab.arm for conv3d-100-0"):
        call("--table", 3, "--output_dir", tmp_path, "--rows", "conv3d", "dcl", "--seeds", 0, "--clips", 100)
    assert (tmp_path / "dcl-100-0" / "arm.json").is_file()


def test_a_yoked_row_needs_two_seeds(tmp_path):
    with pytest.raises(UserError, match="at least two --seeds"):
        call("--table", 4, "--output_dir", tmp_path, "--seeds", 0)


# An arm


@pytest.mark.parametrize("content", ["[[0, 1]]", "[1", "[[2,2,2,2,2,2],[0,0,0,0,0,0],[0,0,0,0,0,0]]", '"x"'])
def test_an_order_that_is_none_gets_one_sentence(tmp_path, content):
    path, before = tmp_path / "order.json", curriculum.DIFFICULTY
    path.write_text(content)
    with pytest.raises(UserError, match="order.json is no file of difficulties"):
        courses.set_order(path)
    with pytest.raises(UserError, match="absent.json is no file"):
        courses.set_order(tmp_path / "absent.json")
    assert curriculum.DIFFICULTY is before


def test_an_arm_trains_looks_and_measures(tmp_path, folder, cache, monkeypatch, capsys):
    """The real program at toy size, with a control in the place of the curriculum."""
    monkeypatch.setattr("support.stickers.default_folder", lambda **_: folder)
    monkeypatch.setattr("support.stickers.draw_stickers", lambda _: folder)
    monkeypatch.setattr("lab.eight_frames.COUNT", 4)
    monkeypatch.setattr(arm, "G1_DRAWS", 6)
    monkeypatch.setattr(arm, "CELL_DRAWS", 10)
    monkeypatch.setattr("train.plot_progress", None)  # which it replaces: put back after this test
    monkeypatch.setattr(arm, "NUM_CLIPS", 3)
    monkeypatch.setattr(arm, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(arm, "REAL_CLIPS", 4)
    out = tmp_path / "arm"
    words = [
        "--course",
        "reversed",
        "--curriculum",
        "none",
        "--preset",
        "toy",
        "--resolution",
        "16",
        "--output_dir",
        str(out),
    ]
    words += ["--max_train_steps", "6", "--validation_steps", "2", "--no-prior", "--mixed_precision", "no"]
    words += ["--num_workers", "0", "--resume_from_checkpoint", "latest", "--cache_dir", str(cache)]
    monkeypatch.setattr(sys, "argv", ["lab.arm", *words])
    arm.main()
    found = ablation_tables.read_arm(out)
    assert [entry["step"] for entry in found["log"] if "probe" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in found["log"] if "G1" in entry] == [6]  # every fourth time, and last
    log = read_log(out / "log.jsonl")
    assert len(log) == 6 and log[0]["p_interpolation"] == pytest.approx(0.2)
    assert found["log"][1]["mean_k"] == np.mean([entry["mean_k"] for entry in log[2:4]])
    assert len(found["losses"]["image"]["by clip"]) == 4
    assert found["losses"]["image"]["ranges"] == pytest.approx(log[-1]["G1_ranges"], rel=1e-6, nan_ok=True)
    shown, hidden = (found[name]["interpolation"] for name in ("losses", "hidden"))
    assert found["numbers"]["interpolation, shown / hidden"] == shown["mean"] / hidden["mean"] != 1
    assert found["aims"] == [] and "commit" in found["about"]["machine"]
    words[1] = "set_point"  # of which a checkpoint says nothing
    monkeypatch.setattr(sys, "argv", ["lab.arm", *words])
    with pytest.raises(SystemExit) as ended:
        arm.main()
    assert ended.value.code == 2 and "began with another --course" in capsys.readouterr().err
    assert set(found["cells"]) == set(LEVELS) and found["scores"].keys() >= {"image", "prediction"}
    assert sum(share for name, share in found["drawn"].items() if name in LEVELS) == pytest.approx(1)
