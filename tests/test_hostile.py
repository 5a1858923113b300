"""Every program of tests/hostile scores zero and leaves nothing; honest ones beside them are scored as ever.

What is right is a random token that no program can compute, so whoever prints it has read it where it must not.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1fast import rewards
from r1fast.rewards import Score, sandbox, watch
from r1fast.rewards.pool import RewardPool
from r1fast.rewards.programs import Limits, execute

ROOT = Path(__file__).parent
PROGRAMS = sorted((ROOT / "hostile").glob("*/*.py"))
PLACES = ("/", "/tmp", "/var/tmp", "/dev/shm", "/mnt", "/root", "/home", "/usr", "/etc", str(ROOT), str(ROOT.parent))
LIMITS = {"seconds": 1, "memory_mb": 512}

needs_bubblewrap = pytest.mark.skipif(
    sandbox.why_not("bubblewrap") is not None, reason=str(sandbox.why_not("bubblewrap"))
)


def reference(kind, token):
    """Tests of the three kinds whose right answer is `token`."""
    tests = [{"input": "3\n" if kind == "stdio" else [3], "output": token}] * 2
    return {
        "stdio": {"tests": tests, **LIMITS},
        "call": {"tests": tests, "function": "f", **LIMITS},
        "check": {
            **{"prompt": "def f(x):\n    '''Says the word.'''\n", "entry_point": "f"},
            "test": f"def check(candidate):\n    assert candidate(3) == {token!r} == candidate(4)\n",
            **LIMITS,
        },
    }[kind]


def honest(kind, token):
    return f"print({token!r})\n" if kind == "stdio" else f"def f(x):\n    return {token!r}\n"


def left_behind():
    """What hostile programs may have left: files by their name, processes by the harness they run under."""
    files = {str(path) for place in PLACES if os.path.isdir(place) for path in Path(place).glob("r1fast_hostile*")}
    processes = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"/sandbox/harness.py" in command or b"r1fast-program-" in command:
            processes.add(pid)
    return files, processes


def tended(pid):
    """Whether a worker that lives has started it: that of another run on this machine, where programs may stand still
    for long."""
    while pid not in ("0", "1"):
        try:
            if b"r1fast.rewards.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
            pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return False
    return False


def wait_until_gone(seconds=10.0):
    """What is left of runs that are over. Other processes come and go: only what stays counts."""
    _, first = left_behind()
    deadline = time.monotonic() + seconds
    while (first := {pid for pid in first if not tended(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
        first &= left_behind()[1]
    return first


def test_the_suite_is_whole():
    assert len(PROGRAMS) >= 40
    assert {path.parent.name for path in PROGRAMS} == {"stdio", "call", "check"}


@needs_bubblewrap
def test_hostile_programs_score_zero_and_leave_nothing_and_honest_ones_beside_them_score_one():
    before, _ = left_behind()
    items, wanted = [], []
    for number, path in enumerate(PROGRAMS):
        kind, token = path.parent.name, f"token-{secrets.token_hex(16)}"
        items.append(("code", f"```python\n{path.read_text()}```", reference(kind, token)))
        wanted.append((str(path.relative_to(ROOT)), Score(0.0)))
        if number % 3 == 0:
            items.append(("code", honest(kind, token), reference(kind, token)))
            wanted.append((f"honest {kind}", Score(1.0)))
    with RewardPool(workers=2) as pool:
        scores = pool.run(items)
        assert pool.restarts == 0  # what hangs is ended by the sandbox, not by the pool
    found = [(name, score) for (name, _), score in zip(wanted, scores, strict=True)]
    assert found == wanted
    assert not wait_until_gone()
    assert left_behind()[0] == before


# -- an ordinary user -----------------------------------------------------------------------------------------------

USER = 61_234
# The interpreter and the packages may lie under folders that only root may enter. In a mount namespace of its own, each
# such folder is replaced by an open one that holds the same.
OPEN_UP = """
mount -t tmpfs -o mode=755 tmpfs /mnt
number=0
while [ "$1" != -- ]; do
    number=$((number + 1)); closed=/mnt/$number; mkdir $closed
    mount --bind "$1" $closed && mount -t tmpfs -o mode=755 tmpfs "$1"
    for inside in $closed/* $closed/.[!.]*; do
        if [ -d "$inside" ]; then mkdir "$1/${inside##*/}" && mount --rbind "$inside" "$1/${inside##*/}"; fi
    done
    shift
done
shift
exec "$@"
"""
AS_USER = """
import os, sys
from r1fast.rewards import configure, sandbox
from r1fast.rewards.pool import RewardPool
from r1fast.schema import RewardsConfig

assert os.getuid() == {user}
tests = {{"tests": [{{"input": "3", "output": "word"}}], "seconds": 1}}
programs = ["print('word')", "while True: pass", "import os\\nwhile True: os.fork()"]
programs.append("open('/etc/passwd')\\nprint('word')")
for kind in ("bubblewrap", "rlimits"):
    assert sandbox.why_not(kind) is None, sandbox.why_not(kind)
    configure(RewardsConfig(sandbox=kind))
    with RewardPool(workers=1) as pool:
        scores = pool.run([("code", program, tests) for program in programs])
    print(kind, *(score.error or score.value for score in scores))
"""


def closed_folders(paths):
    """Folders above `paths` that others than their owner may not enter, the outermost first."""
    above = {folder for path in paths if path for folder in (Path(path), *Path(path).parents) if folder.is_dir()}
    return sorted(str(folder) for folder in above if not folder.stat().st_mode & 0o001)


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="all tests of this file run as an ordinary user already")
@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare (util-linux) is not here")
def test_it_works_for_an_ordinary_user_and_the_weaker_way_says_what_it_is():
    paths = [
        str(ROOT.parent),
        *(os.path.realpath(path) for path in sys.path if path),
        os.path.realpath(sys.base_prefix),
    ]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", OPEN_UP, "sh"]
    command += [*closed_folders(paths), "--", "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    command += [sys.executable, "-B", "-c", AS_USER.format(user=USER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["bubblewrap 1.0 0.0 0.0 0.0", "rlimits 1.0 0.0 0.0 1.0"]


# -- what is refused, and said --------------------------------------------------------------------------------------


def test_without_bubblewrap_the_words_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sandbox, "_PATH", "/nowhere")
    said = sandbox.why_not.__wrapped__("bubblewrap")
    assert "apt-get install bubblewrap" in said and "rewards.sandbox=rlimits" in said


def test_a_sandbox_that_cannot_start_is_a_failure_and_not_a_zero(monkeypatch):
    monkeypatch.setattr(sandbox, "_python", lambda: "/nowhere/python")
    score = rewards.get("code").attempt("print(1)", {"tests": [{"input": "", "output": "1"}]})
    assert score.value == 0.0 and "SandboxError" in score.error


@needs_bubblewrap
def test_a_program_sees_an_empty_house():
    """What is there, from the inside: nobody's files, no network, three descriptors, an environment of three words."""
    look = """
import json, os, pathlib
net = pathlib.Path("/proc/net/dev").read_text().splitlines()[2:]
print(json.dumps({
    "user": os.getuid(), "root": sorted(os.listdir("/")), "tmp": os.listdir("/tmp"), "host": os.uname().nodename,
    "environment": sorted(os.environ), "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    "processes": [p for p in os.listdir("/proc") if p.isdigit()], "network": [n.split(":")[0].strip() for n in net],
    "space": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
}))"""
    code, output = execute(look, "", Limits(), "bubblewrap")
    seen = json.loads(output)
    assert code == 0 and seen["user"] == 65534 and seen["tmp"] == []
    assert not {"home", "var", "mnt", "opt", "srv"} & set(seen["root"])
    assert seen["environment"] == ["HOME", "LANG", "PATH", "PWD"] or seen["environment"] == ["HOME", "LANG", "PATH"]
    assert seen["descriptors"] == 3 and len(seen["processes"]) == 2 and seen["network"] == ["lo"]
    assert seen["space"] == Limits().file
    assert execute("import os; print(os.listdir('/etc'))", "", Limits(), "bubblewrap")[1] in (b"['ld.so.cache']\n", b"")


@needs_bubblewrap
def test_the_network_is_not_there_even_for_a_server_on_this_machine():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connect = f"import socket; socket.create_connection({server.getsockname()!r}); print('in')"
        assert execute(connect, "", Limits(), "bubblewrap") == (1, b"")


@needs_bubblewrap
def test_a_worker_that_is_killed_takes_its_program_along():
    def programs():  # of this pool: those of other tests beside this one come and go; nor the one that only probes
        pids = {str(pid) for worker in pool._workers for pid in watch.tree(worker.process.pid)} & left_behind()[1]
        return {pid for pid in pids if b"\0stdio\0" in Path(f"/proc/{pid}/cmdline").read_bytes()}

    with RewardPool(workers=1) as pool:
        item = ("code", "import time\ntime.sleep(60)", {"tests": [{"input": "", "output": "x"}], "seconds": 60})
        thread = threading.Thread(target=pool.run, args=([item],))
        thread.start()
        deadline = time.monotonic() + 90  # a worker starts slowly on a busy machine
        while not (ours := programs()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ours
        for worker in pool._workers:
            worker.process.kill()
        thread.join(30)
    assert not wait_until_gone() & ours
