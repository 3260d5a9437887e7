import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from minivlm.errors import Note, UserError, nearest, run_command_line

ROOT = Path(__file__).parent.parent


class TestNearest:
    def test_close_names_are_suggested_best_first(self):
        assert nearest("clop", ["blip", "clip", "llava"]) == " Did you mean clip or blip?"

    def test_far_from_all_of_them_all_are_listed(self):
        assert nearest("xyz", ["clip", "blip"]) == " There are: blip, clip."

    def test_takes_any_iterable(self):
        assert nearest("width", {"widht": 1}) == nearest("width", iter(["widht"])) == " Did you mean widht?"


class TestRunCommandLine:
    def run(self, main, monkeypatch, argv=()):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        run_command_line(main)

    def test_passes_the_arguments_on(self, monkeypatch):
        seen = []
        self.run(seen.append, monkeypatch, ["clip", "--steps", "5"])
        assert seen == [["clip", "--steps", "5"]]

    def test_a_note_is_a_line_and_ends_nothing(self, monkeypatch, capsys):
        done = []
        self.run(lambda _: (warnings.warn("this is not followed.", Note, stacklevel=1), done.append(1)), monkeypatch)
        assert capsys.readouterr().err == "note: this is not followed.\n" and done

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (UserError("there is no folder x."), 2, "error: there is no folder x.\n"),
            (KeyboardInterrupt(), 130, "stopped\n"),
        ],
    )
    def test_what_a_user_can_mend_is_one_line_and_a_code(self, monkeypatch, capsys, error, code, text):
        def main(argv):
            raise error

        with pytest.raises(SystemExit) as exit:
            self.run(main, monkeypatch)
        assert exit.value.code == code
        assert capsys.readouterr() == ("", text)

    def test_a_mistake_in_the_program_keeps_its_traceback(self, monkeypatch):
        def main(argv):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            self.run(main, monkeypatch)

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
    def test_what_the_terminal_has_no_sign_for_does_not_end_the_program(self, encoding):
        script = (
            "import sys\n"
            "from minivlm.errors import UserError, run_command_line\n"
            "def main(argv):\n"
            "    print('image → text', '\\udce9.png', flush=True)\n"
            "    raise UserError('no folder 左.')\n"
            "run_command_line(main)"
        )
        done = subprocess.run(
            [sys.executable, "-X", "utf8=0", "-c", script],
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        narrow = encoding != "utf-8"
        assert done.stdout.decode(encoding).split() == ["image", r"\u2192" if narrow else "→", "text", r"\udce9.png"]
        assert done.stderr.decode(encoding).strip() == f"error: no folder {chr(92) + 'u5de6' if narrow else '左'}."
        assert done.returncode == 2

    def test_a_closed_pipe_is_not_an_error(self):
        script = (
            "from minivlm.errors import run_command_line\n"
            "run_command_line(lambda argv: [print(i, flush=True) for i in range(100000)])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0
