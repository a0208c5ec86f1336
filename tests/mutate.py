"""`make mutate`: change the package on purpose, one spot at a time, and count the changes that no test notices.

    python tests/mutate.py [MODULE ...] [--each N] [--seed S] [--jobs 2] [--minutes 30]

A mutant is one changed operator, comparison, constant or default, one dropped `not`, or one dropped check. The tests of
its module run on it until the first failure. Words of messages stay as they are. A survivor is a missing test, or a
change that means the same: docs/mutation.md says which is which. Torch and transformers are imported once; every mutant
is a fork of that process with one thread, since forks hang with more. Not for Windows, which cannot fork.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import math
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

ROOT = Path(__file__).resolve().parents[1]
# The tests of each module: the closest and quickest first, since the first failure ends the run.
TESTS = {
    "attention": "properties/test_masks_by_loops.py properties/test_language_attention.py "
    "properties/test_language_model.py parity/test_language_idefics.py",
    "fusion": "properties/test_masks_by_loops.py properties/test_defaults.py properties/test_language_data.py "
    "properties/test_flamingo.py parity/test_language_idefics.py parity/test_fuyu.py",
    "loss": "properties/test_defaults.py properties/test_language_data.py properties/test_language_model.py "
    "parity/test_packed_documents.py",
    "bridges": "properties/test_defaults.py properties/test_vision_properties.py parity/test_vision_bridges.py "
    "properties/test_costs.py parity/test_qformer.py",
    "patches": "properties/test_defaults.py properties/test_vision_properties.py parity/test_vision_towers.py "
    "parity/test_vision_images.py parity/test_encoders.py",
    "packing": "properties/test_defaults.py parity/test_packing.py",
    "resolution": "parity/test_resolution.py",
}
# The table of bad inputs names the module that it is about.
BAD_INPUT = "properties/test_bad_input.py"
PRELOADED = ("timm", "torchvision", "hypothesis", "pytest", "transformers", "PIL.Image")
PRELOADED += tuple(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("clip", "idefics", "llama", "llava", "llava_next", "pixtral", "siglip2", "fuyu", "persimmon")
)
ONLY_WORDS = {"_cause"}  # functions that choose the words of a message and nothing else
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed spot of a module: what stood there, what stands there now, and the whole changed source."""

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.before}  ->  {self.after}"


def changes(node: ast.AST):
    """(field, new value) for each way of changing this one node."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield "op", None  # dropped below
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "value", ast.Constant(value=None)


def spots(tree: ast.Module) -> list[tuple[ast.AST, str, object]]:
    """Every change in functions and their defaults. Module constants and what only words an error are left alone."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign) or getattr(node, "name", None) in ONLY_WORDS:
            return
        found.extend((node, field, new) for field, new in changes(node))
        if isinstance(node, ast.arguments):
            children = [default for default in (*node.defaults, *node.kw_defaults) if default is not None]
        elif isinstance(node, ast.FunctionDef):
            children = [node.args, *node.body]
        else:
            words = {"hint", "name"} if isinstance(node, ast.Call) else ()
            children = [n for n in ast.iter_child_nodes(node) if getattr(n, "arg", None) not in words]
        for child in children:
            visit(child)

    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            visit(statement)
        elif isinstance(statement, ast.ClassDef):
            for member in statement.body:
                if isinstance(member, ast.FunctionDef):
                    visit(member)
    return found


class _Dropped(ast.NodeTransformer):
    """Takes the operand in place of the one unary operation whose operator is None."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return node.operand if node.op is None else node


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module of the package."""
    text = (ROOT / "vlm_course" / f"{module}.py").read_text(encoding="utf-8")
    found = []
    for index in range(len(spots(ast.parse(text)))):
        tree = ast.parse(text)
        node, field, new = spots(tree)[index]
        before = ast.unparse(node)
        setattr(node, field, new)
        tree = _Dropped().visit(tree)
        after = ast.unparse(node.operand if getattr(node, "op", 0) is None else node)
        found.append(Mutant(module, node.lineno, before, after, ast.unparse(ast.fix_missing_locations(tree))))
    return found


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports the mutant's source under the name of its module; everything else comes from the files."""

    def __init__(self, mutant: Mutant):
        self.mutant, self.name = mutant, f"vlm_course.{mutant.module}"

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_filename(self, name):
        return str(ROOT / "vlm_course" / f"{self.mutant.module}.py")

    def get_data(self, path):
        return self.mutant.source.encode()


