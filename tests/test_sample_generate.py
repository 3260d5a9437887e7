"""sample.py caption, answer, chat and complete, with a model that has learnt the names of three colours."""

import io
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minivlm
import sample
from minivlm import command_line
from minivlm.command_line import GENERATION
from minivlm.conversation import DESCRIBE
from minivlm.errors import UserError
from minivlm.generation import Options
from minivlm.layers import LanguageModel
from tests.colours import paint
from tests.speakers import captioner, colour_llava, language, language_model, processor

ROOT = Path(sample.__file__).parent
WHICH = "which colours?"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories as train.py leaves them."""
    folder = tmp_path_factory.mktemp("models")
    blind = processor(image_tokens=0)
    colour_llava().save_pretrained(folder / "llava", processor=processor())
    captioner().save_pretrained(folder / "captioner", processor=blind)
    language_model().save_pretrained(folder / "lm", processor=blind)
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llava", "captioner", "lm"):
        (tmp_path / name).symlink_to(models / name)
    for colour in ("red", "green", "blue"):
        paint(tmp_path / f"{colour}.png", colour)
    paint(tmp_path / "my photo.png", "blue")


def run(*argv):
    sample.main([*map(str, argv), "--device", "cpu"])


def test_caption(capsys):
    run("caption", "llava", "red.png")
    assert capsys.readouterr().out == "a picture of red\n"
    run("caption", "llava", "red.png", "blue.png", "--num-beams", 3)
    assert capsys.readouterr().out == "red.png: a picture of red\nblue.png: a picture of blue\n"
    run("caption", "llava", "green.png", "--prompt", WHICH)
    assert capsys.readouterr().out == "green\n"
    run("caption", "captioner", "green.png", "--max_new_tokens", 5)
    assert capsys.readouterr().out.endswith("\n")


def test_the_prompt_that_the_help_shows_is_the_one_that_is_meant(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("caption", "--help")
    assert DESCRIBE in capsys.readouterr().out


def test_answer(capsys):
    run("answer", "llava", "red.png", WHICH)
    assert capsys.readouterr().out == "red\n"
    run("answer", "llava", "red.png", "my photo.png", WHICH, "--temperature", 0.01, "--top_p", 0.9)
    assert capsys.readouterr().out == "red blue\n"


def test_complete(capsys):
    run("complete", "lm", "a picture", "--max_new_tokens", 5)
    expected = minivlm.tasks.complete("a picture", language_model(), processor(image_tokens=0), max_new_tokens=5)
    assert capsys.readouterr().out == expected + "\n"


def test_the_options_are_those_of_the_engine_in_either_spelling(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("minivlm.tasks.answer", lambda *_, **how: seen.append(how) or "yes")
    given = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.5, "max_new_tokens": 7, "seed": 3}
    for joint in ("_", "-"):
        run(
            "answer", "llava", "red.png", "?", *(x for k, v in given.items() for x in (f"--{k.replace('_', joint)}", v))
        )
    assert seen == [given, given]
    assert {*GENERATION} <= {*vars(Options())}


def test_how_it_is_asked_can_be_chosen(monkeypatch):
    seen = []
    monkeypatch.setattr("minivlm.tasks.answer", lambda images, question, model, processor, **_: seen.append(processor))
    run("answer", "llava", "red.png", WHICH, "--chat", "vicuna", "--system", "be brief.")
    run("answer", "llava", "red.png", WHICH)
    assert [(p.config.chat, p.config.system) for p in seen] == [("vicuna", "be brief."), ("plain", None)]
    with pytest.raises(UserError, match=r"no chat template 'vicunha'\. Did you mean vicuna"):
        run("answer", "not there", "red.png", WHICH, "--chat", "vicunha")
    with pytest.raises(UserError, match="cannot answer questions; it can describe images"):
        run("caption", "captioner", "red.png", "--system", "be brief.")


def test_weights_can_be_read_in_another_precision(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("minivlm.tasks.answer", lambda images, question, model, *_, **how: seen.append(model.dtype))
    run("answer", "llava", "red.png", WHICH)
    run("answer", "llava", "red.png", WHICH, "--dtype", "bfloat16")
    assert seen == [torch.float32, torch.bfloat16]


def test_a_small_model_that_is_stored_in_half_speaks_in_fp32_on_a_cpu(monkeypatch):
    model, own = minivlm.load("llava", dtype=torch.bfloat16)
    model.save_pretrained("half", processor=own)
    seen = []
    monkeypatch.setattr("minivlm.tasks.answer", lambda images, question, model, *_, **how: seen.append(model.dtype))
    run("answer", "half", "red.png", WHICH)
    monkeypatch.setattr(command_line, "SMALL", 100)
    run("answer", "half", "red.png", WHICH)
    assert seen == [torch.float32, torch.bfloat16]


def test_bfloat16_speaks(capsys):
    run("answer", "llava", "red.png", "blue.png", WHICH, "--dtype", "bfloat16")
    assert capsys.readouterr().out == "red blue\n"


class TestChat:
    def talk(self, monkeypatch, lines, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        run("chat", "llava", *argv)

    def test_reads_a_pipe_and_answers_line_by_line(self, monkeypatch, capsys):
        self.talk(monkeypatch, f"{WHICH}\n\n/image my photo.png\nand what else?\n/quit\n{WHICH}\n", "green.png")
        assert capsys.readouterr().out == "green\nblue\n"

    def test_leaves_at_the_end_of_the_input(self, monkeypatch, capsys):
        self.talk(monkeypatch, WHICH, "green.png", "red.png")
        assert capsys.readouterr().out == "green red\n\n"

    def test_a_mistake_is_told_and_the_conversation_goes_on(self, monkeypatch, capsys):
        self.talk(monkeypatch, f"/image gone.png\n/imgae red.png\n<image>\n/image red.png\n{WHICH}\n/quit\n")
        out, err = capsys.readouterr()
        assert out == "red\n"
        lines = err.splitlines()
        assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
        assert "gone.png is missing" in lines[0] and "/image FILE and /quit" in lines[1]

    def test_tells_how_much_was_forgotten(self, monkeypatch, capsys):
        lines = "and what else?\n" * 12 + "/quit\n"
        self.talk(monkeypatch, lines, "green.png", "--max_new_tokens", "40")
        err = capsys.readouterr().err
        assert "no room for more" in err and "dropped" in err

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, monkeypatch, capsys):
        printed = []

        def interrupting(*args, **how):
            printed.append(args)
            if args == (" picture",):
                raise KeyboardInterrupt
            print(*args, **how)

        monkeypatch.setattr(command_line, "print", interrupting, raising=False)
        self.talk(monkeypatch, f"{DESCRIBE}\n{WHICH}\n/quit\n", "red.png")
        assert capsys.readouterr().out.splitlines()[0] == "a …"
        assert len(printed) > 4  # and the second question was answered

    def test_ctrl_c_at_the_prompt_leaves(self, monkeypatch, capsys):
        def interrupting(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(command_line, "input", interrupting, raising=False)
        run("chat", "llava", "red.png")
        assert capsys.readouterr().out == "\n"

    def test_greets_someone_who_types(self, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr(command_line, "input", lambda prompt: asked.append(prompt) or "/quit", raising=False)
        run("chat", "llava")
        assert asked == ["> "] and "/image FILE" in capsys.readouterr().out

    def test_a_real_signal_while_it_speaks_and_when_it_waits(self, tmp_path):
        """A model that never ends by itself: its answer is stopped, a line is read, and the next signal ends all."""
        endless = LanguageModel(replace(language(), context=30_000, end_tokens=()))
        endless.save_pretrained(tmp_path / "endless", processor=processor(image_tokens=0))
        command = [
            sys.executable,
            ROOT / "sample.py",
            "chat",
            "endless",
            "--max_new_tokens",
            "29000",
            "--device",
            "cpu",
        ]
        pipe = subprocess.PIPE
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs begin with it ignored
        streams = dict(stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        with subprocess.Popen(command, **streams, cwd=tmp_path, preexec_fn=heed) as chat:
            try:
                chat.stdin.write("red\n/nothing\n")
                chat.stdin.flush()
                assert chat.stdout.read(1)  # it speaks
                chat.send_signal(signal.SIGINT)
                assert "unknown command /nothing" in chat.stderr.readline()  # and reads on
                chat.send_signal(signal.SIGINT)
                out, err = chat.communicate(timeout=60)
            finally:
                chat.kill()
        assert chat.returncode == 0 and " …\n" in out and err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["caption", "nowhere", "red.png", "--top_p", "0"], "top_p is 0.0, but must be above 0"),
        (["caption", "nowhere", "red.png", "--top-p", "2"], "top_p is 2.0"),
        (["answer", "nowhere", "red.png", "?", "--num_beams", "0"], "num_beams is 0, but must be at least 1"),
        (["chat", "nowhere", "--temperature", "-1"], "temperature is -1.0"),
        (["complete", "nowhere", "a", "--num_beams", "2", "--temperature", "1"], "beam search does not sample"),
        (["caption", "nowhere", "gone.png"], "gone.png is missing"),
        (["answer", "nowhere", "gone.png", "?"], "gone.png is missing"),
        (["chat", "nowhere", "gone.png"], "gone.png is missing"),
        (
            ["caption", "llava", "red.png", "--temprature", "1"],
            "unknown option --temprature. Did you mean --temperature",
        ),
        (["caption", "llava", "red.png", "--top_k", "few"], "invalid int value: 'few'"),
        (["caption", "llava", "red.png", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["answer", "llava", "red.png"], "required: QUESTION"),
        (["answer", "llava", "red.png", " "], "the question is empty"),
        (["answer", "llava", "red.png", "<image> <image> ?"], "is 2, but that of its images is 1"),
        (["answer", "llava", "red.png", "red " * 99], "does not fit the context of 96"),
        (["answer", "captioner", "red.png", "?"], "this ImageCaptioningModel cannot answer questions"),
        (["chat", "captioner"], "this ImageCaptioningModel cannot chat"),
        (["answer", "lm", "red.png", "?"], "this LanguageModel takes text alone, and no image"),
        (["caption", "lm", "red.png"], "this LanguageModel cannot describe images"),
        (["chat", "lm", "red.png"], "this LanguageModel takes text alone, and no image"),
        (["complete", "captioner", "a"], "this ImageCaptioningModel cannot continue a text"),
        (
            ["zero-shot", "llava", "red.png", "--labels", "a", "b"],
            "this LLaVA cannot compare texts and images as vectors",
        ),
    ],
)
def test_a_mistake_is_one_sentence(argv, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        run(*argv)
    assert message in str(error.value)
