"""Text as it arrives: characters of several tokens, and stop strings across every kind of boundary."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from r1fast.model.tokenizer import build_word_tokenizer, decode, silent_tokens
from r1fast.rollout.text import StopStrings, TextStream, shown_text

WORDS = ["stop", "st", "op", "a", "é", "你好", "\U0001f600"]


def text_of_bytes(tokens):
    """Tokens are bytes: a character takes one to four of them, and some strings of bytes are no text."""
    return bytes(tokens).decode("utf-8", errors="replace")


def shortest(tokens, stops, min_tokens=0):
    """By definition: how many tokens are kept, or None. An occurrence counts with the token that completes it."""
    before = ""
    for count in range(1, len(tokens) + 1):
        text = text_of_bytes(tokens[:count]).rstrip("\ufffd")
        new = any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in stops)
        if new and count >= min_tokens:
            return count
        before = text
    return None


def kept(tokens, stops, min_tokens=0, text_of=text_of_bytes):
    """(tokens kept or None, text shown): the pieces that were taken on the way, joined."""
    stream, shown = TextStream(text_of, stops, min_tokens), ""
    for count, token in enumerate(tokens, 1):
        if stream.push(token):
            return count, shown + stream.take() + stream.end()
        shown += stream.take()
    return None, shown + stream.end()


byte_texts = st.lists(st.sampled_from([*WORDS, *"stop aé"]), max_size=12).map(
    lambda parts: list("".join(parts).encode())
)
noise = st.lists(st.sampled_from([*b"stop a", 0xE4, 0xBD, 0xA0, 0xC3, 0xA9, 0xFF]), max_size=20)


@settings(max_examples=400, deadline=None)
@given(
    byte_texts, noise, st.lists(st.sampled_from([*WORDS, "pst", "aa", "你", "oop", "p", "é "]), min_size=1, max_size=3),
    st.integers(0, 8),
)  # fmt: skip
@example(list("a你好".encode()), [], ["你"], 0)
@example(list(b"ssto"), list(b"p"), ["stop"], 0)
@example(list(b"stop"), list(b"xstop"), ["stop"], 5)
def test_the_first_token_that_completes_a_stop_string_is_the_last(text, after, stops, min_tokens):
    tokens = text + after
    count, shown = kept(tokens, stops, min_tokens)
    assert count == shortest(tokens, stops, min_tokens)
    if count is None:
        assert shown == text_of_bytes(tokens)
    else:
        whole = text_of_bytes(tokens[:count])
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
        if not min_tokens:
            assert not any(stop in shown for stop in stops)
    assert shown == shown_text(tokens, text_of_bytes, stops, min_tokens)
    assert watched(tokens, StopStrings(text_of_bytes, stops, min_tokens)) == count


def watched(tokens, stops):
    """Where a watch that puts tokens off ends them."""
    watch = stops.watch()
    for count, token in enumerate(tokens, 1):
        if watch.push(token):
            return count
        watch.take()
    return None


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer as real ones are, of a few hundred tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["the answer is <answer> 42 </answer>\n\nUser: 你好 é naïve tokens, and the other answers"] * 3
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_tokens_that_are_put_off_change_nothing_and_save_most_decoding(byte_level):
    rng, calls = random.Random(0), []

    def text_of(tokens):
        calls.append(tokens)
        return decode(byte_level, tokens)

    many = [[rng.randrange(len(byte_level)) for _ in range(150)] for _ in range(60)]
    many += [byte_level.encode("so the answer is <answer> 42 </answer>\n\nUser: 你好")] * 3
    ended, all_stops = 0, [("</answer>",), ("你",), ("er ", "\n\n"), ("s",), ("e t", "42 <")]
    for stops in all_stops:
        one = StopStrings(text_of, stops)
        for tokens in many:
            count, _ = kept(tokens, stops, text_of=lambda ids: decode(byte_level, ids))
            assert watched(tokens, one) == count
            ended += count is not None
    assert ended > 60
    one = StopStrings(text_of, ("</answer>",))
    for tokens in many:
        watched(tokens, one)
    calls.clear()
    for tokens in many:
        watched(tokens, one)
    assert len(calls) < sum(map(len, many))  # two a token without


@settings(max_examples=200, deadline=None)
@given(byte_texts, st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
def test_nothing_is_shown_that_is_taken_back(text, stops):
    """After every token, what has been shown is a beginning of what is shown in the end."""
    _, final = kept(text, stops)
    stream, shown = TextStream(text_of_bytes, stops), ""
    for token in text:
        done = stream.push(token)
        shown += stream.take()
        assert final.startswith(shown)
        if done:
            break


def test_several_strings_in_one_token():
    """The one that begins first counts, of those the longest: it says where the text ends."""

    def text_of(tokens):
        return "".join({1: "one two three", 2: "x"}[token] for token in tokens)

    assert kept([2, 1], ["three", "two"], text_of=text_of) == (2, "xone ")
    stream = TextStream(text_of, ["two", "two three"])
    assert stream.push(1) == "two three" and stream.stopped == "two three"


def test_words_keep_their_spaces_and_special_tokens_are_silent():
    tokenizer = build_word_tokenizer(["tom", "has", "eggs", "</think>"])
    tokens = tokenizer.encode("tom has <eos> eggs </think> tom")

    def text_of(ids):
        return decode(tokenizer, ids)

    assert shown_text(tokens, text_of) == "tom has eggs </think> tom"
    assert kept(tokens, ["has eggs"], text_of=text_of) == (4, "tom ")
    assert kept(tokens, ["</think>"], text_of=text_of) == (5, "tom has eggs ")
    assert "<eos>" in silent_tokens(tokenizer).values() and "</think>" not in silent_tokens(tokenizer).values()


@pytest.mark.parametrize("length", [10, 1000])
def test_a_token_costs_the_same_however_long_the_text_is(length):
    seen = []

    def text_of(tokens):
        seen.append(len(tokens))
        return "ab" * len(tokens)

    stream = TextStream(text_of, ["stop"])
    for _ in range(length):
        stream.push(0)
        stream.take()
    assert max(seen) <= 2 and len(seen) <= 2 * length
