"""Nothing is lost: numbers that are none, requests to stop, damaged checkpoints, a full disk, a kill at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import masks
import train
from support import checkpoint
from tests.stress import matrix
from tests.test_train import (  # noqa: F401 (fixtures)
    assert_same_weights,
    cache,
    flags_of,
    folder,
    log,
    refused,
    run,
    weights,
)
from tests.toy_train import NO_PICTURES

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name, nothing in NO_PICTURES.items():
        monkeypatch.setattr(train, name, nothing)


def at_each_loss(monkeypatch, change):
    """Calls `change(call)` at every computed loss, which is multiplied by what comes back; the first call is 1."""
    real, calls = masks.masked_loss, []

    def changed(*args):
        calls.append(1)
        return real(*args) * change(len(calls))

    monkeypatch.setattr(masks, "masked_loss", changed)


def poison(monkeypatch, bad):
    """Makes the loss no number at the calls for which `bad(call)`."""
    at_each_loss(monkeypatch, lambda call: float("nan") if bad(call) else 1.0)


def state(out, step):
    return json.loads((out / f"checkpoint-{step}" / "state.json").read_text())


# ------------------------------------------------------------------------------------------------ bad numbers


@pytest.mark.parametrize("flags", [dict(), dict(mixed_precision="fp16")], ids=["fp32", "fp16"])
def test_a_step_whose_loss_is_no_number_is_skipped(run, monkeypatch, tmp_path, flags):  # noqa: F811
    flags, out = (
        dict(flags, max_train_steps=4, checkpointing_steps=1, resume_from_checkpoint="latest"),
        tmp_path / "a",
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # asked to stop it saves even then
        poison(patch, lambda call: call == 3 and not signal.raise_signal(signal.SIGTERM))
        run("a", **flags)
    run("a", **flags)
    for part in ("unet", "unet_ema"):
        before, after = (weights(out / f"checkpoint-{step}", part) for step in (2, 3))
        assert_same_weights(before, after, rtol=0, atol=0)
    assert state(out, 2)["curriculum"] == state(out, 3)["curriculum"]
    assert state(out, 4)["skipped"] == 1 and log(out)[-1]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(out / "checkpoint-3").values(), weights(out / "checkpoint-4").values())
    )


def test_too_many_of_them_stop_the_run(run, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    poison(monkeypatch, lambda call: call in (1, 2) or call > 4)
    refused(run, capsys, "checkpoint-4", max_train_steps=9, checkpointing_steps=2, checkpoints_total_limit=1)
    ((step, kept),) = checkpoint.list_checkpoints(tmp_path / "a")  # what was saved before the bad steps
    assert step == 4 and all(tensor.isfinite().all() for tensor in weights(kept).values())


def test_a_resumed_run_goes_on_counting_them(run, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    poison(monkeypatch, lambda call: (call == 2 and signal.raise_signal(signal.SIGTERM)) or True)
    with pytest.raises(SystemExit):
        run("a")
    assert state(tmp_path / "a", 2)["bad_in_row"] == 2
    refused(run, capsys, "up to step 3", resume_from_checkpoint="latest")


def test_a_large_loss_is_no_fault(run, monkeypatch):  # noqa: F811
    at_each_loss(monkeypatch, lambda call: 1e6 if call == 3 else 1.0)
    assert state(run("a", max_train_steps=4), 4)["skipped"] == 0


# ---------------------------------------------------------------------------------------------- asked to stop


def start(out, folder, cache, launcher=(sys.executable,), *switches, env=None, **more):  # noqa: F811
    """A toy run in a process of its own."""
    flags = dict(
        dict(
            data=folder,
            cache_dir=cache,
            output_dir=out,
            max_train_steps=12,
            train_batch_size=4,
            mixed_precision="no",
            num_workers=0,
            validation_steps=0,
            checkpointing_steps=4,
            checkpoints_total_limit=0,
            validation_prompts="a red heart",
        ),
        **more,
    )
    words = [*launcher, "tests/toy_train.py", *switches, *flags_of(flags)]
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TOY_NO_PICTURES": "1", **(env or {})},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(
    trained, run, capsys, monkeypatch, tmp_path, number
):  # noqa: F811
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_each_loss(patch, lambda call: (call == 2 and signal.raise_signal(number)) or 1.0)
        run("a", resume_from_checkpoint="latest")
    assert signal.getsignal(number) is handler  # `stop` still holds the frames of the run that ended
    assert stop.value.code == 128 + number and "after step 2, as asked" in capsys.readouterr().out
    (step, newest), *others = checkpoint.list_checkpoints(tmp_path / "a")
    assert step == 2 and not others and checkpoint.find_damage(newest) is None
    out = run("a", resume_from_checkpoint="latest")
    assert_same_weights(weights(trained), weights(out), rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1, 2])
def test_what_was_just_saved_is_never_the_one_that_goes(trained, run, monkeypatch, tmp_path, limit):  # noqa: F811
    """Among damaged checkpoints with higher numbers, which the run that went on from an older one meets again."""
    out = tmp_path / "a"
    for step in (3, 6):
        shutil.copytree(trained / f"checkpoint-{step}", out / f"checkpoint-{step}")
    flip(out / "checkpoint-6" / "optimizer.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_each_loss(patch, lambda call: signal.raise_signal(signal.SIGTERM) or 1.0)
        run("a", resume_from_checkpoint="latest", checkpoints_total_limit=limit)
    assert stop.value.code == 143
    assert [step for step, _ in checkpoint.list_checkpoints(out)] == ([3, 4, 6] if limit == 2 else [4, 6])
    run("a", resume_from_checkpoint="latest", checkpoints_total_limit=limit)
    assert_same_weights(weights(trained), weights(out), rtol=0, atol=0)


def test_a_second_ctrl_c_ends_it_at_once(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(train.os, "_exit", sys.exit)  # which the tests survive
    at_each_loss(
        monkeypatch, lambda call: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(SystemExit) as stop:
        run("a")
    assert stop.value.code == 130 and not checkpoint.list_checkpoints(tmp_path / "a")


# ----------------------------------------------------------------------------------------- damaged checkpoints


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")],
    ids=["truncated", "flipped", "missing", "empty"],
)
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "optimizer.pt", "state.json"])
def test_damage_is_found(trained, tmp_path, damage, name):
    copy = shutil.copytree(trained / "checkpoint-6", tmp_path / "copy")
    assert checkpoint.find_damage(copy) is None
    damage(copy / name)
    assert checkpoint.find_damage(copy).startswith(name)


@pytest.fixture(scope="module")
def trained(folder, cache, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("trained") / "run"
    process = start(out, folder, cache, max_train_steps=6, checkpointing_steps=3)
    assert process.wait(timeout=200) == 0, process.communicate()[1][-2000:]
    return out


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(trained, run, capsys, tmp_path):  # noqa: F811
    out = tmp_path / "a"
    out.mkdir()
    for step in (3, 6):
        shutil.copytree(trained / f"checkpoint-{step}", out / f"checkpoint-{step}")
    shutil.copy(trained / "log.jsonl", out)
    (out / "checkpoint-9.tmp").mkdir()  # what a kill leaves
    truncate(out / "checkpoint-6" / "optimizer.pt")
    refused(run, capsys, "optimizer.pt is not what was saved", resume_from_checkpoint=out / "checkpoint-6")
    run("a", resume_from_checkpoint="latest")
    said = capsys.readouterr().out
    assert (
        "checkpoint-6 is damaged (optimizer.pt is not what was saved)" in said
        and "checkpoint-3 at step 3" in said
    )
    assert_same_weights(weights(trained), weights(out), rtol=0, atol=0)
    assert not list(out.glob("*.tmp")) and checkpoint.find_damage(out / "checkpoint-6") is None
    for step in (3, 6):
        flip(out / f"checkpoint-{step}" / "state.json")
    refused(run, capsys, "all its checkpoints are damaged", resume_from_checkpoint="latest")


@pytest.mark.parametrize("content", ["[]", "{}", "", "{"])
def test_sums_that_are_none(trained, tmp_path, content):
    copy = shutil.copytree(trained / "checkpoint-6", tmp_path / "copy")
    (copy / "files.json").write_text(content)
    assert checkpoint.find_damage(copy).startswith("files.json")


def test_a_file_that_cannot_be_read_is_named(trained, tmp_path, monkeypatch):
    copy = shutil.copytree(trained / "checkpoint-6", tmp_path / "copy")

    def failing(file, name):
        raise OSError(5, "Input/output error", str(copy / "optimizer.pt"))

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", failing)
    assert checkpoint.find_damage(copy) == "optimizer.pt cannot be read: Input/output error"


def test_an_old_checkpoint_that_cannot_be_removed_is_no_fault(trained, run, tmp_path):  # noqa: F811
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint-3").symlink_to(
        shutil.copytree(trained / "checkpoint-3", tmp_path / "elsewhere")
    )
    out = run("a", resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert [step for step, _ in checkpoint.list_checkpoints(out)] == [6] and (tmp_path / "elsewhere").exists()


def test_sweeping_takes_what_is_ours_alone(tmp_path):
    for name in ("checkpoint-3.tmp", "checkpoint-3.old.tmp", "finished.tmp", "mine.tmp", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.tmp").touch()
    checkpoint.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", "notes.tmp", "checkpoint-3"}


# ------------------------------------------------------------------------------------------- the output folder


def test_two_runs_do_not_share_a_folder(run, capsys, tmp_path):  # noqa: F811
    (tmp_path / "a").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "a" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    refused(run, capsys, "is in use by a run that has not ended")
    other.kill()
    other.communicate()
    run("a", max_train_steps=2)


@pytest.mark.parametrize("name", ["README.md", "model_index.json"])
@pytest.mark.parametrize("how", [{}, dict(resume_from_checkpoint="latest")], ids=["fresh", "latest"])
def test_a_finished_model_is_not_overwritten(run, capsys, tmp_path, name, how):  # noqa: F811
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("{}")
    refused(run, capsys, name, **how)
    assert (tmp_path / "a" / name).read_text() == "{}"


def test_a_checkpoint_of_another_folder_does_not_mix_with_those_here(trained, run, capsys, tmp_path):  # noqa: F811
    shutil.copytree(trained / "checkpoint-6", tmp_path / "a" / "checkpoint-6")
    refused(run, capsys, "is of another run", resume_from_checkpoint=trained / "checkpoint-3")


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir"])
def test_places_that_cannot_be_used_get_one_sentence(run, capsys, tmp_path, flag):  # noqa: F811
    (tmp_path / "file").touch()
    refused(run, capsys, "file cannot be used", **{flag: tmp_path / "file"})


@pytest.mark.parametrize("local_rank, says", [("0", True), ("1", False)])
def test_an_error_is_said_once_on_each_machine(run, capsys, monkeypatch, local_rank, says):  # noqa: F811
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run("a", learning_rate="inf")
    assert ("--learning_rate inf" in capsys.readouterr().err) == says


def test_damaged_latents_are_encoded_again(run, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    whole = weights(run("a", cache_dir=cache, max_train_steps=1))
    truncate(next(cache.glob("latents-*/*.safetensors")))
    assert_same_weights(whole, weights(run("b", cache_dir=cache, max_train_steps=1)), rtol=0, atol=0)


@pytest.mark.parametrize("end", ['{"step": 3, "lo', "\n\n", "[]\n", "\xff\0"])
def test_a_log_that_was_cut_short_is_read_as_far_as_it_goes(trained, run, tmp_path, end):  # noqa: F811
    out = tmp_path / "a"
    shutil.copytree(trained / "checkpoint-3", out / "checkpoint-3")
    whole = '{"step": 2, "loss": 0.5}\n'
    (out / "log.jsonl").write_text(whole + end)
    run("a", resume_from_checkpoint="latest")
    assert [entry["step"] for entry in log(out)] == [2, 6] and (out / "log.jsonl").read_text().startswith(
        whole
    )


def test_a_pickle_is_refused(trained, run, capsys, tmp_path):  # noqa: F811
    out = tmp_path / "a"
    copy = shutil.copytree(trained / "checkpoint-3", out / "checkpoint-3")
    torch.save(dict(optimizer=Path("/")), copy / "optimizer.pt")  # an object, not a tensor
    (copy / "files.json").write_text(json.dumps(checkpoint.digests(copy)))
    refused(run, capsys, "optimizer.pt", resume_from_checkpoint="latest")


# ------------------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_costs_one_checkpoint(run, capsys, monkeypatch):  # noqa: F811
    """Whichever of the calls that write one it meets."""
    met = set()

    def full_at(step, module, name):
        real = getattr(module, name)

        def write(*args, **kwargs):
            if any(f"checkpoint-{step}" in str(arg) for arg in args):
                met.add(step)
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, write)

    full_at(2, checkpoint, "save_file")
    full_at(3, torch, "save")
    full_at(4, checkpoint.os, "rename")
    out = run("a", max_train_steps=5, checkpointing_steps=1)
    said = capsys.readouterr().out
    assert met == {2, 3, 4} and all(f"checkpoint-{step} could not be written" in said for step in met)
    assert [step for step, _ in checkpoint.list_checkpoints(out)] == [1, 5] and not list(out.glob("*.tmp"))


def test_a_full_disk_costs_a_picture_and_a_line_of_the_log(run, capsys, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    picture = Image.new("RGB", (1, 1))
    picture.save = full
    monkeypatch.setattr(train, "validation_sheet", lambda *args: (picture, {}))
    monkeypatch.setattr(train, "open", full, raising=False)  # of the log
    out = run("a", max_train_steps=2)
    assert capsys.readouterr().out.count("No space left on device") == 2
    assert checkpoint.find_damage(out / "checkpoint-2") is None and (out / "model_index.json").exists()


def test_asked_to_stop_with_a_full_disk_it_says_so(run, capsys, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    at_each_loss(monkeypatch, lambda call: signal.raise_signal(signal.SIGTERM) or 1.0)
    refused(run, capsys, "could not be saved")


def test_asked_to_stop_it_saves_before_it_draws(run, monkeypatch, tmp_path):  # noqa: F811
    saved = []
    monkeypatch.setattr(
        train,
        "validation_sheet",
        lambda *args: (
            saved.extend(checkpoint.list_checkpoints(tmp_path / "a")) or NO_PICTURES["validation_sheet"]()
        ),
    )
    at_each_loss(monkeypatch, lambda call: (call == 2 and signal.raise_signal(signal.SIGTERM)) or 1.0)
    with pytest.raises(SystemExit):
        run("a", validation_steps=2)
    assert [step for step, _ in saved] == [2]


@pytest.mark.slow
def test_a_full_disk_and_a_request_to_stop_leave_no_rank_waiting(folder, cache, tmp_path):  # noqa: F811
    """The other rank holds a part of the weights, and must not wait for one that gave up. torchrun passes the signal
    on, and leaves its ranks time to save."""
    out = tmp_path / "run"
    process = start(
        out,
        folder,
        cache,
        TORCHRUN,
        "--shard",
        env=dict(TOY_FULL="checkpoint-2"),
        max_train_steps=10_000,
        train_batch_size=2,
        checkpointing_steps=2,
        checkpoints_total_limit=1,
    )
    while process.poll() is None and not ((out / "log.jsonl").is_file() and log(out)):
        time.sleep(0.05)
    process.terminate()
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 1, errors[-2000:]  # that of torchrun; its ranks ended with 143
    ((step, newest),) = checkpoint.list_checkpoints(out)
    assert "checkpoint-2 could not be written" in said and f"stopped after step {step}, as asked" in said
    assert (
        checkpoint.find_damage(newest) is None and not list(out.glob("*.tmp")) and "forcefully" not in errors
    )


# ------------------------------------------------------------------------------------------------ exact resume


@pytest.fixture(scope="module")
def matrix_parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    return root, matrix.draw_folder(root), {}


@pytest.mark.parametrize("case", matrix.pairwise_cases(), ids=lambda case: "-".join(map(str, case.values())))
def test_a_resumed_run_is_the_unbroken_one(run, matrix_parts, monkeypatch, case):  # noqa: F811
    """A selection in which every pair of values is met; the whole matrix is tests/matrix.py."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert matrix.differences(case, *matrix_parts) == []


