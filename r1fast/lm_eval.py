"""`python -m r1fast.lm_eval --model r1fast --model_args pretrained=MODEL_DIR --tasks ...`: the evaluation harness on
our engine.

lm-evaluation-harness (extra `eval`) has hundreds of tasks; this module registers a model `r1fast` with it and hands the
command line on to it. It has no entry points for models, so its own `lm_eval` command does not know ours; all of its
options are the same. Scores equal those of its `hf` model on the same checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:  # told by `main`; whoever imports the module hears it as it is
    if __name__ != "__main__":
        raise
    sys.exit(f"error: the evaluation harness is missing ({error}); pip install 'r1fast[eval]'")

from r1fast.config import UserError

MAX_GEN_TOKS = 256  # as of `hf`, where a task says nothing


@register_model("r1fast")
class R1Fast(TemplateLM):
    """Log-likelihoods by packed forward passes, generation by the paged sampler with continuous batching.

    model_args: pretrained (a checkpoint folder), dtype (auto, float32, bfloat16), device, max_length, add_bos_token,
    prefix_token_id, template (checkpoint, paper or words), max_seqs (sequences that decode together)."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        template: str = "checkpoint",
        max_seqs: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """batch_size and max_batch_size are the harness's and have no meaning here: packs are sized by tokens."""
        super().__init__()
        from r1fast.device import choose_device, choose_dtype
        from r1fast.model.tokenizer import CHAT_TEMPLATES, eos_token_ids
        from r1fast.model.weights import load
        from r1fast.rollout.sampler import Sampler

        device = choose_device(device.partition(":")[0])
        self.model, self.tokenizer = load(pretrained, device=device, dtype=choose_dtype(dtype, device))
        if self.tokenizer is None:
            raise UserError(f"{pretrained}: there is no tokenizer beside the weights; save one into the folder")
        if template != "checkpoint":
            self.tokenizer.chat_template = CHAT_TEMPLATES[template]
        self.pretrained, self.add_bos_token, self._prefix = pretrained, add_bos_token, prefix_token_id
        self.max_length = int(max_length or self.model.config.max_positions)
        ends = eos_token_ids(self.tokenizer, self.model.config.eos_token_ids)
        self.sampler = Sampler(self.model, ends, max_seqs=max_seqs, tokenizer=self.tokenizer)

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self._prefix if self._prefix is not None else bos if bos is not None else self.tokenizer.eos_token_id

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add = False  # it begins with the token already
        return self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add}))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """For the results' `config`."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
        }

    # -- log-likelihoods --------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Contexts are cut from the left to what the model can see. Requests that differ in their last token alone (the
        options of a question) are forwarded once."""
        from r1fast.model.scoring import score

        wanted: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            wanted.setdefault(tuple(whole[:-1]), []).append(index)
        asked = [[requests[index][2] for index in ones] for ones in wanted.values()]
        result: list[tuple[float, bool] | None] = [None] * len(requests)
        for ones, told in zip(wanted.values(), score(self.model, list(wanted), asked), strict=True):
            for index, scored in zip(ones, told, strict=True):
                result[index] = (sum(scored.logprobs), all(scored.greedy))
        for (text, _, _), told in zip(requests, result, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, told)
        return result

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The whole text in windows of the context's length, each token predicted once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- generation -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """All requests at once, whatever their settings: the sampler batches them as they come and go."""
        prompts, params, stops = [], [], []
        for number, request in enumerate(requests):
            context, asked = request.args
            prompt, one, stop = self._request(context, asked, seed=number)
            prompts.append(prompt)
            params.append(one)
            stops.append(stop)
        texts = []
        for request, group, stop in zip(requests, self.sampler.sample(prompts, params), stops, strict=True):
            text = self.tokenizer.decode(group.rollouts[0].tokens, skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _request(self, context: str, asked: dict[str, Any], seed: int) -> tuple[list[int], Any, list[str]]:
        """Tokens, sampling parameters and stop strings of a request in the harness's words."""
        from r1fast.rollout.sampler import SamplingParams

        given = normalize_gen_kwargs(asked, self.max_gen_toks)
        until = handle_stop_sequences(given.pop("until", None), eos=None)
        limit = given.pop("max_gen_toks")
        if limit >= self.max_length:
            raise UserError(
                f"a task wants {limit} tokens, but the context has {self.max_length}; lower max_gen_toks (--gen_kwargs)"
            )
        sampled = given.pop("do_sample", False)
        temperature = float(given.pop("temperature", None) or (1.0 if sampled else 0.0))
        top_p, top_k = float(given.pop("top_p", None) or 1.0), int(given.pop("top_k", None) or 0)
        if given:
            raise UserError(f"the sampler of r1fast knows no {', '.join(sorted(given))}; leave it out of --gen_kwargs")
        tokens = self.tok_encode(context)[-(self.max_length - limit) :]
        stop = [text for text in until if text]
        heat = temperature if sampled else 0.0
        params = SamplingParams(1, limit, heat, top_p, top_k, seed=seed, stop=tuple(stop))
        return tokens, params, stop


def on_this_machine(arguments: list[str]) -> list[str]:
    """The command line with `--device cpu` where it asks for a model, names no device, and there is no GPU: without it
    the harness takes cuda for granted."""
    import torch

    given = {argument.partition("=")[0] for argument in arguments}
    if not given & {"--model", "-M"} or given & {"--device", "--config", "-C"} or torch.cuda.is_available():
        return arguments
    return [*arguments, "--device", "cpu"]


def main() -> int:
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = on_this_machine(sys.argv[1:])
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
