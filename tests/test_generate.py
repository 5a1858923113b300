"""The command a person tries a checkpoint with: what it prints, that it streams, and how it says what is wrong."""

import io
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.generate import main
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.tokenizer import apply_template, build_word_tokenizer, decode
from r1fast.model.weights import save
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.rollout.text import pieces

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
    lines = capsys.readouterr().out.splitlines()
    assert lines[1::2] == texts
    assert len(set(texts)) == 3
    headers = [f"--- {i} of 3: {len(r.tokens)} tokens, {r.finish}" for i, r in enumerate(rollouts, 1)]
    assert lines[0::2] == headers


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
