"""Holds the arrows of the house: what each part may import, read from the sources themselves.

    csrc < kernels < {types, schema, config, metrics, progress, device, heap, snapshot, stop, watchdog,
          parallel}
         < {model, rewards, tasks} < {rollout, learn}
         < stages < {graph, check, recipe, plan, summary}
         < {train, evaluate, generate, report, decontaminate, lm_eval, serving} < serve

Left never imports right, at the top of a file or inside a function.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("r1fast_kernels",),
    (
        *("types", "schema", "config", "metrics", "progress", "device", "heap", "plugins"),
        *("snapshot", "stop", "watchdog", "parallel"),
    ),
    ("model", "rewards", "tasks"),
    ("rollout", "learn"),
    ("stages",),
    ("graph", "check", "recipe", "plan", "summary"),
    ("train", "evaluate", "generate", "report", "decontaminate", "lm_eval", "serving"),
    ("serve",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Plain Python, tested as such, and quick to import: --help and the report must not wait for torch.
WITHOUT_TORCH = (
    *("r1fast.config", "r1fast.schema", "r1fast.types", "r1fast.metrics", "r1fast.progress", "r1fast.graph"),
    *("r1fast.snapshot", "r1fast.stop", "r1fast.watchdog", "r1fast.parallel"),
    *("r1fast.tasks", "r1fast.rewards", "r1fast.rollout.scheduler", "r1fast.rollout.kv_cache", "r1fast.train"),
)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, but for `if TYPE_CHECKING` blocks, which import nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (above.replace("kernels", "r1fast_kernels", 1), node.module)))
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            first = node.args[0]
            text = first.values[0] if isinstance(first, ast.JoinedStr) else first
            if isinstance(text, ast.Constant):
                names.add(str(text.value).rstrip("."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def part_of(name: str) -> str | None:
    """The part of the house a dotted name belongs to; None for what is not ours, or the package's own facade."""
    first, *rest = name.split(".")
    if first == "r1fast_kernels":
        return first
    return rest[0] if first == "r1fast" and rest and rest[0] in RANK else None


def sources() -> list[tuple[str, Path]]:
    """(part, file) of everything in r1fast/ but its facade, which hands out names of all parts."""
    files = [path for path in (ROOT / "r1fast").rglob("*.py") if path != ROOT / "r1fast" / "__init__.py"]
    return [(path.relative_to(ROOT / "r1fast").parts[0].removesuffix(".py"), path) for path in sorted(files)]


def test_every_module_has_a_place_in_the_layers():
    assert {part for part, _ in sources()} <= set(RANK)
    assert {"stages", "recipe", "learn", "rollout", "train"} <= {part for part, _ in sources()}


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\n"
        "import a.b\ndef f():\n    from c import d\n    import_module(f'e.{x}')\n"
    )
    assert imports(path) == {"typing.TYPE_CHECKING", "a.b", "c.d", "e"}


@pytest.mark.parametrize(("part", "path"), sources(), ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_left_never_imports_right(part, path):
    for name in imports(path):
        other = part_of(name)
        if other is None or part not in RANK or other == part:
            continue
        assert RANK[other] <= RANK[part], f"{path.relative_to(ROOT)} imports {name}, which is above it"
        assert {part, other} != {"rollout", "learn"}, (
            f"{path.relative_to(ROOT)}: rollout and learn share only the model"
        )


def test_parts_do_not_go_round_in_circles():
    """Of one layer too: if rewards are used by tasks, tasks are not used by rewards."""
    reads: dict[str, set[str]] = {}
    for part, path in sources():
        reads.setdefault(part, set()).update(filter(None, map(part_of, imports(path))))
    left = {part: {other for other in others if other != part} for part, others in reads.items()}
    while left:
        free = [part for part, others in left.items() if not others & set(left)]
        assert free, f"these import each other: {left}"
        for part in free:
            del left[part]


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "r1fast"], path


