"""--push_to_hub, against a hub that the tests play: nothing leaves this machine."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from support import hub, options
from support.common import UserError
from tests.checkpoints import toy_model, write_model
from train import PRESETS


class Hub:
    """In the place of HfApi: remembers what it gets, and fails where it is told to."""

    def __init__(self, fails=()):
        self.calls, self.fails = {}, fails

    def __getattr__(self, name):
        def call(*args, **more):
            if name in self.fails:
                raise OSError(f"401 Client Error\nfor {name}")
            self.calls[name] = args, more
            return SimpleNamespace(repo_id="me/hearts")

        return call


@pytest.fixture
def run(tmp_path):
    folder = write_model(tmp_path / "hearts", *toy_model())
    for name in ("README.md", "log.jsonl", "checkpoint-3/optimizer.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return Namespace(output_dir=folder, push_to_hub=True, hub_model_id=None)


def test_the_model_and_its_card_go_up_and_nothing_else(run, monkeypatch):
    played = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: played)
    hub.push(run, main=True)
    assert played.calls["create_repo"][0] == ("hearts",)
    _, sent = played.calls["upload_folder"]
    assert sent["repo_id"] == "me/hearts" and sent["folder_path"] == run.output_dir
    matched = {path for pattern in sent["allow_patterns"] for path in run.output_dir.glob(pattern)}
    whole = {path for path in run.output_dir.rglob("*") if path.is_file()}
    assert {path.name for path in whole - matched} == {"log.jsonl", "optimizer.pt"}

    run.hub_model_id = "me/other"
    hub.push(run, main=True)
    assert played.calls["create_repo"][0] == ("me/other",)


def test_only_the_main_process_pushes_and_only_if_asked(run, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("no call"))
    hub.push(run, main=False)
    hub.push(Namespace(**{**vars(run), "push_to_hub": False}), main=True)


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_hub_that_refuses_leaves_the_model_and_says_how_to_try_again(run, monkeypatch, step):
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(fails=[step]))
    with pytest.raises(UserError, match=r"401 Client Error for .*hf upload hearts"):
        hub.push(run, main=True)
    assert (run.output_dir / "model_index.json").is_file()


def test_nobody_logged_in_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(fails=["whoami"]))
    monkeypatch.setattr("sys.argv", ["train.py", "--push_to_hub"])
    with pytest.raises(UserError, match="--push_to_hub: the hub knows nobody here .401.*hf auth login"):
        options.parse_args(PRESETS)