def test_a_difference_would_be_seen(run, matrix_parts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "argv", sys.argv)
    real = train.load_checkpoint

    def forgetful(resume, unet, average, optimizer):
        loaded = real(resume, unet, average, optimizer)
        optimizer.state.clear()  # AdamW starts afresh
        return loaded

    monkeypatch.setattr(train, "load_checkpoint", forgetful)
    assert "optimizer" in matrix.differences(matrix.pairwise_cases()[0], *matrix_parts)


# --------------------------------------------------------------------------------------------- killed anywhere


def test_killed_inside_a_save_it_ends_as_if_it_had_not_been(folder, cache, trained, run, tmp_path):  # noqa: F811
    """The second save kills the process halfway through a file; the whole search, over all writing, renaming and
    removing calls, is tests/kill.py."""
    out = tmp_path / "run"
    more = dict(max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint="latest")
    process = start(out, folder, cache, env=dict(TOY_KILL="3:checkpoint-6"), **more)
    assert process.wait(timeout=200) == -signal.SIGKILL
    ((step, path),) = checkpoint.list_checkpoints(out)
    assert step == 3 and checkpoint.find_damage(path) is None and (out / "checkpoint-6.tmp" / "unet").exists()
    run("run", resume_from_checkpoint="latest")
    assert_same_weights(weights(trained), weights(out), rtol=0, atol=0)
    assert not list(out.glob("*.tmp")) and [e["loss"] for e in log(out)] == [e["loss"] for e in log(trained)]


