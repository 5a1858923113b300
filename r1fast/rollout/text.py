"""The text of a completion while its tokens arrive, and the stop strings in it.

A token's text can depend on the one before it (spaces), and a character may take several tokens (its text ends in
U+FFFD until then), so what is decoded begins with the tokens of the last piece; the cost of a token stays constant.

Stop strings. The text of a completion is that of all its tokens, special tokens dropped (model/tokenizer.decode). A
stop string ends the sample with the token that completes it: the first token, from number `min_tokens` on, whose text
ends an occurrence, wherever the token boundaries lie. All tokens up to that one are kept with their log-probabilities,
as they were drawn, even where the last one's text goes on past the string; what a person is shown ends before the
string. Where a token completes several, the one that begins first counts, of those the longest.

Decoding takes 20 us a call, which for 512 rows is as long as a step. So a watch that shows nothing,
`StopStrings.watch`, puts off the tokens that cannot complete a stop string: they hold none of its last characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

UNFINISHED = "\ufffd"  # what decoders give for the first tokens of a character that takes several
PUT_OFF = 64  # tokens at most, so that a call stays short


class TextStream:
    """One completion. `push` each token; `take` what may be shown; `end` when there are no more."""

    def __init__(
        self,
        text_of: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        may_complete: Callable[[int], bool] | None = None,
    ):
        """text_of: the text of a list of tokens. stop, min_tokens: see the module. may_complete: False for tokens that
        may be put off, with their text; None to put none off."""
        self._text_of, self._stop, self._min_tokens = text_of, tuple(stop), min_tokens
        self._may_complete = may_complete
        self._known: list[int] = []  # tokens of the last piece: context for the next
        self._before = ""  # their text
        self._new: list[int] = []
        self._count = 0
        self._held = ""  # whole characters that are not taken yet
        self._tail = ""  # of `_new`: characters that may still change
        self._searched = 0  # characters of held and tail in which no stop string is to be found any more
        self.stopped: str | None = None  # the stop string that has ended the text

    def push(self, token: int) -> str | None:
        """One more token. Returns the stop string that it completes, after which the text has ended."""
        self._count += 1
        self._new.append(token)
        if self._may_complete and not self._tail and len(self._new) < PUT_OFF and not self._may_complete(token):
            return None
        piece = self._text_of(self._known + self._new)[len(self._before) :]
        whole = bool(piece) and not piece.endswith(UNFINISHED)
        text = self._held + (piece if whole else piece.rstrip(UNFINISHED))
        if self._stop and self._find(text):
            return self.stopped
        if whole:
            self._held, self._tail = text, ""
            self._known, self._new = self._new, []
            self._before = self._text_of(self._known)
        else:
            self._tail = piece
        return None

    def _find(self, text: str) -> bool:
        searched, self._searched = min(self._searched, len(text)), len(text)
        if self._count < self._min_tokens:
            return False
        found = ((text.find(stop, max(0, searched - len(stop) + 1)), -len(stop), stop) for stop in self._stop)
        start, _, stop = min((one for one in found if one[0] >= 0), default=(-1, 0, None))
        if stop is not None:
            self._held, self._tail, self.stopped = text[:start], "", stop
        return stop is not None

    def take(self) -> str:
        """The text that no later token can change or turn into a stop string, each character once."""
        cut = len(self._held)
        if self.stopped is None:
            for stop in self._stop:
                for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
                    if self._held.endswith(stop[:size]):
                        cut = min(cut, len(self._held) - size)
                        break
        piece, self._held = self._held[:cut], self._held[cut:]
        self._searched = max(0, self._searched - cut)
        return piece

    def end(self) -> str:
        """The rest: no token comes any more."""
        piece, self._held, self._tail = self._held + self._tail, "", ""
        return piece


class StopStrings:
    """The stop strings of one request: a watch for each of its samples, and what they learn about tokens."""

    def __init__(self, text_of: Callable[[list[int]], str], stop: Sequence[str], min_tokens: int = 0):
        self._text_of, self._stop, self._min_tokens = text_of, tuple(stop), min_tokens
        self._last = {one[-1] for one in stop}
        self._known: dict[int, bool] = {}

    def watch(self) -> TextStream:
        """For `push` alone: its text lags behind."""
        return TextStream(self._text_of, self._stop, self._min_tokens, self._may_complete)

    def _may_complete(self, token: int) -> bool:
        """Whether the token's text, at the beginning or behind another, can hold the end of a stop string. White space
        comes and goes with the neighbours, and a part of a character may be anything."""
        known = self._known.get(token)
        if known is None:
            text = self._text_of([token, token])
            blank = any(end.isspace() for end in self._last)
            known = self._known[token] = blank or UNFINISHED in text or not self._last.isdisjoint(text)
        return known


def pieces(tokens: Iterable[int], text_of: Callable[[list[int]], str]) -> Iterator[str]:
    """The text that each token adds; joined they are the text of all tokens."""
    stream = TextStream(text_of)
    for token in tokens:
        stream.push(token)
        if piece := stream.take():
            yield piece
    if rest := stream.end():
        yield rest


def shown_text(
    tokens: Iterable[int], text_of: Callable[[list[int]], str], stop: Sequence[str] = (), min_tokens: int = 0
) -> str:
    """The text of a whole completion up to its stop string."""
    stream = TextStream(text_of, stop, min_tokens)
    for token in tokens:
        if stream.push(token):
            break
    return stream.end()
