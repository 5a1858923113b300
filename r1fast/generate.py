"""python -m r1fast.generate MODEL_DIR --prompt TEXT: for a person to try what was trained, from any checkpoint.

Text goes to standard output while it is drawn, of several samples one after the other in their order (they are drawn
together). Numbers go to standard error: in a terminal a live line with the tokens and the speed, kept at the bottom
while the text scrolls above it, and one closing line everywhere; so the output can be piped and the speed still seen.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

from r1fast.config import CommandParser, UserError

if TYPE_CHECKING:  # torch takes a second to import; --help and a wrong option should not wait for it
    from r1fast.rollout.events import Event
    from r1fast.rollout.text import TextStream
    from r1fast.types import Prompt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m r1fast.generate", description="Print completions of a prompt.")
    parser.add_argument("model", metavar="MODEL_DIR", help="a Llama, Qwen2 or Qwen3 folder in Hugging Face format")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="'-' reads it from standard input")
    parser.add_argument("--samples", type=int, default=1, metavar="K")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95; 1 is off")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: off")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    try:
        generate(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; nothing more goes there, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def generate(options: argparse.Namespace) -> None:
    """Load, sample, print. UserError for whatever the user can put right."""
    from r1fast.device import choose_device
    from r1fast.model.tokenizer import decode, eos_token_ids
    from r1fast.model.weights import load
    from r1fast.rollout.sampler import Sampler, SamplingParams
    from r1fast.rollout.text import TextStream

    device = choose_device(options.device)
    text = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    model, tokenizer = load(options.model, device=device, dtype="auto")
    prompt = encode(tokenizer, text, options)
    params = SamplingParams(
        options.samples, options.max_tokens, options.temperature, options.top_p, options.top_k, options.seed,
        stop=tuple(options.stop),
    )  # fmt: skip
    sampler = Sampler(model, eos_token_ids(tokenizer, model.config.eos_token_ids), tokenizer=tokenizer)
    events = sampler.events([prompt], params)
    texts = [TextStream(lambda tokens: decode(tokenizer, tokens), params.stop) for _ in range(params.n)]
    count = Count(device)
    with StatusLine(sys.stdout, sys.stderr) as status:
        try:
            for piece in pieces(count.watch(events, status), texts):
                print(piece, end="", flush=True)
        finally:
            status.close()
            if count.tokens and not count.done:
                print(flush=True)
            print(f"{count.summary()}; KV cache {sampler.memory.stated}", file=sys.stderr)


def encode(tokenizer, text: str, options: argparse.Namespace) -> Prompt:
    from r1fast.model.tokenizer import apply_template
    from r1fast.types import Prompt

    if tokenizer is None:
        raise UserError(f"{options.model}: there is no tokenizer beside the weights; save one into the folder")
    if options.chat and not tokenizer.chat_template:
        raise UserError(f"{options.model}: its tokenizer has no chat template; leave --chat out")
    tokens = apply_template(tokenizer, text) if options.chat else tuple(tokenizer.encode(text))
    if not tokens:
        raise UserError("--prompt is empty; give at least one word, or --chat")
    return Prompt("prompt", tokens, text, None, "generate")


def pieces(events: Iterable[Event], texts: list[TextStream]) -> Iterator[str]:
    """What is printed: the text of one sample after the other, as far as it is certain, a headline before each of
    several. What later samples draw meanwhile is kept until it is their turn."""
    from r1fast.rollout.events import Drew, SampleDone

    turn, done = 0, [False] * len(texts)
    headline = "--- {} of {}\n" if len(texts) > 1 else ""
    yield headline.format(1, len(texts))
    for event in events:
        if isinstance(event, Drew):
            for token in event.tokens:
                texts[event.sample].push(token)
        elif isinstance(event, SampleDone):
            done[event.sample] = True
        if turn < len(texts) and (piece := texts[turn].take()):
            yield piece
        while turn < len(texts) and done[turn]:
            yield texts[turn].end() + "\n"
            turn += 1
            if turn < len(texts):
                yield headline.format(turn + 1, len(texts)) + texts[turn].take()


class Count:
    """Tokens and samples so far, and how long they took."""

    def __init__(self, device: str):
        self.device, self.tokens, self.finishes = device, 0, Counter()
        self.began = time.perf_counter()
        self.done = False

    def watch(self, events: Iterable[Event], status: StatusLine) -> Iterator[Event]:
        """The events, counted."""
        from r1fast.rollout.events import Drew, GroupDone, SampleDone

        for event in events:
            if isinstance(event, Drew):
                self.tokens += len(event.tokens)
                status.show(self.speed)
            elif isinstance(event, SampleDone):
                self.finishes[event.rollout.finish] += 1
            elif isinstance(event, GroupDone):
                self.done = True
            yield event

    def speed(self) -> str:
        seconds = time.perf_counter() - self.began
        samples = f"{self.finishes.total()} samples, " if self.finishes.total() > 1 else ""
        return f"{samples}{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s"

    def summary(self) -> str:
        seconds = time.perf_counter() - self.began
        rate = f"{self.tokens} tokens in {seconds:.2f} s: {self.tokens / seconds:,.0f} tokens/s on {self.device}"
        if not self.done:
            return f"{rate}; interrupted"
        cut = self.finishes["length"]
        return rate + (f"; {cut} of {self.finishes.total()} reached --max-tokens or the context" if cut else "")


class StatusLine:
    """A line about the work at the bottom of the terminal that standard error is; nothing where it is none.

    Where standard output is the same terminal, the text scrolls in the rows above (DECSTBM, as apt does it), so nothing
    is drawn over it and it can be copied whole.
    """

    EVERY = 0.1  # seconds

    def __init__(self, out: TextIO, err: TextIO):
        self._out, self._err = out, err
        self._live = err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._rows = 0  # of the terminal, while its last one is ours
        self._shown = -self.EVERY

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def show(self, text) -> None:
        """text: called where there is a line to be drawn."""
        now = time.monotonic()
        if not self._live or now - self._shown < self.EVERY:
            return
        self._shown = now
        columns, rows = self._size()
        line = text()[: columns - 1]
        if not self._out.isatty():
            self._write(f"\r{line}\x1b[K")
            return
        if rows != self._rows:  # the first time, or the window has changed
            self._rows = rows
            self._write(f"\x1bD\x1b[A\x1b7\x1b[1;{rows - 1}r\x1b8")  # down and up: off the last row, in its column
        self._write(f"\x1b7\x1b[{rows};1H\x1b[2K{line}\x1b8")

    def close(self) -> None:
        """The line goes, and the terminal is as it was."""
        if self._live and self._rows:
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
        elif self._live and self._shown > 0:
            self._write("\r\x1b[K")
        self._live = False

    def _size(self) -> tuple[int, int]:
        """Columns and rows; a terminal that does not know says zero."""
        try:
            columns, rows = os.get_terminal_size(self._err.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def _write(self, codes: str) -> None:
        if self._rows:
            self._out.flush()  # what was printed stands before the line is drawn
        self._err.write(codes)
        self._err.flush()


if __name__ == "__main__":
    sys.exit(main())