def start_two_ranks(root, folder, cache, **env):  # noqa: F811
    """Two ranks, one of which has no number at step 3. Returns what it printed."""
    root.mkdir(exist_ok=True)
    process = start(
        root / "run",
        folder,
        cache,
        [*TORCHRUN, "--max-restarts", 1],
        env=dict(env, TOY_NAN="1:3", TOY_CURRICULUM=str(root)),
        max_train_steps=8,
        train_batch_size=2,
        checkpointing_steps=1,
        resume_from_checkpoint="latest",
    )
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return said


@pytest.fixture(scope="module")
def two_ranks(folder, cache, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("two")
    start_two_ranks(root, folder, cache)
    return root


def curricula(root):
    return [json.loads((root / f"rank-{rank}.json").read_text())["state"] for rank in (0, 1)]


def test_one_rank_without_a_number_stops_no_other(two_ranks):
    out = two_ranks / "run"
    assert state(out, 8)["skipped"] == 1 and not (out / "checkpoint-3").exists()  # the next good step saves
    assert state(out, 4)["curriculum"]["count"] == state(out, 4)["ema_step"] == 3
    a, b = curricula(two_ranks)
    assert a == b


def test_torchrun_starts_again_after_one_rank_was_killed(two_ranks, folder, cache, tmp_path):  # noqa: F811
    """All ranks go on from the newest checkpoint, with one curriculum, to the weights of a run without the kill."""
    said = start_two_ranks(tmp_path, folder, cache, TOY_DIE="1:5")
    assert "resuming" in said and "at step 5" in said
    whole, killed = two_ranks / "run", tmp_path / "run"
    assert_same_weights(weights(whole), weights(killed), rtol=0, atol=0)
    assert [e["loss"] for e in log(whole)] == [e["loss"] for e in log(killed)]
    assert state(killed, 8)["skipped"] == 1
    states = curricula(two_ranks) + curricula(tmp_path)
    assert all(state == states[0] for state in states)
