"""python -m r1fast.generate MODEL_DIR --prompt TEXT: for a person to try what was trained, from any checkpoint.

One sample is printed while it is drawn, several once they are all there. The text goes to standard output, the counts
and the speed to standard error, so that the output can be piped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from r1fast.config import CommandParser, UserError

if TYPE_CHECKING:  # torch takes a second to import; --help and a wrong option should not wait for it
    from r1fast.rollout.sampler import Sampler, SamplingParams
    from r1fast.types import Prompt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m r1fast.generate", description="Print completions of a prompt.")
    parser.add_argument("model", metavar="MODEL_DIR", help="a Llama, Qwen2 or Qwen3 folder in Hugging Face format")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="'-' reads it from standard input")
    parser.add_argument("--samples", type=int, default=1, metavar="K")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95; 1 is off")
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
        print(file=sys.stderr)
        return 130
    return 0


def generate(options: argparse.Namespace) -> None:
    """Load, sample, print. UserError for whatever the user can put right."""
    from r1fast.device import choose_device
    from r1fast.model.tokenizer import decode, eos_token_ids
    from r1fast.model.weights import load
    from r1fast.rollout.sampler import Sampler, SamplingParams

    device = choose_device(options.device)
    text = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    model, tokenizer = load(options.model, device=device, dtype="auto")
    prompt = encode(tokenizer, text, options)
    params = SamplingParams(options.samples, options.max_tokens, options.temperature, options.top_p, seed=options.seed)
    sampler = Sampler(model, eos_token_ids(tokenizer, model.config.eos_token_ids))

    def text_of(tokens: list[int]) -> str:
        return decode(tokenizer, tokens)

    began = time.perf_counter()
    count = (print_one if options.samples == 1 else print_all)(sampler, prompt, params, text_of)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s on {device}", file=sys.stderr)


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


def print_one(sampler: Sampler, prompt: Prompt, params: SamplingParams, text_of: Callable[[list[int]], str]) -> int:
    """Text as it is drawn; returns the number of tokens."""
    tokens: list[int] = []

    def drawn() -> Iterator[int]:
        for token in sampler.stream_tokens(prompt, params):
            tokens.append(token)
            yield token

    from r1fast.rollout.text import pieces

    for piece in pieces(drawn(), text_of):
        print(piece, end="", flush=True)
    print(flush=True)
    return len(tokens)


def print_all(sampler: Sampler, prompt: Prompt, params: SamplingParams, text_of: Callable[[list[int]], str]) -> int:
    (group,) = sampler.sample([prompt], params)
    for number, rollout in enumerate(group.rollouts, 1):
        print(f"--- {number} of {params.n}: {len(rollout.tokens)} tokens, {rollout.finish}")
        print(text_of(rollout.tokens), flush=True)
    return sum(len(rollout.tokens) for rollout in group.rollouts)


if __name__ == "__main__":
    sys.exit(main())
