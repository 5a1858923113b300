"""The command a person tries a checkpoint with: what it prints, that it streams, and how it says what is wrong."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.generate import StatusLine, main
from r1fast.generate import pieces as pieces_of_samples
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.tokenizer import apply_template, build_word_tokenizer, decode
from r1fast.model.weights import save
from r1fast.rollout.events import Drew, SampleDone
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.rollout.text import TextStream, pieces
from r1fast.types import Rollout

WORDS = ["tom", "has", "eggs", "<think>", "</think>", *(str(number) for number in range(40))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved random model whose greedy answers do not end at once, with its tokenizer."""
    tokenizer = build_word_tokenizer(WORDS)
    config = DecoderConfig(
        len(tokenizer), 32, 48, 2, 4, 2, 8, max_positions=64, eos_token_ids=(tokenizer.eos_token_id,)
    )
    model = Decoder(config).initialize(0)
    with torch.no_grad():
        model.head.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save(model, tokenizer, folder)
    return str(folder), model, tokenizer


def expected(checkpoint, prompt, **params):
    _, model, tokenizer = checkpoint
    (group,) = Sampler(model, tokenizer.eos_token_id).sample([prompt], SamplingParams(**params))
    return [decode(tokenizer, rollout.tokens) for rollout in group.rollouts], group.rollouts


