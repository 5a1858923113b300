"""The first code in the sandbox: sets the limits that only hold from inside, says that it stands, and gives way.

    harness.py stdio   runs solution.py as a program, on the real standard input and output
    harness.py serve   loads solution.py and answers calls of its functions, asked over one pipe, answered over another
    harness.py check   runs a test whose candidate is the `serve` of another sandbox, and says how it ended
    harness.py probe   does nothing: whether it can be started is the question

The second argument is JSON: {"limits": {RLIMIT_...: value}, "pipes": {name: descriptor}, "arguments": [file names]}.
Only `check` and a problem's own checker (a `stdio`) know what is right, and no untrusted code runs in them. What
`serve` says is a claim about a result and nothing more: a program that takes the pipe over can send no other thing.
"""

import contextlib
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PIPES = {}
ARGUMENTS = []


def set_limits(limits):
    """Hard and soft at once: nothing in here can raise them again."""
    import resource

    for name, value in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = value if hard < 0 else min(value, hard)
        resource.setrlimit(which, (value, value))


def close_others(kept):
    """What the sandbox's own tool may have left open is no business of the program."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def ready():
    os.write(PIPES["ready"], b"R")
    os.close(PIPES["ready"])


def module(name, source, file):
    """A new module called `name` that has run `source`; it is in sys.modules while it runs, as any program's is."""
    made = type(sys)(name)
    made.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = made
    exec(compile(source, file, "exec"), made.__dict__)
    return made


def read(name):
    with open(os.path.join(HERE, name), "rb") as file:
        return file.read()  # bytes: what is no text is a syntax error of the program


def stdio():
    source = read("solution.py")
    sys.argv = ["solution.py", *(os.path.join(HERE, name) for name in ARGUMENTS)]
    ready()
    module("__main__", source, "solution.py")


def find(solution, name):
    """The function, or the method of a class `Solution`, as judges of competition sites call it."""
    if hasattr(solution, name):
        return getattr(solution, name)
    return getattr(solution.Solution(), name)


def serve():
    import plain

    # Kept as locals: a program that patches builtins or this module changes only what it says, which it may anyway.
    pack, unpack, dump, load, NotPlain = plain.pack, plain.unpack, plain.dump, plain.load, plain.NotPlain
    source = read("solution.py")
    requests, replies = os.fdopen(PIPES["requests"], "rb"), os.fdopen(PIPES["replies"], "wb", buffering=0)
    ready()
    solution, broken = None, None
    try:
        solution = module("solution", source, "solution.py")
    except BaseException as error:
        broken = error
    for line in requests:
        request = load(line)
        try:
            if broken is not None:
                raise broken
            arguments = [unpack(value) for value in request["arguments"]]
            keywords = {name: unpack(value) for name, value in request["keywords"].items()}
            answer = {"result": pack(find(solution, request["function"])(*arguments, **keywords))}
            reply = dump(answer)
        except NotPlain as error:
            reply = dump({"refused": str(error)})
        except BaseException as error:
            reply = dump({"raised": type(error).__name__, "message": str(error)[:500]})
        replies.write(reply)


class CandidateFailed(Exception):
    """The program ended, or what it gave is no data."""


def proxy(function, requests, replies, called):
    """A stand-in for the program's function, which runs in the other sandbox."""
    import builtins

    import plain

    def candidate(*arguments, **keywords):
        called.append(function)
        message = {
            "function": function,
            "arguments": [plain.pack(value) for value in arguments],
            "keywords": {name: plain.pack(value) for name, value in keywords.items()},
        }
        try:
            requests.write(plain.dump(message))
            line = replies.readline(plain.LONGEST + 1)
            reply = plain.load(line)
            if "result" in reply:
                return plain.unpack(reply["result"])
        except (BrokenPipeError, plain.NotPlain) as error:
            raise CandidateFailed(f"the program ended or gave no data: {error}") from None
        if "raised" not in reply:
            raise CandidateFailed(str(reply.get("refused", "a malformed message"))[:200])
        kind = getattr(builtins, str(reply["raised"]), None)
        kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError
        try:
            raised = kind(str(reply.get("message")))
        except TypeError:  # UnicodeDecodeError and its like want five arguments
            raised = RuntimeError(str(reply.get("message")))
        raise raised

    candidate.__name__ = function
    return candidate


def check():
    """The verdict is sent when the whole test has run, so that nothing that ends it early can pass for it."""
    with os.fdopen(PIPES["job"], "rb") as file:
        job = json.load(file)
    requests, replies = os.fdopen(PIPES["requests"], "wb", buffering=0), os.fdopen(PIPES["replies"], "rb")
    verdicts = os.fdopen(PIPES["verdict"], "w", encoding="utf-8")
    ready()
    called = []
    try:
        # The prompt is loaded for the helpers that a test may use; the functions asked for are the program's.
        tests = module("tests", job["prelude"], "prelude.py")
        for name in job["functions"]:
            setattr(tests, name, proxy(name, requests, replies, called))
        exec(compile(job["test"], "test.py", "exec"), tests.__dict__)
        if job["call_check"]:
            tests.check(getattr(tests, job["functions"][0]))
        verdict = {"passed": True} if called else {"error": "the test never calls the program"}
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:300]
        verdict = {"passed": False, "why": why} if called else {"error": f"the test is broken: {why}"}
    verdicts.write(json.dumps(verdict))
    verdicts.close()


def main():
    mode, given = sys.argv[1], json.loads(sys.argv[2])
    PIPES.update(given["pipes"])
    ARGUMENTS.extend(given["arguments"])
    close_others(PIPES.values())
    from _sitebuiltins import Quitter  # `python -S` leaves them out, and programs use them

    __builtins__.exit, __builtins__.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
    if mode != "stdio":
        sys.path.insert(0, HERE)
        import plain  # noqa: F401 - while it can be found

        del sys.path[0]
    set_limits(given["limits"])
    {"stdio": stdio, "serve": serve, "check": check, "probe": ready}[mode]()


if __name__ == "__main__":
    main()
