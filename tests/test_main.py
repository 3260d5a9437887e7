"""The command `minivlm`: its words reach the programs, and what these print can be typed where they were started."""

import subprocess
import sys
from pathlib import Path

import pytest

import minivlm.__main__ as command
from minivlm.errors import UserError, as_started

ROOT = Path(__file__).parent.parent
WRITTEN = (
    "python sample.py chat out/llava; python -m minivlm.datasets.check d; torchrun --nproc_per_node=2 train.py clip"
)


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("train.py", WRITTEN),
        (
            "/usr/bin/minivlm",
            "minivlm sample chat out/llava; minivlm check d; torchrun --nproc_per_node=2 -m minivlm train clip",
        ),
        (
            "/src/minivlm/__main__.py",
            "python -m minivlm sample chat out/llava; python -m minivlm check d; "
            "torchrun --nproc_per_node=2 -m minivlm train clip",
        ),
        ("/src/minivlm/bench/__main__.py", WRITTEN),
    ],
)
def test_commands_are_printed_as_they_work_where_the_program_was_started(program, printed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert as_started(WRITTEN) == printed


@pytest.mark.parametrize("name", command.PROGRAMS)
def test_every_word_is_a_program_that_helps(name, capsys):
    try:
        command.main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_misspelt_word_is_refused_and_no_word_lists_them(capsys):
    with pytest.raises(UserError, match=r"no program 'trian'. Did you mean train"):
        command.main(["trian"])
    command.main([])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in command.PROGRAMS)


def test_elsewhere_a_message_names_the_command_that_works_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "minivlm", "sample", "complete", "out/lm", "is there a"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: out/lm does not exist; train it with python -m minivlm train lm.\n"
