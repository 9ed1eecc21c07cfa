"""What test files share: a drawn set, a trained toy run, tiny pre-trained parts, how runs start and stop.

Fixtures import train.py themselves: a test of masks.py need not wait for diffusers."""

import os
import shutil
import signal
from unittest import mock

# Before numpy is imported: its threads and those of the tests beside this one would wait for each other.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402

from support import stickers  # noqa: E402
from tests.repeatable import be_repeatable  # noqa: E402

be_repeatable()

LONG = ["test_ranks.py", "test_train.py", "test_resume.py", "test_faults.py", "test_full.py"]


def pytest_collection_modifyitems(items):
    """The longest files first: otherwise one process ends alone with one of them."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twenty-four drawn stickers."""
    return stickers.draw_stickers(tmp_path_factory.mktemp("data") / "set", count=24)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Flags that name a tiny pre-trained VAE, CLIP and T5: {name: folder}."""
    from tests.tiny_parts import make_parts

    return dict(zip(("vae", "clip", "t5"), make_parts(tmp_path_factory.mktemp("parts"))))


@pytest.fixture(scope="session")
def trained(folder, cache, tmp_path_factory):
    """A finished run of six steps, with its pictures and with checkpoints at steps 3 and 6."""
    from tests import runs

    out = tmp_path_factory.mktemp("trained") / "run"
    few_steps = mock.patch("sample.SHEET_STEPS", runs.FEW_STEPS)
    with few_steps, mock.patch.multiple("train", **runs.QUICK):
        return runs.train_here(out, data=folder, cache_dir=cache)


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of its last checkpoint, to be damaged."""
    return shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")


@pytest.fixture
def no_pictures(monkeypatch):
    """Toy runs in this process validate little and draw nothing."""
    from tests import runs

    for name, value in (runs.QUICK | runs.NO_PICTURES).items():
        monkeypatch.setattr(f"train.{name}", value)


@pytest.fixture
def run(folder, cache, tmp_path, no_pictures):
    """run("a", seed=1) trains in this process, six steps unless flags say otherwise, and returns the output
    folder, tmp_path/a."""
    from tests import runs

    def run(name="a", **flags):
        return runs.train_here(tmp_path / name, **dict(data=folder, cache_dir=cache) | flags)

    return run


@pytest.fixture
def ask_to_stop(monkeypatch):
    """ask_to_stop(2, run) calls run, and sends its process SIGTERM, or another signal, within step 2. It has
    to end as the signal says."""
    from tests.stress.toy_train import at_each_loss

    def ask_to_stop(step, run, number=signal.SIGTERM):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_each_loss(patch.setattr, lambda call: (call == step and signal.raise_signal(number)) or 1.0)
            run()
        assert stop.value.code == 128 + number

    return ask_to_stop


@pytest.fixture
def refused(capsys):
    """refused("--seed -1", function, ...) calls the function: it has to end with status 2 and one sentence
    that has these words in it. Returns the sentence."""

    def refused(words, function, *args, **more):
        with pytest.raises(SystemExit) as stop:
            function(*args, **more)
        said = capsys.readouterr().err
        sentence = said.strip().splitlines()[-1]
        assert stop.value.code == 2 and "Traceback" not in said and words in sentence, said
        return sentence

    return refused
