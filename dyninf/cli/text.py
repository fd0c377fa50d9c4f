"""Turn tokens into text as they come: whole characters only, stop texts cut off, colours by depth."""

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from tokenizers import Tokenizer

CONTEXT_TOKENS = 8  # of the prompt, so that decoders which treat the first token of a text differently see one
BROKEN = "\ufffd"
# Few layers to many: green, yellow, orange, red, legible on dark and on light backgrounds.
PALETTE = ("color(34)", "color(70)", "color(142)", "color(172)", "color(166)", "color(160)")
_SYSTEMS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}
# A terminal acts on these; a model may produce any of them.
_CONTROLS = {code: "\u2423" for code in (*range(9), *range(11, 32), *range(127, 160))}


class TextStream:
    """Decode tokens one at a time and hand out characters once they are complete.

    Args:
        tokenizer: decodes ids; one token may hold part of a character.
        prompt: ids before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith(BROKEN) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


class StopTexts:
    """Hold back text that may be the beginning of a stop text, and cut the output before a whole one.

    Args:
        stops: texts that end the output; none of them empty.

    Raises:
        ValueError: if a stop text is empty.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError("expected a stop text, got an empty one; leave --stop out to stop at the end only")
        self._stops = tuple(stops)
        self._held: list[tuple[str, int]] = []
        self.stopped = False

    def add(self, text: str, depth: int) -> list[tuple[str, int]]:
        """Return the pieces (text, depth) that can be shown now; ``stopped`` says whether a stop text came."""
        self._held.append((text, depth))
        whole = "".join(piece for piece, _ in self._held)
        found = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        self.stopped = bool(found)
        return self._release(min(found) if found else len(whole) - self._overlap(whole))

    def rest(self) -> list[tuple[str, int]]:
        """Return what was held back, when no more text comes; nothing after a stop text."""
        return [] if self.stopped else self._release(sum(len(piece) for piece, _ in self._held))

    def _overlap(self, whole: str) -> int:
        """Return the length of the longest end of ``whole`` that begins a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(whole)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(whole[-n:]) for stop in self._stops)), 0)

    def _release(self, count: int) -> list[tuple[str, int]]:
        released = []
        while self._held and count > 0:
            piece, depth = self._held.pop(0)
            if len(piece) > count:
                self._held.insert(0, (piece[count:], depth))
            released.append((piece[:count], depth))
            count -= len(piece)
        return [(piece, depth) for piece, depth in released if piece]


class Painter:
    """Write text to a stream, coloured by depth where that is a terminal that shows colours.

    Args:
        num_layers: depth of the model.
        colours: whether depth is to be shown at all.
    """

    def __init__(self, num_layers: int, *, colours: bool, file: TextIO | None = None):
        self._file = sys.stdout if file is None else file
        console = Console(file=self._file)
        self._terminal = console.is_terminal
        plain = console.no_color or console.color_system is None or not console.is_terminal
        self._system = None if plain else _SYSTEMS[console.color_system]
        self._num_layers = num_layers
        self._colours = colours and self._system is not None

    def write(self, text: str, depth: int | None = None) -> None:
        """Write a piece of generated text that needed ``depth`` layers."""
        self._put(text, self._style(depth) if self._colours and depth is not None else None)

    def echo(self, text: str) -> None:
        """Write the prompt, dim."""
        self._put(text, Style(dim=True) if self._system is not None else None)

    def legend(self) -> str:
        """Return one line that explains the colours; empty where there are none."""
        if not self._colours:
            return ""
        step = max(1, self._num_layers // 8)
        depths = [*range(step, self._num_layers, step), self._num_layers]
        shown = " ".join(self._style(depth).render(str(depth), color_system=self._system) for depth in depths)
        return f"layers needed: {shown} of {self._num_layers}"

    def _put(self, text: str, style: Style | None) -> None:
        text = text.translate(_CONTROLS) if self._terminal else text
        self._file.write(text if style is None else style.render(text, color_system=self._system))
        self._file.flush()

    def _style(self, depth: int) -> Style:
        return Style.parse(PALETTE[min(len(PALETTE) - 1, (depth - 1) * len(PALETTE) // self._num_layers)])
