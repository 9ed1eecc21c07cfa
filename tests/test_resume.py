"""A checkpoint is all that a step changes: a run that goes on from one is the unbroken run, bit for bit."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from support import checkpoint as checkpoints
from support.optim import Average
from tests.runs import same, same_end, start, state
from tests.stress import matrix

# What is saved and loaded


def contents(training):
    """Every field of a Training as numbers, dicts and tensors."""
    found = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
    for name, value in found.items():
        if isinstance(value, Average):
            found[name] = dict(weights=value.ema.shadow_params, step=value.ema.optimization_step)
        elif hasattr(value, "state_dict"):
            found[name] = value.state_dict()
    return found


@pytest.fixture
def saved(run, monkeypatch, tmp_path):
    """(Run, Training at its end, checkpoint of it)."""
    kept, real = [], train.train
    monkeypatch.setattr(train, "train", lambda *about: (kept.append(about[:2]), real(*about)))
    run(mixed_precision="fp16", max_train_steps=3)
    ((fixed, training),) = kept
    training.skipped, training.bad_in_row = 5, 2
    training.scaler.update(123.0)
    checkpoints.save_checkpoint(tmp_path / "again", training, fixed.parts, fixed.about, limit=None)
    return fixed, training, tmp_path / "again" / "checkpoint-3"


def test_every_field_of_a_training_is_saved_and_loaded(saved):
    fixed, training, path = saved
    fixed.args.seed += 1
    unet = train.build_network(fixed.args, fixed.world, fixed.encoders, fresh=True)
    fresh = train.begin_training(fixed.args, fixed.world, unet)
    before = contents(fresh)
    differing = {name for name, value in contents(training).items() if not same(value, before[name])}
    assert differing == before.keys()
    checkpoints.load_checkpoint(path, fresh)
    differing = {name for name, value in contents(training).items() if not same(value, contents(fresh)[name])}
    assert not differing


def test_a_checkpoint_holds_nothing_else_of_the_loop(trained):
    fields = {field.name for field in dataclasses.fields(train.Training)}
    tensors = torch.load(trained / "checkpoint-6" / "optimizer.pt", weights_only=True)
    in_folders = {"unet", "average"}  # unet/, and unet_ema/ with the step of the averages
    of_the_run = {"schedule", "latents", "data", "init_from", "init_unet"}
    assert {*tensors, *state(trained, 6)} == fields - in_folders | {"ema_step"} | of_the_run
    assert not tensors.keys() & state(trained, 6).keys()


def test_moments_may_come_in_another_memory_layout(copied, trained, run):
    """As those of sharded ranks do: contiguous."""
    path = copied / "checkpoint-3"
    tensors = torch.load(path / "optimizer.pt", weights_only=True)
    for moments in tensors["optimizer"]["state"].values():
        moments.update({name: moment.contiguous() for name, moment in moments.items()})
    torch.save(tensors, path / "optimizer.pt")
    (path / "files.json").write_text(json.dumps(checkpoints.digests(path)))
    shutil.rmtree(copied / "checkpoint-6")
    assert same_end(trained, run("a", resume_from_checkpoint="latest"))


# The whole matrix is a program, tests/stress/matrix.py


@pytest.fixture(scope="module")
def matrix_places(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    return root, matrix.draw_folder(root), {}


def cases(size):
    *others, last = matrix.few_cases(size)
    chosen = [*(pytest.param(case, marks=pytest.mark.slow) for case in others), last]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: "-".join(map(str, case.values())))


@cases(1)
def test_a_resumed_run_is_the_unbroken_one(no_pictures, matrix_places, case):
    """A selection in which every value is met."""
    assert matrix.differences(case, *matrix_places) == []


@pytest.mark.slow
@cases(2)
def test_pairs_of_values_make_no_difference(no_pictures, matrix_places, case):
    assert matrix.differences(case, *matrix_places) == []


@pytest.mark.slow
def test_a_difference_would_be_seen(no_pictures, matrix_places, monkeypatch):
    real = checkpoints.load_checkpoint

    def forgetful(path, training):
        saved = real(path, training)
        training.optimizer.state.clear()  # AdamW starts afresh
        return saved

    monkeypatch.setattr(checkpoints, "load_checkpoint", forgetful)
    assert "optimizer" in matrix.differences(matrix.few_cases(1)[0], *matrix_places)


@pytest.mark.slow
def test_killed_inside_a_save_it_ends_as_if_it_had_not_been(folder, cache, trained, run, tmp_path):
    """The second save kills the process halfway through a file; the search over all writing, renaming and
    removing calls is tests/stress/kill.py."""
    out = tmp_path / "a"
    process = start(out, env=dict(TOY_KILL="3:checkpoint-6"), data=folder, cache_dir=cache)
    assert process.wait(timeout=200) == -signal.SIGKILL
    ((step, path),) = checkpoints.list_checkpoints(out)
    assert (
        step == 3 and checkpoints.find_damage(path) is None and (out / "checkpoint-6.tmp" / "unet").exists()
    )
    run("a", resume_from_checkpoint="latest")
    assert same_end(trained, out) and not list(out.glob("*.tmp"))


# Damaged checkpoints


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "optimizer.pt", "state.json"])
def test_damage_is_found(checkpoint, damage, name):
    assert checkpoints.find_damage(checkpoint) is None
    damage(checkpoint / name)
    assert checkpoints.find_damage(checkpoint).startswith(name)


@pytest.mark.parametrize("content", ["[]", "{}", "", "{"])
def test_sums_that_are_none_are_damage(checkpoint, content):
    (checkpoint / "files.json").write_text(content)
    assert checkpoints.find_damage(checkpoint).startswith("files.json")


def test_a_file_that_cannot_be_read_is_named(checkpoint, monkeypatch):
    def failing(file, name):
        raise OSError(5, "Input/output error", str(checkpoint / "optimizer.pt"))

    monkeypatch.setattr(checkpoints.hashlib, "file_digest", failing)
    assert checkpoints.find_damage(checkpoint) == "optimizer.pt cannot be read: Input/output error"


@pytest.fixture
def copied(trained, tmp_path):
    """tmp_path/a, an interrupted run with the checkpoints of the trained one."""
    for step in (3, 6):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "a" / f"checkpoint-{step}")
    shutil.copy(trained / "log.jsonl", tmp_path / "a")
    return tmp_path / "a"


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(copied, trained, run, capsys):
    (copied / "checkpoint-9.tmp").mkdir()  # what a kill leaves
    truncate(copied / "checkpoint-6" / "optimizer.pt")
    run("a", resume_from_checkpoint="latest")
    printed = capsys.readouterr().out
    assert "checkpoint-6 is damaged (optimizer.pt is not what was saved)" in printed
    assert "checkpoint-3 at step 3" in printed
    assert same_end(trained, copied) and not list(copied.glob("*.tmp"))
    assert checkpoints.find_damage(copied / "checkpoint-6") is None


def test_a_damaged_checkpoint_that_is_named_is_refused(copied, run, refused):
    truncate(copied / "checkpoint-6" / "optimizer.pt")
    refused("optimizer.pt is not what was saved", run, resume_from_checkpoint=copied / "checkpoint-6")


def test_damaged_checkpoints_alone_are_refused(copied, run, refused):
    for step in (3, 6):
        flip(copied / f"checkpoint-{step}" / "state.json")
    refused("all its checkpoints are damaged", run, resume_from_checkpoint="latest")


def test_a_checkpoint_of_another_folder_does_not_mix_with_those_here(copied, trained, run, refused):
    refused("is of another run", run, resume_from_checkpoint=trained / "checkpoint-3")
    for path in copied.glob("checkpoint-*"):
        shutil.rmtree(path)
    refused("is of another run", run, resume_from_checkpoint=trained / "checkpoint-3")  # its log is here


def test_a_pickle_is_refused(copied, run, refused):
    path = copied / "checkpoint-6"
    torch.save(dict(optimizer=Path("/")), path / "optimizer.pt")  # an object, not a tensor
    (path / "files.json").write_text(json.dumps(checkpoints.digests(path)))
    refused("optimizer.pt", run, resume_from_checkpoint="latest")


@pytest.mark.parametrize("limit, left", [(1, [4, 6]), pytest.param(2, [3, 4, 6], marks=pytest.mark.slow)])
def test_what_was_just_saved_is_never_the_one_that_goes(copied, trained, run, ask_to_stop, limit, left):
    """Among damaged checkpoints with higher numbers, which the run that went on from an older one meets
    again."""
    flip(copied / "checkpoint-6" / "optimizer.pt")
    again = dict(resume_from_checkpoint="latest", checkpoints_total_limit=limit)
    ask_to_stop(1, lambda: run("a", **again))
    assert [step for step, _ in checkpoints.list_checkpoints(copied)] == left
    run("a", **again)
    assert same_end(trained, copied)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_fault(trained, run, tmp_path):
    elsewhere = shutil.copytree(trained / "checkpoint-3", tmp_path / "elsewhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint-3").symlink_to(elsewhere)
    out = run("a", resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert [step for step, _ in checkpoints.list_checkpoints(out)] == [6] and elsewhere.exists()


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    for name in ("checkpoint-3.tmp", "checkpoint-3.old.tmp", "finished.tmp", "mine.tmp", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.tmp").touch()
    for name in (".log.jsonl.12199.tmp", ".notes.tmp"):  # of common.replacing, and of somebody else
        (tmp_path / name).touch()
    checkpoints.remove_leftovers(tmp_path)
    left = {"mine.tmp", "notes.tmp", ".notes.tmp", "checkpoint-3"}
    assert {path.name for path in tmp_path.iterdir()} == left


# What changed meanwhile


@pytest.mark.parametrize("end", ['{"step": 3, "lo', "\n\n", "[]\n", "\xff\0"])
def test_a_log_that_was_cut_short_is_kept_as_far_as_it_goes(tmp_path, end):
    path, whole = tmp_path / "log.jsonl", '{"step": 2, "loss": 0.5}\n'
    path.write_text(whole + end)
    train.log.begin_log(path, last_step=3)
    assert path.read_text() == whole


def test_what_is_logged_after_a_cut_line_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    train.log.append_log(path, dict(step=1))
    path.write_text(path.read_text() + '{"step": 2, "lo')  # a full disk
    for step in (3, 4):
        train.log.append_log(path, dict(step=step))
    assert [entry["step"] for entry in train.log.read_log(path)] == [1, 3, 4]


def rewrite_state(path, change):
    """Applies change(state) to the state.json of a checkpoint, which stays whole."""
    saved = json.loads((path / "state.json").read_text())
    change(saved)
    (path / "state.json").write_text(json.dumps(saved))
    (path / "files.json").write_text(json.dumps(checkpoints.digests(path)))


def test_a_resumed_run_finds_its_stickers_itself(copied, trained, run):
    assert same_end(trained, run("a", data=None, resume_from_checkpoint="latest"))


def test_stickers_that_have_gone_are_asked_for(copied, run, refused, tmp_path):
    rewrite_state(copied / "checkpoint-6", lambda state: state.update(data=str(tmp_path / "gone")))
    refused("gone is not a folder: give --data", run, data=None, resume_from_checkpoint="latest")


def test_a_checkpoint_that_does_not_name_its_stickers_takes_no_others(
    copied, run, refused, monkeypatch, fewer
):
    """One of an older version, resumed without --data."""
    rewrite_state(copied / "checkpoint-6", lambda state: state.pop("data"))
    monkeypatch.setattr("support.stickers.default_folder", lambda root: fewer)
    monkeypatch.setattr("support.stickers.draw_stickers", lambda folder: None)
    refused("name them with --data", run, data=None, resume_from_checkpoint="latest")


OTHER_FLAGS = dict(seed=5, temporal="conv3d", ddu="off", use_ema=False, prior=False, max_train_samples=5)


@pytest.mark.parametrize("flag, value", OTHER_FLAGS.items())
def test_other_flags_of_the_run_that_are_left_out_are_asked_for(copied, run, refused, flag, value):
    rewrite_state(copied / "checkpoint-6", lambda state: state["schedule"].update({flag: value}))
    refused(f"was trained with {value}: a resumed run keeps", run, resume_from_checkpoint="latest")


@pytest.fixture
def fewer(folder, tmp_path):
    """A folder of other stickers than those of the trained run."""
    (tmp_path / "fewer").mkdir()
    for path in sorted(folder.glob("*.gif"))[:12]:
        shutil.copy(path, tmp_path / "fewer")
    return tmp_path / "fewer"


def test_other_stickers_are_said(copied, run, fewer, capsys):
    run("a", resume_from_checkpoint=copied / "checkpoint-6", data=fewer)
    assert "the stickers have changed since" in capsys.readouterr().out
