"""`make mutate`: change the package on purpose, one spot at a time, and count the changes that no test notices.

    python tests/mutate.py [MODULE ...] [--each N] [--seed S]

Each mutant is one changed operator, comparison or constant in a copy of the package. The tests of the model run on it
until the first failure. A survivor is a missing test, or a change that means the same: look before you believe either.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("attention", "bridges", "chat", "contrastive", "decoder", "fusion", "generation", "images", "llava", "loss")
MODULES += ("patches", "vit")
TESTS = ("parity", "properties")
TIMEOUT_S = 600
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node: ast.AST):
    """(where, field, old, new) for each way of changing this one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield node, "op", node.op, SWAPS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        yield node, "op", node.op, SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield node, "ops", node.ops, [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, "op", node.op, ast.UAdd()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, "value", node.value, not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, "value", node.value, node.value + 1


def spots(tree: ast.Module) -> list[tuple]:
    """Every change in function bodies. Signatures, module constants and what only words an error are left alone."""
    found = []

    def visit(node):
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.arguments | ast.AnnAssign):
            return
        found.extend(changes(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not getattr(function, "inside", False):
            for inner in ast.walk(function):
                inner.inside = True
            for statement in function.body:
                visit(statement)
    return found


def survives(copy: Path) -> bool:
    """Whether the tests of the model pass on the package in `copy`."""
    folders = [str(ROOT / "tests" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not serial", *folders]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:  # a loop without an end has been noticed
        return False
    if run.returncode not in (0, 1, 2):  # 2: the tests could not even be collected, which notices the change too
        sys.exit(f"pytest ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


def main() -> int:
    """Prints each survivor and the count; returns 1 when there are survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES, help="names in vlm_course, such as loss")
    parser.add_argument("--each", type=int, default=8, help="at most this many changes in a module")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    killed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "vlm_course", copy / "vlm_course", ignore=shutil.ignore_patterns("__pycache__"))
        if not survives(copy):
            sys.exit("The tests fail on the package as it is: mend that first.")
        for module in options.modules:
            target = copy / "vlm_course" / f"{module}.py"
            source = target.read_text(encoding="utf-8")
            tree = ast.parse(source)
            every = spots(tree)
            for node, field, old, new in draw.sample(every, min(options.each, len(every))):
                before = ast.unparse(node)
                setattr(node, field, new)
                target.write_text(ast.unparse(tree), encoding="utf-8")
                after = ast.unparse(node)
                setattr(node, field, old)
                total += 1
                if survives(copy):
                    print(f"survived: {module}.py:{node.lineno}: {before}  ->  {after}", flush=True)
                else:
                    killed += 1
            target.write_text(source, encoding="utf-8")
            print(f"{module}: {min(options.each, len(every))} of {len(every)} spots tried", flush=True)
    print(f"killed {killed} of {total}")
    return 0 if killed == total else 1


if __name__ == "__main__":
    sys.exit(main())
