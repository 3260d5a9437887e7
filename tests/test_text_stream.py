import itertools

import pytest
import torch

from minivlm.generation import Options, generate
from minivlm.text_stream import TextStream
from tests.talkers import Recurrent, letters

HALF = "\ufffd"  # what half a character is decoded to


def utf8(rows):
    """A token is a byte."""
    return [bytes(row).decode(errors="replace") for row in rows]


class TestTextStream:
    def feed(self, text, decode=utf8, stop=()):
        stream = TextStream(decode, stop)
        return stream, [stream.feed(i) for i in text]

    def test_pieces_add_up(self):
        stream, pieces = self.feed(b"a red circle")
        assert pieces == list("a red circle")
        assert (stream.text, stream.end(), stream.stopped) == ("a red circle", "", False)

    def test_tensors(self):
        assert self.feed(torch.tensor([97, 98]))[1] == ["a", "b"]

    @pytest.mark.parametrize("text", ["é", "naïve", "🦩!", "日本語", "a🦩é"])
    def test_no_half_characters(self, text):
        stream, pieces = self.feed(text.encode())
        assert "".join(pieces) == stream.text == text
        assert [p for p in pieces if p] == list(text)

    def test_half_a_character_comes_at_the_end_if_nothing_follows(self):
        stream, pieces = self.feed("aé".encode()[:2])
        assert pieces == ["a", ""]
        assert (stream.end(), stream.end()) == ("\ufffd", "")

    def test_holds_back_what_could_begin_a_stop_string(self):
        stream, pieces = self.feed(b"aUSBUSER:b", stop=("USER:",))
        assert pieces == ["a", "", "", "USB", "", "", "", "", "", ""]
        assert (stream.text, stream.stopped, stream.end()) == ("aUSB", True, "")

    def test_releases_what_was_none(self):
        stream, pieces = self.feed(b"US", stop=("USER:",))
        assert (pieces, stream.stopped) == (["", ""], False)
        assert stream.text == "US"
        assert (stream.end(), stream.end()) == ("US", "")

    def test_the_first_of_several_in_one_token(self):
        stream = TextStream(lambda rows: ["one two three four" if rows[0] else ""], stop=("four", "two", "three"))
        assert stream.feed(1) == "one "
        assert (stream.text, stream.stopped) == ("one ", True)

    def test_overlapping_beginnings(self):
        """ "ab" is held for "abc"; "bX" then begins in its middle."""
        stream, pieces = self.feed(b"abX", stop=("abc", "bX"))
        assert pieces == ["", "", "a"]
        assert stream.stopped

    def test_the_first_to_be_complete_wins_for_good(self):
        """ "bc" ends it before "abcd", which begins earlier, is there."""
        stream, pieces = self.feed(b"abcd", stop=("abcd", "bc"))
        assert pieces == ["", "", "a", ""]
        assert stream.text == "a"

    def test_a_repeated_beginning(self):
        assert self.feed(b"\n\n\n#", stop=("\n\n#",))[1] == ["", "", "\n", ""]

    @pytest.mark.parametrize("text", ["xUSER:y", "éUSéUSER:", "USUSER:", "U\nU\nUSE", "🦩US"])
    def test_any_cut_of_the_tokens_gives_the_same_text(self, text):
        data, stop = text.encode(), ("USER:", "\nUSER")
        expected = text.split("USER:")[0]
        for cut in itertools.product([False, True], repeat=len(data) - 1):
            ends = [i + 1 for i, c in enumerate(cut) if c] + [len(data)]
            words = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            stream = TextStream(
                lambda rows, words=words: [b"".join(words[i] for i in rows[0]).decode(errors="replace")], stop
            )
            pieces = [stream.feed(i) for i in range(len(words))]
            assert all(HALF not in p for p in pieces)
            assert "".join(pieces) + stream.end() == stream.text == expected

    def test_agrees_with_the_engine(self):
        options = Options(max_new_tokens=20, stop=("bd", "ha"))
        row = generate(Recurrent([2]), options, decode=letters)[0]
        text = TextStream(letters, options.stop)
        for token in row:
            assert not text.stopped
            text.feed(token)
        assert text.stopped == (len(row) < 20)