def start(module: str, mutant: Mutant | None, output: Path) -> int:
    """Forks a process that runs the module's tests on the mutant (None: as it is); its exit code is pytest's."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, Changed(mutant))
        options = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not serial"]
        files = [str(ROOT / "tests" / file) for file in TESTS[module].split()]
        code = pytest.main([*options, *files])
        table = ROOT / "tests" / BAD_INPUT
        if code == 0 and table.is_file():
            code = pytest.main([*options, "-k", f"[{module}.", str(table)]) % 5  # 5: no row for this module
    finally:
        os._exit(int(code))


def outcome(status: int) -> str:
    """What a child's end says."""
    if os.WIFSIGNALED(status):
        return "killed"  # it crashed
    return {0: "survived", 1: "killed", 2: "killed"}.get(os.WEXITSTATUS(status), "broken")


def run(queue: list[tuple[str, Mutant | None]], jobs: int, limits: dict[str, float], folder: Path, until=math.inf):
    """Yields (module, mutant, outcome, seconds, output) as runs end, `jobs` at a time, none begun after `until`."""
    waiting, running = list(reversed(queue)), {}
    while waiting or running:
        if time.monotonic() > until:
            waiting.clear()
        while waiting and len(running) < jobs:
            module, mutant = waiting.pop()
            output = folder / f"{len(waiting)}.txt"
            running[start(module, mutant, output)] = (module, mutant, output, time.monotonic())
        time.sleep(0.05)
        for child, (module, mutant, output, since) in list(running.items()):
            seconds = time.monotonic() - since
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and seconds > limits.get(module, 1200.0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                del running[child]
                yield module, mutant, "timeout", seconds, ""
            elif ended:
                del running[child]
                yield module, mutant, outcome(status), seconds, output.read_text(errors="replace")


def main() -> int:
    """Prints the survivors and timeouts and the counts by module; returns 1 below 85 percent killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--each", type=int, help="at most this many mutants of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="start no further mutant after so long")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(TESTS):
        parser.error(f"no module {', '.join(sorted(unknown))}: choose from {', '.join(TESTS)}")
    modules = options.modules or list(TESTS)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name.startswith("vlm_course") for name in sys.modules)
    draw, counts, began = random.Random(options.seed), {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        limits = {}
        for module, _, result, seconds, output in run([(m, None) for m in modules], options.jobs, {}, Path(folder)):
            if result == "survived":
                limits[module] = 30 + 8 * seconds
            else:
                print(f"{module} is left out, its tests fail on the package as it is:\n{output[-2000:]}", flush=True)
        queue, modules = [], [module for module in modules if module in limits]
        if not modules:
            return 2
        for module in modules:
            every = mutants(module)
            chosen = every if options.each is None else draw.sample(every, min(options.each, len(every)))
            counts[module] = {"mutants": len(every), "killed": 0, "timeout": 0, "survived": 0, "broken": 0}
            queue += [(module, mutant) for mutant in chosen]
        draw.shuffle(queue)  # so that what the time allows is a fair sample of all
        until = began + 60 * options.minutes
        for module, mutant, result, _, output in run(queue, options.jobs, limits, Path(folder), until):
            counts[module][result] += 1
            if result != "killed":
                print(f"{result}: {mutant}", flush=True)
            if result == "broken":
                print(output[-1000:])
    print(f"\n{'module':<12}{'mutants':>8}{'tried':>7}{'killed':>8}{'timeout':>9}{'survived':>10}{'share':>8}")
    rows = {**counts, "all": {key: sum(count[key] for count in counts.values()) for key in next(iter(counts.values()))}}
    for module, count in rows.items():
        tried = count["killed"] + count["survived"]
        share = count["killed"] / max(1, tried)
        print(f"{module:<12}{count['mutants']:>8}{tried + count['timeout']:>7}{count['killed']:>8}{count['timeout']:>9}"
              f"{count['survived']:>10}{share:>8.1%}")  # fmt: skip
    print(f"{(time.monotonic() - began) / 60:.0f} minutes; the share leaves timeouts out.")
    return int(share < 0.85)


if __name__ == "__main__":
    sys.exit(main())
