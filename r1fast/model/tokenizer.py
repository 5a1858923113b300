"""Text to tokens and back: chat templates, the boundary between prompt and completion, and the tiny word tokenizer.

Any Hugging Face tokenizer serves. What the model is asked is always `apply_template(tokenizer, text)`, the tokens of
the tokenizer's own chat template up to where the assistant begins to speak, so a saved checkpoint prompts itself the
same way through `AutoTokenizer.apply_chat_template`.

The boundary. A prompt through `paper` ends in `Assistant:`, and a completion there begins with one space
(` <think> ...`): byte-level BPE gives the space to the word after it and sentence-piece splits before it, so the
tokens of prompt and completion together are those of the whole text, and the model sees at sampling what it saw in
training. Templates that end in white space or a special token (ChatML's `assistant\\n`, `words`' `<asst>`) already hold
their boundary and get none. `encode_completion` adds that space and `decode` takes it away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from r1fast.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# DeepSeek-R1 (arXiv 2501.12948), table 1. The paper's "prompt" is followed by a full stop; a prompt that already ends
# a sentence gets no second one. `bos` is filled in by `set_template`, for tokenizers that begin every text with it.
_PAPER = (
    "{%- set bos = '' -%}{{ bos }}"
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>."
    "{%- for message in messages -%}"
    "{%- set text = message['content'] | trim -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ ' User: ' + text + ('' if text and text[-1] in '.?!。？！' else '.') }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ ' Assistant: ' + text + eos_token }}"
    "{%- elif message['role'] == 'system' -%}"
    "{{ ' ' + text }}"
    "{%- else -%}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}"
)
_WORDS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<user> ' + message['content'] + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<asst> ' + message['content'] + ' ' + eos_token + ' ' }}"
    "{%- else -%}"
    "{{ raise_exception('roles are user and assistant') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<asst>' }}{%- endif -%}"
)
CHAT_TEMPLATES = {"paper": _PAPER, "words": _WORDS}
_NO_BOS = "{%- set bos = '' -%}"

PAD, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<asst>"
SPECIALS = (PAD, EOS, UNKNOWN, USER, ASSISTANT)
_KEPT = ("<think>", "</think>", "<answer>", "</answer>")  # content, even where a tokenizer calls them special


def build_word_tokenizer(words: Iterable[str], specials: Sequence[str] = SPECIALS) -> PreTrainedTokenizerFast:
    """One token a word, split at white space and joined by single spaces, with the `words` chat template.

    ids: `specials` first, in order (they must include <pad>, <eos> and <unk>), then `words` in order, doubles once.
    A word that is not among them becomes <unk>. Tags such as <think> are words, so that decoding keeps them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    missing = {PAD, EOS, UNKNOWN} - set(specials)
    if missing:
        raise ValueError(f"specials must include {', '.join(sorted(missing))}")
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*specials, *words)))}
    broken = [word for word in vocabulary if not word or len(word.split()) != 1]
    if broken:
        raise ValueError(f"{broken[0]!r} is no single word")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[token for token in specials if token not in named.values()],
        clean_up_tokenization_spaces=False,  # "how many ?" must come back with its space
        chat_template=_WORDS,
        **named,
    )


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `name` the tokenizer's chat template: "paper", "words", or "checkpoint" for the one it came with.

    `paper` begins with the beginning-of-sequence token exactly where the tokenizer begins plain text with it.
    UserError: an unknown name, or "checkpoint" where the tokenizer has none.
    """
    if name == "checkpoint":
        if not tokenizer.chat_template:
            raise UserError("model.template is 'checkpoint', but the checkpoint's tokenizer has no chat template")
        return
    if name not in CHAT_TEMPLATES:
        raise UserError(f"model.template {name!r} is unknown; give {', '.join(CHAT_TEMPLATES)} or checkpoint")
    template = CHAT_TEMPLATES[name]
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        template = template.replace(_NO_BOS, "{%- set bos = bos_token -%}")
    tokenizer.chat_template = template


def template_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The prompts as text: what the user said in the chat template, up to where the assistant begins."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; set model.template to paper")
    talks = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=False) if talks else []


def template_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`template_texts` of one."""
    return template_texts(tokenizer, [text])[0]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False).input_ids if texts else []


def apply_templates(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The prompts as tokens: those of `tokenizer.apply_chat_template(..., add_generation_prompt=True)`.

    Many at once, because a call costs as much as encoding ten short rows."""
    return [tuple(tokens) for tokens in _encode(tokenizer, template_texts(tokenizer, texts))]


def apply_template(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """`apply_templates` of one."""
    return apply_templates(tokenizer, [text])[0]


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """What the model should say after `apply_templates`: tokens of each text and the end-of-sequence token.

    Encoded behind the end of the prompt, because sentence-piece tokenizers treat the beginning of a text differently
    from its middle; a text gets the boundary's space (see the module) unless it begins with white space itself.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a completion could never end")
    anchor, before, separator = _boundary(tokenizer, tokenizer.chat_template)
    spaced = [text if text[:1].isspace() else separator + text for text in texts]
    found = []
    for text, whole in zip(spaced, _encode(tokenizer, [anchor + text for text in spaced]), strict=True):
        if tuple(whole[: len(before)]) == before:
            tokens = whole[len(before) :]
        else:  # a merge across the boundary: sampling could never produce it
            tokens = tokenizer.encode(text, add_special_tokens=False)
        found.append([*tokens, tokenizer.eos_token_id])
    return found


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`encode_completions` of one."""
    return encode_completions(tokenizer, [text])[0]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Tokens of a completion as text: special tokens dropped, think and answer tags kept, the boundary's space gone."""
    dropped = _silent(tokenizer, len(tokenizer))
    text = tokenizer.decode([token for token in tokens if token not in dropped], skip_special_tokens=False)
    return text.removeprefix(" ")


def silent_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens that `decode` drops, id -> how the tokenizer writes them."""
    return _silent(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)  # the added tokens of a real tokenizer take longer to list than a completion to decode
def _silent(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Every special token but the tags. `size` is the vocabulary's, so that tokens added later are seen."""
    added = tokenizer.added_tokens_decoder
    return {index: token.content for index, token in added.items() if token.special and token.content not in _KEPT}


def eos_token_ids(tokenizer: PreTrainedTokenizerBase | None, configured: Iterable[int] = ()) -> tuple[int, ...]:
    """Every id that ends generation: the tokenizer's, then `configured` (`model.config.eos_token_ids`), each once."""
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys((*own, *configured)))


@lru_cache(maxsize=8)  # rendering and encoding a prompt for every row would be most of the time of reading them
def _boundary(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, tuple[int, ...], str]:
    """(what every prompt ends in, its tokens, what goes between it and a completion: a space or nothing)."""
    if not template:
        return "", (), ""
    messages = [{"role": "user", "content": "x"}]
    question = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    prompt = template_text(tokenizer, "x")
    anchor = prompt.removeprefix(question) or prompt  # a template without a generation prompt ends in the question
    held = anchor[-1:].isspace() or anchor.endswith(tuple(tokenizer.all_special_tokens))
    return anchor, tuple(tokenizer.encode(anchor, add_special_tokens=False)), "" if held else " "
