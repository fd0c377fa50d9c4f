"""Text from tokens: whole characters, stop texts, colours."""

import io

import pytest

from dyninf.cli.text import BROKEN, Painter, StopTexts, TextStream


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_characters_of_several_tokens_come_out_whole(loaded):
    tokenizer = loaded[1]
    text = "# größer 🙂 \u4f60\u597d\n    x"
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text)  # bytes stand alone in this vocabulary, so characters do span tokens
    stream = TextStream(tokenizer, tokenizer.encode("def f():").ids)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)
    assert "🙂" in pieces


def test_an_unfinished_character_is_never_shown(loaded):
    tokenizer = loaded[1]
    stream = TextStream(tokenizer, [])
    assert "".join(stream.add(token) for token in tokenizer.encode("a🙂").ids[:-1]) == "a"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "cd"], ["bc"], "a", True),  # across pieces
        (["a\n", "\n", "b"], ["\n\n"], "a", True),
        (["xab", "ac"], ["abc"], "xabac", False),  # "ab" was held back, then let go
        (["aab"], ["b", "ab"], "a", True),  # the earliest of several
        (["ab"], ["abc"], "ab", False),  # held back to the end
    ],
    ids=["none", "across", "newlines", "released", "earliest", "rest"],
)
def test_output_is_cut_before_a_stop_text(pieces, stops, shown, stopped):
    cutter, out = StopTexts(stops), ""
    for piece in pieces:
        out += "".join(text for text, _ in cutter.add(piece, 1))
        if cutter.stopped:
            break
    out += "".join(text for text, _ in cutter.rest())
    assert (out, cutter.stopped) == (shown, stopped)


def test_held_text_keeps_its_depth():
    cutter = StopTexts(["abc"])
    assert cutter.add("xa", 1) == [("x", 1)]
    assert cutter.add("bz", 2) == [("a", 1), ("bz", 2)]


def test_a_terminal_gets_colours_by_depth_and_a_legend(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "")
    file = Terminal()
    painter = Painter(6, colours=True, file=file)
    painter.echo("p")
    painter.write("a", 1)
    painter.write("b", 6)
    # Palette of six: one layer is its first colour (34), six of six its last (160).
    assert file.getvalue() == "\x1b[2mp\x1b[0m\x1b[38;5;34ma\x1b[0m\x1b[38;5;160mb\x1b[0m"
    assert painter.legend().startswith("layers needed: ") and painter.legend().endswith(" of 6")


def test_without_a_terminal_or_with_no_color_text_is_plain(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    plain = Painter(6, colours=True, file=io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    refused = Painter(6, colours=True, file=Terminal())
    for painter in (plain, refused):
        painter.echo("p\t")
        painter.write("a", 1)
        assert painter._file.getvalue() == "p\ta"
        assert painter.legend() == ""


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    Painter(6, colours=False, file=file).write("a\x1b[2Jb\n\tc")
    assert file.getvalue() == "a\u2423[2Jb\n\tc"
