"""Prompts, completions and their boundary, with a word-level, a byte-level BPE and a sentence-piece-like tokenizer."""

from __future__ import annotations

import json

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from r1fast.config import UserError
from r1fast.model.tokenizer import (
    apply_template,
    build_word_tokenizer,
    decode,
    encode_completion,
    eos_token_ids,
    set_template,
    template_text,
)
from r1fast.model.weights import load_tokenizer

TEXT = "<think> </think> <answer> </answer> Tom has eggs how many ? . 18 3 15 - = mon 鸡蛋 有"
WORDS = TEXT.split()
LINES = [
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.",
    " <think> reasoning process here </think> <answer> answer here </answer>. User: What is 2 + 3? Assistant:",
    " <think> 2 + 3 = 5\nso it is 5 </think> <answer> 5 </answer>",
    "How many eggs are left?  18 - 3 = 15. 他有多少个鸡蛋？ \\boxed{15}\n\n",
] * 3
COMPLETIONS = [
    "<think> 2 + 3 = 5 </think> <answer> 5 </answer>",
    "<think>\nHow many eggs?\n</think>\n\n<answer>15</answer>",
    "The answer is \\boxed{15}.",
    "鸡蛋 有 15",
    "5",
    "two  spaces inside and one last ",
]


def byte_level(**special):
    """GPT-2's, Qwen's and Llama 3's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    )


def sentence_piece():
    """Llama 2's kind: a space is a letter, one is put before every text, and every text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer, name):
    if name == "chatml":
        tokenizer.chat_template = CHATML
    else:
        set_template(tokenizer, name)
    return tokenizer


TOKENIZERS = {
    "byte-level, paper": lambda: with_template(byte_level(), "paper"),
    "byte-level, chatml": lambda: with_template(byte_level(), "chatml"),
    "sentence-piece, paper": lambda: with_template(sentence_piece(), "paper"),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


# -- prompts --------------------------------------------------------------------------------------------------


def test_the_paper_template_says_what_the_paper_says():
    tokenizer = with_template(byte_level(), "paper")
    text = template_text(tokenizer, "What is 2 + 3?")
    assert text == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is 2 + 3? Assistant:"
    )
    assert template_text(tokenizer, " Add 2 and 3 ").endswith(" User: Add 2 and 3. Assistant:")
    assert tokenizer.decode(apply_template(tokenizer, "What is 2 + 3?")) == text


def test_prompts_are_what_the_saved_tokenizer_makes_of_them(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "How many eggs?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(apply_template(tokenizer, "How many eggs?")) == expected


def test_conversations_go_on_after_an_answer():
    tokenizer = with_template(byte_level(), "paper")
    turns = [("system", "Be kind."), ("user", "2 + 3?"), ("assistant", "5"), ("user", "And 1 more")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("</answer>. Be kind. User: 2 + 3? Assistant: 5<|im_end|> User: And 1 more. Assistant:")


def test_paper_begins_with_bos_where_the_tokenizer_does():
    assert apply_template(with_template(sentence_piece(), "paper"), "x")[0] == 1
    named = byte_level(bos_token="<|bos|>")  # it has one, and never puts it: as GPT-2's
    assert named.bos_token_id not in apply_template(with_template(named, "paper"), "x")


# -- completions and their boundary ---------------------------------------------------------------------------


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_completions_come_back(tokenizer, completion):
    tokens = encode_completion(tokenizer, completion)
    assert tokens[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in tokens[:-1]
    assert decode(tokenizer, tokens) == completion


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_prompt_and_completion_are_tokenised_as_the_whole_text(tokenizer, completion):
    """Training sees what a model of whole texts would write: no token straddles the boundary."""
    prompt = template_text(tokenizer, "How many eggs?")
    space = "" if prompt[-1].isspace() else " "
    whole = tokenizer.encode(prompt + space + completion, add_special_tokens=False)
    joined = [*apply_template(tokenizer, "How many eggs?"), *encode_completion(tokenizer, completion)]
    assert joined == [*whole, tokenizer.eos_token_id]


def test_the_assistant_turn_of_the_paper_template_is_the_encoded_completion():
    tokenizer = with_template(byte_level(), "paper")
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": COMPLETIONS[0]}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole == [*apply_template(tokenizer, "2 + 3?"), *encode_completion(tokenizer, COMPLETIONS[0])]


def test_decoding_drops_special_tokens_and_keeps_the_tags():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    set_template(tokenizer, "paper")
    tokens = tokenizer.encode("<|im_start|> <think> 5 </think> 5<|im_end|><|endoftext|>", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<think>") in tokens
    assert decode(tokenizer, tokens) == "<think> 5 </think> 5"


# -- the word tokenizer ---------------------------------------------------------------------------------------


def test_words_are_tokens_and_come_back_exactly(tmp_path):
    tokenizer = build_word_tokenizer(WORDS)
    assert len(tokenizer) == 5 + len(WORDS)
    prompt = apply_template(tokenizer, "Tom has 18 eggs . how many ?")
    assert " ".join(tokenizer.convert_ids_to_tokens(prompt)) == "<user> Tom has 18 eggs . how many ? <asst>"
    answer = "<think> 18 mon - 3 = 15 </think> <answer> 15 </answer>"
    tokens = encode_completion(tokenizer, answer)
    assert len(tokens) == len(answer.split()) + 1 and tokens[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, tokens) == answer
    assert decode(tokenizer, [*tokens, tokenizer.pad_token_id]) == answer
    assert decode(tokenizer, encode_completion(tokenizer, "鸡蛋 有 ? .")) == "鸡蛋 有 ? ."
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        encode_completion(theirs, answer) == tokens and apply_template(theirs, "Tom has 18 eggs . how many ?") == prompt
    )
    assert decode(theirs, tokens) == answer == theirs.decode(tokens, skip_special_tokens=True)


def test_unknown_words_are_marked_and_broken_ones_refused():
    tokenizer = build_word_tokenizer([*WORDS, "Tom"])  # a double is one token
    assert len(tokenizer) == 5 + len(WORDS)
    assert apply_template(tokenizer, "zebra") == (3, tokenizer.unk_token_id, 4)
    with pytest.raises(ValueError, match="'two words' is no single word"):
        build_word_tokenizer(["two words"])
    with pytest.raises(ValueError, match="must include <unk>"):
        build_word_tokenizer(WORDS, specials=("<pad>", "<eos>"))


# -- what is missing is said ----------------------------------------------------------------------------------


def test_templates_and_ends_that_are_not_there():
    tokenizer = byte_level(eos_token=None)
    with pytest.raises(UserError, match="has no chat template; set"):
        apply_template(tokenizer, "x")
    with pytest.raises(UserError, match="'checkpoint', but"):
        set_template(tokenizer, "checkpoint")
    with pytest.raises(UserError, match="'chatml' is unknown; give paper, words or checkpoint"):
        set_template(tokenizer, "chatml")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_completion(tokenizer, "x")
    assert eos_token_ids(tokenizer, (4, 4, 2)) == (4, 2)
    assert eos_token_ids(byte_level(), (4, 2)) == (2, 4)
    assert eos_token_ids(None) == ()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_tokenizer_of_ones_own_is_read_as_saved_whatever_the_model(tmp_path, architecture):
    """AutoTokenizer would take a Qwen2 model's for Qwen2's, in which no word of ours is known."""
    tokenizer = build_word_tokenizer(["tom", "has", "3"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    assert load_tokenizer(tmp_path).encode("tom has 3") == tokenizer.encode("tom has 3") == [5, 6, 7]
