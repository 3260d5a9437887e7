"""Where a run may write: nothing that it did not write is moved or deleted, and two processes never share a directory."""

import json
import os
from pathlib import Path

import pytest

from minivlm import run_directory
from minivlm.errors import UserError
from minivlm.recipes import plan
from minivlm.run import Run
from minivlm.run_directory import check_out


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/cat/1.png", "photos/dog/1.png", "notes/thesis.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def a_run(directory="out/clip", step=3):
    """What a run leaves, in small."""
    made = Path(directory)
    (made / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    (made / f"checkpoints/step-{step:06d}/training.json").write_text(json.dumps({"step": step, "recipe": {}}))
    (made / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    (made / "config.json").write_text(json.dumps({"minivlm": "1", "model": "CLIP"}))
    return made


def everything():
    return {str(path): path.read_text() for path in Path().rglob("*") if path.is_file()}


def test_a_run_is_moved_and_the_earlier_ones_are_numbered_and_none_is_lost():
    Path("out/clip.previous").mkdir(parents=True)
    Path("out/clip.previous/thesis.txt").write_text("mine")
    for step in (1, 2):
        a_run(step=step)
        with Run("out/clip") as run:
            assert str(run.set_aside()) == f"out/clip.previous-{step + 1}"
        assert not Path("out/clip").exists() or not list(Path("out/clip").iterdir())
    assert Path("out/clip.previous/thesis.txt").read_text() == "mine"
    for number, step in (("2", 1), ("3", 2)):
        assert (Path(f"out/clip.previous-{number}") / f"checkpoints/step-{step:06d}/training.json").exists()


def test_a_link_to_a_run_stays_and_what_it_leads_to_moves():
    a_run("disk/clip")
    Path("out").mkdir()
    Path("out/clip").symlink_to(Path("disk/clip").absolute(), target_is_directory=True)
    with Run("out/clip") as run:
        run.set_aside()
        assert Path("out/clip").is_symlink() and Path("disk/clip.previous/log.jsonl").exists()


@pytest.mark.parametrize("what", ["photos", "notes", ".", "..", "/", "photos/cat"])
def test_a_directory_that_no_run_wrote_is_refused(what):
    before = everything()
    with pytest.raises(UserError, match="holds what no run wrote"):
        check_out(what, {})
    assert everything() == before


@pytest.mark.parametrize(
    "stranger", ["photo.png", "checkpoints/step-000003/notes.txt", "adapter/a.txt", "sub/log.jsonl"]
)
def test_a_run_into_which_someone_put_something_is_refused(stranger):
    made = a_run()
    check_out("out/clip", {})
    (made / stranger).parent.mkdir(exist_ok=True, parents=True)
    (made / stranger).write_text("mine")
    with pytest.raises(UserError, match=f"holds what no run wrote .*{Path(stranger).name}"):
        check_out("out/clip", {})


@pytest.mark.parametrize(
    "name", ["log.jsonl", "config.json", "picture.png", "model.safetensors", "checkpoints/step-000001/x"]
)
def test_names_alone_are_no_marks_of_a_run(name):
    path = Path("out/other") / name
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "login"}')
    with pytest.raises(UserError, match="holds what no run wrote"):
        check_out("out/other", {})


def test_what_a_run_that_died_early_leaves_is_written_over():
    Path("out/clip/checkpoints").mkdir(parents=True)
    Path("out/clip/log.jsonl").touch()
    check_out("out/clip", {})
    with Run("out/clip") as run:
        assert run.set_aside() is None


@pytest.mark.parametrize(
    ("out", "read", "how"),
    [
        ("photos", "photos", "is"),
        ("./notes/../photos/", "photos", "is"),
        ("link", "photos", "is"),
        ("photos", "link", "is"),
        ("photos/out/clip", "photos", "lies inside"),
        ("link/new", "photos", "lies inside"),
        ("photos", "photos/cat", "holds"),
        ("out/clip", "out/clip/checkpoints/step-000003", "holds"),
        ("data/shapes", "data/shapes", "is"),
        ("data", "data/shapes", "holds"),
    ],
)
def test_a_directory_that_is_or_holds_or_lies_inside_what_is_read_is_refused(out, read, how):
    Path("link").symlink_to("photos")
    a_run()
    with pytest.raises(UserError, match=rf"--out .* {how} what the run reads \(--data .*\)"):
        check_out(out, {"--data": read})


def test_a_directory_beside_what_is_read_is_fine():
    for out in ("out/clip", "photos2", "photo", "new/er/one", "photos/../runs"):
        check_out(out, {"--data": "photos", "--starts_from": "openai/clip-vit-base-patch32"})


def test_a_resumed_run_may_stay_where_it_is():
    made = a_run("photos/run")
    (made / "notes.txt").write_text("mine")
    check_out("photos/run", {"--data": "photos"}, resume=True)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "is empty"),
        ("notes/thesis.txt", "is a file"),
        ("notes/thesis.txt/run", "would lie under notes/thesis.txt, which is a file"),
        ("nowhere", "is a link that leads nowhere"),
        ("nowhere/run", "is a link that leads nowhere"),
        ("circle", "is a link that leads nowhere"),
        ("x" * 300, "is no name that a directory can have"),
        ("/".join(["y" * 200] * 30), "is no name that a directory can have"),
        ("\udce9t\udce9", "is no name that a directory can have"),
        ("a\0b", "is no name that a directory can have"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_place_where_no_directory_can_be_is_refused_in_one_sentence(out, message, resume):
    Path("nowhere").symlink_to("gone")
    Path("circle").symlink_to("circle")
    with pytest.raises(UserError, match=message) as caught:
        check_out(out, {"--data": "photos"}, resume=resume)
    assert "\n" not in str(caught.value)


def test_a_read_only_place_is_refused(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "notes")
    with pytest.raises(UserError, match="notes is read-only"):
        check_out("notes/run", {})
    monkeypatch.undo()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="out/new cannot be written: Permission denied"), Run("out/new"):
        pass