def test_native_code_includes_only_itself_and_the_system():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".h", ".hpp", ".cuh"}]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'#\s*include\s*"([^"]+)"', text):
            found = [base / name for base in (path.parent, ROOT / "csrc") if (base / name).is_file()]
            assert found, f"{path}: includes {name}, which is not in csrc/"
        assert "#include <torch" not in text and "#include <ATen" not in text, path
        if not path.name.endswith("_bindings.cpp"):
            assert "#include <pybind11" not in text, f"{path}: pybind11 belongs in the bindings alone"


@pytest.mark.parametrize("part", ["rewards", "tasks"])
def test_rewards_and_tasks_never_touch_torch(part):
    for path in (ROOT / "r1fast" / part).rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in {"torch", "transformers"}], path


@pytest.mark.parametrize("module", ["scheduler", "kv_cache"])
def test_the_scheduler_is_plain_python(module):
    outside = {name.split(".")[0] for name in imports(ROOT / "r1fast" / "rollout" / f"{module}.py")}
    assert outside - set(sys.stdlib_module_names) <= {"r1fast"}


def test_what_must_be_quick_does_not_load_torch():
    """The whole chain of imports, in a fresh process."""
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# -- README -------------------------------------------------------------------------------------------------------


def tree_paths(readme: str) -> list[str]:
    """Paths that the README's tree names: the fenced block that shows `kernels/` and `csrc/`, by its indentation. A
    line may begin with several names; a name with `<...>` or `...` stands for many and is passed over."""
    blocks = [
        block for block in re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL) if re.search(r"^\W*csrc/", block, re.M)
    ]
    found: list[str] = []
    for block in blocks:
        above: list[tuple[int, str]] = []
        for line in block.splitlines():
            line = re.sub(r"[│├└─]", " ", line)
            indent = len(line) - len(line.lstrip())
            names = []
            for word in line.split():
                word = word.rstrip(",")
                if not re.fullmatch(r"[\w.*<>/-]+(\.\w+|/)", word):
                    break
                names.append(word)
            if not names:
                continue
            while above and above[-1][0] >= indent:
                above.pop()
            parent = "".join(name for _, name in above)
            found += [parent + name for name in names if not set("<>") & set(name)]
            if len(names) == 1 and names[0].endswith("/"):
                above.append((indent, names[0]))
    return found


def test_the_tree_reader():
    lines = (
        "csrc/    native",
        "  common/   math",
        "    ratio.h   the ratio",
        "kernels/",
        "  op.py, rope.py   both",
        "  <op>.py",
    )
    found = tree_paths("\n".join(("```", *lines, "```")))
    assert found == ["csrc/", "csrc/common/", "csrc/common/ratio.h", "kernels/", "kernels/op.py", "kernels/rope.py"]


def test_the_readme_names_only_files_that_exist():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md yet")
    missing = [path for path in tree_paths(readme.read_text(encoding="utf-8")) if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_a_step_of_training_imports_neither_torchs_compiler_nor_triton_where_nothing_runs_them():
    """Each takes 70 MB and half a second or more; a torch without CUDA has nothing to run Triton's kernels on."""
    code = """
import sys, torch
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss
from r1fast.learn.packing import loss_weights, pack, row_from_example
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.schema import OptimizerConfig
config = DecoderConfig(vocab_size=9, hidden_size=8, intermediate_size=8, layers=1, heads=1, kv_heads=1, head_dim=8)
learner = Learner(Decoder(config).initialize(0), OptimizerConfig(), 10)
rows = [row_from_example([1, 2], [3, 4, 5])]
before = learner.model.head.detach().clone()
learner.step(pack(rows, loss_weights(rows, "token"), 100), cross_entropy_loss)
learner.load_state_dict(learner.state_dict())
assert not torch.equal(before, learner.model.head)
print(*({"torch._dynamo"} if torch.version.cuda else {"torch._dynamo", "triton"}) & set(sys.modules))
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == ""
