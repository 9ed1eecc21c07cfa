"""Nothing is lost: numbers that are none, requests to stop, folders that are taken, a full disk."""

import errno
import os
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
from PIL import Image

import data
import sample
import train
from model import SIZES, make_scheduler
from support import cache, checkpoint, log, setup
from support.common import default_cache
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


@pytest.mark.parametrize("mixed_precision", [pytest.param("no", marks=pytest.mark.slow), "fp16"])
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves(run, ask_to_stop, capsys, tmp_path, name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        ask_to_stop(2, run, number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert "after step 2, as asked" in capsys.readouterr().out
    ((step, newest),) = checkpoint.list_checkpoints(tmp_path / "a")
    assert step == 2 and checkpoint.find_damage(newest) is None


def test_under_nohup_a_closed_terminal_stops_nothing(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_each_loss(monkeypatch.setattr, lambda call: signal.raise_signal(signal.SIGHUP) or 1.0)
        assert checkpoint.list_checkpoints(run(max_train_steps=2))[-1][0] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize("local_rank, waits, name", [("0", 0, "train.py: "), ("1", 5, "train.py, rank 9: ")])
def test_the_first_process_of_a_machine_speaks_at_once(run, capsys, monkeypatch, local_rank, waits, name):
    """torchrun then ends the others, which wait: of an error of all of them one is read, and what one of them
    alone met is read, too."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run(learning_rate="inf")
    assert capsys.readouterr().err.startswith(f"{name}argument --learning_rate: inf must")
    assert sum(waited) == waits


def test_a_process_that_lost_another_one_says_so(run, refused, monkeypatch):
    def lost(*args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(train, "train", lost)
    refused("another process of this run has ended", run)


def test_the_prior_of_a_set_up_that_was_interrupted_is_not_used(tmp_path):
    """A start with --preset full takes the folder over: its network is not preconditioned."""
    GaussianPrior(4, 2, 8).save_pretrained(tmp_path / "prior")
    args = Namespace(vae=None, clip=None, t5=None, resolution=64, init_from=None)
    args.output_dir, args.mixed_precision = tmp_path, "no"
    levels = len(SIZES["full"]["block_out_channels"])
    assert setup.load_frozen_parts(args, train.World(), None, levels).prior is None


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


# Machines


def test_on_a_disk_without_locks_a_run_goes_on(run, monkeypatch, tmp_path):
    codes = iter([errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP] * 10)

    def fail(file, operation):
        raise OSError(next(codes), "no locks")

    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr("fcntl.lockf", fail)
    run(cache_dir=tmp_path / "cache", max_train_steps=1)


def test_without_locks_what_another_process_writes_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("support.cache.locked", lambda path, wait: nullcontext(None))
    encode = lambda items: (reason for reason in ["it is bad"])  # noqa: E731
    cache.fill(tmp_path, dict(a=1), encode)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.unlink()
    (tmp_path / f".{shard.name}.7.tmp").touch()
    cache.fill(tmp_path, dict(a=1), encode)
    assert shard.exists() and (tmp_path / f".{shard.name}.7.tmp").exists()


def test_a_cache_that_holds_all_may_be_read_only(folder, monkeypatch, tmp_path):
    found, _ = scan_folder(folder)
    first = cache.digest_files(folder, found, tmp_path)
    (found[0].path).touch()  # it is read again, and that cannot be noted
    monkeypatch.setattr("support.common.os.replace", no_room)
    assert cache.digest_files(folder, found, tmp_path) == first


@pytest.fixture
def no_home(monkeypatch):
    """A user without a home, as a container may have."""

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", fail)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_without_a_home_all_works_that_needs_no_cache(no_home, folder, run, refused, tmp_path, capsys):
    for program in (train, data, sample):
        with pytest.raises(SystemExit) as stop:
            runs.run_here(program.main, "--help")
        assert not stop.value.code
    runs.run_here(data.main, folder, "--num_workers", 0)
    assert "24 stickers used" in capsys.readouterr().out
    refused("set XDG_CACHE_HOME, or give --cache_dir", run, cache_dir=None)
    run(max_train_steps=1)


def test_without_a_home_the_cache_variable_will_do(no_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(default_cache()) == "/somewhere/rdtf"


@pytest.mark.parametrize("missing", ["fcntl", "resource"])
def test_on_windows_one_sentence_says_what_is_needed(missing):
    code = f"import sys; sys.modules['{missing}'] = None; import support.common"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Linux or macOS" in result.stderr


@pytest.mark.parametrize("where", ["| head -c 1 > /dev/null", "> /dev/full", ">&-", "2>&- >&-"])
def test_a_program_outlives_whoever_reads_what_it_prints(tmp_path, where):
    lines = "from support.common import one_sentence", "with one_sentence('x'):"
    lines += "    for i in range(20000): print('\u0436', i)", f"    open(r'{tmp_path}/done', 'w')"
    (tmp_path / "program.py").write_text("\n".join(lines), encoding="utf-8")
    command = f"{sys.executable} {tmp_path}/program.py {where}; exit ${{PIPESTATUS[0]}}"
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii", PYTHONPATH=str(runs.ROOT))
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and not result.stderr and (tmp_path / "done").exists()


def test_letters_that_the_locale_lacks_do_not_cost_the_model(tmp_path):
    """Under an ASCII locale they stand in a path as surrogates, and so in the model card."""
    unet, encoders = toy_model()
    training, card = Namespace(unet=unet, average=None, step=3), "котик"
    surrogates = card.encode().decode("ascii", errors="surrogateescape")
    checkpoint.write_finished(tmp_path, training, (encoders, make_scheduler(), SETTINGS), surrogates)
    assert (tmp_path / "README.md").read_bytes().decode() == card


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_sentence(run, refused, monkeypatch, error):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(train, "build_network", fail)
    refused("memory does not suffice", run)