def test_one_sample_is_streamed(checkpoint, capsys):
    folder, _, tokenizer = checkpoint
    (text,), (rollout,) = expected(
        checkpoint, tokenizer.encode("tom has 3"), max_tokens=20, temperature=0.6, top_p=0.95, seed=4
    )
    assert main([folder, "--prompt", "tom has 3", "--max-tokens", "20", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert len(text.split()) >= 5
    assert err.startswith(f"{len(rollout.tokens)} tokens in ") and "tokens/s on cpu" in err
    assert re.search(r"; KV cache \d+ tokens in \d blocks, 0\.\d MiB$", err)


def test_text_appears_while_the_rest_is_still_to_be_drawn(checkpoint, monkeypatch):
    folder, _, _ = checkpoint
    events = []
    forward = Decoder.forward_paged

    def watched(self, *arguments):
        events.append("step")
        return forward(self, *arguments)

    class Out(io.StringIO):
        def write(self, text):
            events.append("text")
            return super().write(text)

    monkeypatch.setattr(Decoder, "forward_paged", watched)
    monkeypatch.setattr(sys, "stdout", Out())
    assert main([folder, "--prompt", "tom has", "--max-tokens", "6", "--temperature", "0"]) == 0
    assert events.count("step") == 6
    assert events.count("text") >= 4  # a special token has no text
    assert "step" in events[events.index("text") + 3 :]


def test_chat_goes_through_the_template_and_samples_are_numbered(checkpoint, capsys):
    folder, _, tokenizer = checkpoint
    texts, rollouts = expected(
        checkpoint, apply_template(tokenizer, "tom has 3"), n=3, max_tokens=9, temperature=1.0, top_p=1.0
    )
    arguments = ["--chat", "--samples", "3", "--max-tokens", "9", "--temperature", "1", "--top-p", "1"]
    assert main([folder, "--prompt", "tom has 3", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [line for i, text in enumerate(texts, 1) for line in (f"--- {i} of 3", text)]
    assert len(set(texts)) == 3
    cut = sum(rollout.finish == "length" for rollout in rollouts)
    assert cut and f"; {cut} of 3 reached --max-tokens or the context; KV" in err
    assert err.startswith(f"{sum(len(rollout.tokens) for rollout in rollouts)} tokens in ")


def test_the_first_sample_is_streamed_while_the_others_wait_for_their_turn():
    texts = [TextStream(lambda tokens: "".join("abcdefgh"[token] for token in tokens)) for _ in range(3)]
    events = [
        Drew(0, 0, [0], [], []), Drew(0, 1, [1], [], []), Drew(0, 2, [2], [], []),
        SampleDone(0, 2, Rollout([2], [], "stop")), Drew(0, 0, [3], [], []), Drew(0, 1, [4], [], []),
        SampleDone(0, 0, Rollout([0, 3], [], "stop")), Drew(0, 1, [5], [], []),
        SampleDone(0, 1, Rollout([1, 4, 5], [], "length")),
    ]  # fmt: skip
    found = list(pieces_of_samples(events, texts))
    assert found == ["--- 1 of 3\n", "a", "d", "\n", "--- 2 of 3\nbe", "f", "\n", "--- 3 of 3\nc", "\n"]


def test_stop_strings_and_top_k(checkpoint, capsys):
    folder, _, tokenizer = checkpoint
    arguments = [folder, "--prompt", "tom has 3", "--max-tokens", "30", "--temperature", "0.9", "--top-p", "1"]
    (whole,), _ = expected(checkpoint, tokenizer.encode("tom has 3"), max_tokens=30, temperature=0.9)
    assert main(arguments) == 0 and capsys.readouterr().out == whole + "\n"
    words = whole.split()
    stop = " ".join(words[4:6])
    assert main([*arguments, "--stop", "not there", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    (narrow,), _ = expected(checkpoint, tokenizer.encode("tom has 3"), max_tokens=30, temperature=0.9, top_k=2)
    assert main([*arguments, "--top-k", "2"]) == 0
    assert capsys.readouterr().out == narrow + "\n" and narrow != whole


class Screen:
    """A terminal of `rows` lines, as far as generate speaks to one: text, and the codes of its status line."""

    def __init__(self, rows, columns=140):
        self.lines, self.rows, self.columns = [""] * rows, rows, columns
        self.row, self.column, self.region, self.saved = rows - 2, 0, (0, rows - 1), None
        self.scrolled = []

    def feed(self, text):
        for found in re.finditer(r"\x1b([78D])|\x1b\[([\d;]*[A-Za-z])|[\s\S]", text):
            character, (final, digits) = found[0], found.groups()
            if final == "7":
                self.saved = (self.row, self.column)
            elif final == "8":
                self.row, self.column = self.saved
            elif final == "D":
                column = self.column
                self.new_line()
                self.column = column
            elif digits:
                self.control(digits[-1], [int(n) for n in digits[:-1].split(";") if n])
            elif character == "\n":
                self.new_line()
            elif character == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1
                assert self.column <= self.columns

    def new_line(self):
        self.column = 0
        if self.row == self.region[1]:
            self.scrolled.append(self.lines.pop(self.region[0]))
            self.lines.insert(self.region[1], "")
        else:
            self.row += 1

    def control(self, letter, numbers):
        if letter == "A":
            self.row -= 1
        elif letter == "H":
            self.row, self.column = numbers[0] - 1, numbers[1] - 1
        elif letter == "K":
            self.lines[self.row] = "" if numbers == [2] else self.lines[self.row][: self.column]
        elif letter == "r":
            self.region = (numbers[0] - 1, numbers[1] - 1) if numbers else (0, self.rows - 1)
            self.row = self.column = 0
        else:
            raise AssertionError(f"unknown code {letter}")


class Terminal(io.StringIO):
    def __init__(self, screen):
        super().__init__()
        self.screen = screen

    def isatty(self):
        return True

    def write(self, text):
        self.screen.feed(text)
        return len(text)


@pytest.mark.parametrize("start", [2, 10])
def test_in_a_terminal_the_speed_stands_below_the_text_that_scrolls(checkpoint, monkeypatch, start):
    """Begun in the middle of the screen, and at its end."""
    folder, _, tokenizer = checkpoint
    screen = Screen(rows=12)
    screen.row, seen = start, []
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(StatusLine, "EVERY", 0)
    monkeypatch.setattr(StatusLine, "_size", lambda self: (screen.columns, screen.rows))
    monkeypatch.setattr(sys, "stdout", Terminal(screen))
    monkeypatch.setattr(sys, "stderr", Terminal(screen))
    show = StatusLine.show

    def watched(self, text):
        show(self, text)
        seen.append(screen.lines[-1])

    monkeypatch.setattr(StatusLine, "show", watched)
    arguments = ["--samples", "7", "--max-tokens", "5", "--temperature", "1", "--top-p", "1"]
    assert main([folder, "--prompt", "tom has 3", *arguments]) == 0
    texts, _ = expected(checkpoint, tokenizer.encode("tom has 3"), n=7, max_tokens=5, temperature=1.0, top_p=1.0)
    lines = [line for i, text in enumerate(texts, 1) for line in (f"--- {i} of 7", text)]
    assert all(re.fullmatch(r"(\d samples, )?\d+ tokens, [\d,]+ tokens/s", line) for line in seen) and len(seen) > 6
    *text, closing = [line for line in (*screen.scrolled, *screen.lines) if line]
    assert text == lines and re.match(r"\d+ tokens in .* on cpu", closing)
    assert screen.region == (0, 11)


def test_piped_text_is_clean_while_the_terminal_shows_the_speed(checkpoint, monkeypatch):
    folder, _, tokenizer = checkpoint
    screen, out = Screen(rows=3), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(StatusLine, "EVERY", 0)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Terminal(screen))
    assert main([folder, "--prompt", "tom has 3", "--max-tokens", "9", "--temperature", "0"]) == 0
    (text,), _ = expected(checkpoint, tokenizer.encode("tom has 3"), max_tokens=9, temperature=0)
    assert out.getvalue() == text + "\n"
    assert [line[:11] for line in screen.lines if line] == ["9 tokens in"]


def test_an_interrupt_keeps_what_was_drawn_and_leaves_the_terminal_as_it_was(checkpoint):
    """In a pseudo-terminal, with the signal that Ctrl-C sends."""
    folder = checkpoint[0]
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    arguments = [folder, "--prompt", "tom has 3", "--max-tokens", "55", "--temperature", "0"]
    slow = (
        "import signal, sys, time; import r1fast.generate as g, r1fast.rollout.steady\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from r1fast.model.decoder import Decoder as D; f = D.forward_paged\n"
        "D.forward_paged = lambda *a: (time.sleep(0.3), f(*a))[1]; sys.exit(g.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while shown.count(b"tokens/s") < 4:
        shown += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait(30) == 130
    text = shown.decode()
    assert "\x1b[1;23r" in text and "Traceback" not in text and "; interrupted; KV cache" in text
    assert text.rindex("\x1b[r") > text.rindex(";1H\x1b[2K")  # the whole screen scrolls again, after the last line


def test_who_reads_no_further_ends_it_quietly(checkpoint):
    command = [sys.executable, "-m", "r1fast.generate", checkpoint[0], "--prompt", "tom", "--samples", "3"]
    process = subprocess.Popen([*command, "--max-tokens", "50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 141 and "Traceback" not in errors and "Exception" not in errors


def test_the_prompt_can_be_piped_in(checkpoint, capsys, monkeypatch):
    folder, _, _ = checkpoint
    arguments = ["--max-tokens", "8", "--temperature", "0"]
    assert main([folder, "--prompt", "tom has 3 eggs", *arguments]) == 0
    direct = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("tom has 3 eggs\n"))
    assert main([folder, "--prompt", "-", *arguments]) == 0
    assert capsys.readouterr().out == direct


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "tom", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "tom", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "tom", "--samples", "0"], "n is 0"),
        (["--prompt", "tom", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "tom " * 64], "64 tokens leave no room"),
        (["--prompt", "tom", "--samples", "many"], "argument --samples: invalid int value"),
        ([], "required: --prompt"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(checkpoint, capsys, arguments, message):
    assert main([checkpoint[0], *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there(checkpoint, capsys):
    assert main([checkpoint[0], "--prompt", "tom", "--device", "cuda"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err


def test_folders_that_cannot_be_used(checkpoint, tmp_path, capsys):
    model = checkpoint[1]
    assert main([str(tmp_path / "nothing"), "--prompt", "tom"]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err
    save(model, None, tmp_path / "bare")
    assert main([str(tmp_path / "bare"), "--prompt", "tom"]) == 2
    assert "there is no tokenizer" in capsys.readouterr().err
    plain = build_word_tokenizer(WORDS)
    plain.chat_template = None
    save(model, plain, tmp_path / "plain")
    assert main([str(tmp_path / "plain"), "--prompt", "tom", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_the_module_runs_and_help_needs_no_torch():
    code = (
        "import sys, r1fast.generate as g\ntry: g.main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--max-tokens" in done.stdout
    done = subprocess.run([sys.executable, "-m", "r1fast.generate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30), st.text(max_size=12))
def test_pieces_join_to_the_whole_text_and_never_split_a_character(noise, text):
    """Tokens are bytes here: characters of several tokens, and byte strings that are no text at all."""

    def text_of(tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    for tokens in (list(text.encode()), list(text.encode()) + noise):
        assert "".join(pieces(tokens, text_of)) == text_of(tokens)
    assert all(
        piece in text and "\ufffd" not in piece for piece in pieces(text.replace("\ufffd", "").encode(), text_of)
    )


def test_pieces_of_words_keep_their_spaces_and_drop_special_tokens():
    tokenizer = build_word_tokenizer(WORDS)
    tokens = tokenizer.encode("tom has <think> 3 </think> eggs <eos>")
    found = list(pieces(tokens, lambda ids: decode(tokenizer, ids)))
    assert found == ["tom", " has", " <think>", " 3", " </think>", " eggs"]
