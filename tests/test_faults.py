"""Nothing is lost: numbers that are none, requests to stop, folders that are taken, a full disk."""

import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
from PIL import Image

import data
import sample
import train
from model import SIZES, make_scheduler
from support import checkpoint, log, setup
from support.folder import scan_folder
from support.prior import GaussianPrior
from tests import runs
from tests.checkpoints import SETTINGS, toy_model
from tests.runs import same, same_end, state, weights
from tests.stress.toy_train import at_each_loss, in_a_path

# Numbers that are none


def poison(monkeypatch, bad):
    """Makes the loss no number at the calls for which `bad(call)`."""
    at_each_loss(monkeypatch.setattr, lambda call: float("nan") if bad(call) else 1.0)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_a_step_whose_loss_is_no_number_changes_nothing(run, ask_to_stop, monkeypatch, mixed_precision):
    again = dict(max_train_steps=4, checkpointing_steps=1, resume_from_checkpoint="latest")
    again |= dict(mixed_precision=mixed_precision, validation_steps=0)
    with monkeypatch.context() as patch:
        poison(patch, lambda call: call == 3)
        ask_to_stop(3, lambda: run("a", **again))  # asked to stop it saves even then
    out = run("a", **again)
    saved = [out / f"checkpoint-{step}" for step in (2, 3, 4)]
    for part in ("unet", "unet_ema"):
        two, three, four = (weights(path, part) for path in saved)
        assert same(two, three) and not same(three, four)
    assert state(out, 2)["curriculum"] == state(out, 3)["curriculum"]
    assert state(out, 4)["skipped"] == 1 and runs.log(out)[-1]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_too_many_of_them_stop_the_run(run, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    poison(monkeypatch, lambda call: call in (1, 2) or call > 4)
    flags = dict(max_train_steps=9, checkpointing_steps=2, checkpoints_total_limit=1, validation_steps=0)
    sentence = refused("checkpoint-4", run, **flags)
    assert "gave a loss or gradients that are not finite" in sentence
    ((step, kept),) = checkpoint.list_checkpoints(tmp_path / "a")  # what was saved before the bad steps
    assert step == 4 and all(tensor.isfinite().all() for tensor in weights(kept).values())


def test_a_resumed_run_goes_on_counting_them(run, refused, ask_to_stop, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    poison(monkeypatch, lambda call: True)
    ask_to_stop(2, run)
    assert state(tmp_path / "a", 2)["bad_in_row"] == 2
    refused("up to step 3", run, resume_from_checkpoint="latest")


def test_a_large_loss_is_no_fault(run, monkeypatch):
    at_each_loss(monkeypatch.setattr, lambda call: 1e6 if call == 3 else 1.0)
    assert state(run(max_train_steps=4), 4)["skipped"] == 0


# Requests to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves(run, ask_to_stop, capsys, tmp_path, number):
    handler = signal.getsignal(number)
    ask_to_stop(2, run, number)
    assert signal.getsignal(number) is handler
    assert "after step 2, as asked" in capsys.readouterr().out
    ((step, newest),) = checkpoint.list_checkpoints(tmp_path / "a")
    assert step == 2 and checkpoint.find_damage(newest) is None


def test_after_a_request_to_stop_it_goes_on_as_if_nothing_had_been(trained, run, ask_to_stop):
    ask_to_stop(2, run)
    assert same_end(trained, run("a", resume_from_checkpoint="latest"))


def test_a_second_ctrl_c_ends_it_at_once(run, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "_exit", sys.exit)  # which the tests survive
    twice = lambda call: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT)
    at_each_loss(monkeypatch.setattr, twice)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 130 and not checkpoint.list_checkpoints(tmp_path / "a")


def test_asked_to_stop_it_saves_before_it_draws(run, ask_to_stop, monkeypatch, tmp_path):
    saved, sheet = [], train.validation_sheet

    def look(*about):
        saved.extend(step for step, _ in checkpoint.list_checkpoints(tmp_path / "a"))
        return sheet(*about)

    monkeypatch.setattr(train, "validation_sheet", look)
    ask_to_stop(2, lambda: run(validation_steps=2))
    assert saved == [2]


# The output folder


def test_two_runs_do_not_share_a_folder(run, refused, tmp_path):
    (tmp_path / "a").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / "a" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused("is in use by a run that has not ended", run)
        other.kill()
    run(max_train_steps=1)


@pytest.mark.parametrize("name", ["README.md", "model_index.json"])
@pytest.mark.parametrize("how", [{}, dict(resume_from_checkpoint="latest")], ids=["fresh", "latest"])
def test_a_finished_model_is_not_overwritten(run, refused, tmp_path, name, how):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("{}")
    refused(name, run, **how)
    assert (tmp_path / "a" / name).read_text() == "{}"


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir"])
def test_places_that_cannot_be_used_get_one_sentence(run, refused, tmp_path, flag):
    (tmp_path / "file").touch()
    refused("file cannot be used", run, **{flag: tmp_path / "file"})


@pytest.mark.parametrize("local_rank, says", [("0", True), ("1", False)])
def test_an_error_is_said_once_on_each_machine(run, capsys, monkeypatch, local_rank, says):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run(learning_rate="inf")
    assert ("--learning_rate: inf must" in capsys.readouterr().err) == says


def test_a_set_up_that_was_interrupted_leaves_no_prior_behind(folder, tmp_path):
    """A start with --preset full takes the folder over: its network is not preconditioned."""
    GaussianPrior(4, 2, 8).save_pretrained(tmp_path / "prior")
    args = Namespace(vae=None, clip=None, t5=None, codec=(8, 32), resolution=64, num_workers=0)
    args.output_dir, args.mixed_precision = tmp_path, "no"
    found, _ = scan_folder(folder)
    levels = len(SIZES["full"]["block_out_channels"])
    encoders = setup.load_frozen_parts(args, train.World(), found, None, levels, data.fit_codec)
    assert encoders.prior is None and not (tmp_path / "prior").exists()


def test_a_finished_model_holds_no_part_of_another_run(tmp_path):
    """A checkpoint of elsewhere may go on in a folder where an interrupted set-up left its parts."""
    GaussianPrior(4, 2, 8).save_pretrained(tmp_path / "prior")
    unet, encoders = toy_model()
    training = Namespace(unet=unet, average=None, step=3)
    checkpoint.write_finished(tmp_path, training, (encoders, make_scheduler(), SETTINGS), "a card")
    assert sample.load(tmp_path)[1].prior is None and (tmp_path / "README.md").read_text() == "a card"


# Latents, a full disk


def test_damaged_latents_are_encoded_again(run, tmp_path):
    cache, flags = tmp_path / "cache", dict(cache_dir=tmp_path / "cache", max_train_steps=1)
    whole = weights(run("a", **flags))
    files = [path for path in cache.glob("latents-*/*") if path.stat().st_size > 1000]
    assert files
    for i, path in enumerate(files):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert same(whole, weights(run(f"b{i}", **flags)))


def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_one_checkpoint(run, capsys, monkeypatch):
    """Whichever of the calls that write one it meets."""
    met = set()

    def full_at(step, module, name):
        real = getattr(module, name)

        def write(*args, **kwargs):
            if in_a_path(f"checkpoint-{step}", args):
                met.add(step)
                no_room()
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, write)

    full_at(2, checkpoint, "save_file")
    full_at(3, checkpoint.torch, "save")
    full_at(4, checkpoint.os, "rename")
    out = run(max_train_steps=5, checkpointing_steps=1)
    said = capsys.readouterr().out
    assert met == {2, 3, 4} and all(f"checkpoint-{step} could not be written" in said for step in met)
    assert [step for step, _ in checkpoint.list_checkpoints(out)] == [1, 5] and not list(out.glob("*.tmp"))


def test_a_full_disk_costs_a_picture_and_a_line_of_the_log(run, capsys, monkeypatch):
    picture = Image.new("RGB", (1, 1))
    picture.save = no_room
    monkeypatch.setattr(train, "validation_sheet", lambda *about: (picture, {}))
    monkeypatch.setattr(log, "open", no_room, raising=False)
    out = run(max_train_steps=1)
    assert capsys.readouterr().out.count("No space left on device") == 2
    assert checkpoint.find_damage(out / "checkpoint-1") is None and (out / "model_index.json").exists()


def test_asked_to_stop_with_a_full_disk_it_says_so(run, refused, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", no_room)
    at_each_loss(monkeypatch.setattr, lambda call: signal.raise_signal(signal.SIGTERM) or 1.0)
    refused("could not be saved", run)