def test_a_home_is_refused_without_a_walk_through_it(monkeypatch):
    folders = [(".", [], [f"{i}.txt"]) for i in range(9)]
    walked = []
    monkeypatch.setattr(os, "walk", lambda top: (walked.append(one) or one for one in folders))
    assert run_directory.foreign(Path(".")) == "0.txt, 1.txt, 2.txt …" and len(walked) == 4


def test_two_processes_with_one_directory_are_one_too_many():
    with Run("out/clip"):
        sentence = rf"another process is writing to out/clip \(process {os.getpid()} on"
        with pytest.raises(UserError, match=sentence), Run("out/clip"):
            pass
        with Run("out/clip", write=False), Run("out/other"):  # other processes of the same run; another run
            pass
    with Run("out/clip"):
        pass
    assert not Path("out/clip").exists()  # nothing was written


def test_the_lock_holds_while_an_earlier_run_is_set_aside():
    a_run()
    with Run("out/clip") as run:
        run.set_aside()
        with pytest.raises(UserError, match="another process"), Run("out/clip"):
            pass
    assert not list(Path("out/clip.previous").glob(run_directory.LOCK))


def test_the_directories_that_a_chain_names_itself_are_judged_as_well():
    Path("out/photos-clip").mkdir(parents=True)
    Path("out/photos-clip/holiday.png").touch()
    name, recipe, options = plan.command_line(["blip", "--data", "photos", "--out", "out/x"])
    with pytest.raises(UserError, match="out/photos-clip holds what no run wrote"):
        plan.check_places(plan.chain(name, recipe, options))
    name, recipe, options = plan.command_line(["blip", "--data", "photos", "--out", "new/photos-clip"])
    with pytest.raises(UserError, match="--out new/photos-clip is what the run reads"):
        plan.check_places(plan.chain(name, recipe, options))
