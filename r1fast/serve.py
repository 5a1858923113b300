"""`python -m r1fast.serve MODEL_DIR`: an OpenAI-compatible server (extra `serve`).

/v1/chat/completions, /v1/completions and /v1/models, with streaming, n, logprobs, stop and seed; all clients share one
continuously batched sampler. It listens on this machine alone unless --host says otherwise, and asks for a key where
R1FAST_API_KEY is set in its environment. Ctrl-C ends it: what is under way is given up.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

from r1fast.config import CommandParser, UserError

KEY = "R1FAST_API_KEY"
GRACE = 3  # seconds that open connections have to end after Ctrl-C


def parser() -> CommandParser:
    p = CommandParser(prog="python -m r1fast.serve", description=__doc__.split("\n\n")[1])
    p.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint in Hugging Face format")
    p.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one, which is told")
    p.add_argument("--name", help="of the model, for clients; default: the folder's")
    p.add_argument("--template", choices=["paper", "checkpoint", "words"], default="checkpoint")
    p.add_argument("--max-seqs", type=int, default=256, metavar="N", help="decoding together (default 256)")
    p.add_argument("--max-requests", type=int, default=64, metavar="N", help="under way at once (default 64)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="of one completion; default: the context's room")
    p.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of one request (default 1048576)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    return p


def _check(args: argparse.Namespace) -> None:
    for name in ("max_seqs", "max_requests", "max_tokens", "max_body"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port is {args.port}, it must be from 0 to 65535")
    if os.environ.get(KEY) == "":
        raise UserError(f"{KEY} is set but empty; give it a key, or unset it")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port which is taken is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)  # who connects while the model is read waits instead of being refused
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None
    return found


def service_of(args: argparse.Namespace) -> Any:
    """The model behind the routes."""
    from r1fast.device import choose_device, choose_dtype
    from r1fast.model.tokenizer import eos_token_ids, set_template
    from r1fast.model.weights import load
    from r1fast.rollout.sampler import Sampler
    from r1fast.serving.app import Limits, Service
    from r1fast.serving.engine import EngineThread

    device = choose_device(args.device)
    model, tokenizer = load(args.model, device=device, dtype=choose_dtype(args.dtype, device))
    if tokenizer is None:
        raise UserError(f"{args.model}: there is no tokenizer beside the weights; save one into the folder")
    if args.template != "checkpoint":
        set_template(tokenizer, args.template)
    ends = eos_token_ids(tokenizer, model.config.eos_token_ids)
    engine = EngineThread(Sampler(model, ends, max_seqs=args.max_seqs, tokenizer=tokenizer))
    limits = Limits(args.max_body, args.max_tokens, args.max_requests)
    return Service(model, tokenizer, engine, args.name or args.model.resolve().name, limits)


def serve(args: argparse.Namespace) -> None:
    _check(args)
    try:
        import uvicorn

        from r1fast.serving.app import build
    except ImportError as error:
        raise UserError(f"the server's packages are missing ({error}); pip install 'r1fast[serve]'") from None
    listening = listen(args.host, args.port)
    with listening:
        service = service_of(args)
        key = os.environ.get(KEY)
        config = uvicorn.Config(build(service, key), log_level="warning", timeout_graceful_shutdown=GRACE)

        class Server(uvicorn.Server):
            def handle_exit(self, number: int, frame: Any) -> None:
                service.engine.stop()  # requests end now, so that their connections do
                super().handle_exit(number, frame)

        service.engine.start()
        host, port = listening.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        if key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            print(f"warning: {host} can be reached by others and {KEY} is not set", file=sys.stderr)
        print(f"{service.name} at {where}; Ctrl-C ends it", file=sys.stderr, flush=True)
        try:
            Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises the signal again when all is closed
            pass
        finally:
            service.engine.join()
        print("ended", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        serve(parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the model was being loaded
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
