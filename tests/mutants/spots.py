"""Which changes of a module are tried: each a slip that a programmer could make, none in words of messages.

- an arithmetic, comparison or logical operator takes another's place; a minus, `not` or `~` is dropped
- a number grows by one; True and False change places
- a condition is turned round; one side of an `and` or `or` is dropped
- a call takes its neighbour's name: min and max, any and all, zeros and ones, GELU and ReLU, sine and cosine
- an optional argument is left out of a call; a call that stands alone is dropped
- a bound in `@counts(...)` grows by one
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

MODULES = ("attention", "fusion", "loss", "bridges", "patches", "packing", "resolution")
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = "min max, any all, amin amax, argmin argmax, zeros ones, new_zeros new_ones, sum mean, cos sin, cummax cummin"
NEIGHBOURS = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
NEIGHBOURS |= {"silu": "gelu", "gelu": "silu", "GELU": "ReLU", "SiLU": "GELU", "relu": "abs", "ceil": "floor"}
NEIGHBOURS |= {"tanh": "sigmoid", "sigmoid": "tanh", "round": "int", "isqrt": "int"}
IMPORTED = {"ceil": "int", "sum": "len"}  # of a name that stands alone: a neighbour that needs no import
WORDS = {"hint", "name"}  # arguments that only word a message
ONLY_WORDS = {"_cause"}  # functions that choose the words of a message and nothing else


@dataclass
class Mutant:
    """One change. `path` leads from the module's tree to the changed node: (field, index or None) step by step."""

    module: str
    function: str
    line: int
    before: str
    after: str
    path: tuple
    edit: tuple  # (what to do, with what)
    span: tuple[int, int]  # lines of the statement: who runs one of them reaches the change
    default: tuple | None = None  # (keyword or place, path of the expression)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}: {self.before} -> {self.after}"


def edits(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple]:
    """(what to do, with what) for each change of this node."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]
    if isinstance(node, ast.BoolOp):
        yield from (("without", index) for index in range(len(node.values)))
    elif isinstance(node, ast.Compare):
        yield from (("ops", (i, SWAPS[type(op)])) for i, op in enumerate(node.ops) if type(op) in SWAPS)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield "operand", None
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if not ast.unparse(node).startswith("super()"):  # without it no module can hold its parts
            yield "value", ast.Constant(value=None)
    elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield "negate", None
    elif isinstance(node, ast.Attribute) and node.attr in NEIGHBOURS:
        yield "attr", NEIGHBOURS[node.attr]
    elif isinstance(node, ast.Name) and isinstance(parent, ast.Call) and parent.func is node and node.id in NEIGHBOURS:
        yield "id", IMPORTED.get(node.id, NEIGHBOURS[node.id])
    elif isinstance(node, ast.Call):
        yield from (("keyword", i) for i, k in enumerate(node.keywords) if k.arg is not None and k.arg not in WORDS)


def edit(node: ast.AST, what: str, value: object) -> ast.AST:
    """The changed node: the node itself, or what stands in its place."""
    if what == "without":
        rest = [operand for index, operand in enumerate(node.values) if index != value]
        return rest[0] if len(rest) == 1 else ast.BoolOp(op=node.op, values=rest)
    if what == "operand":
        return node.operand
    if what == "ops":
        node.ops[value[0]] = value[1]()
    elif what == "op":
        node.op = value()
    elif what == "negate":
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    elif what == "keyword":
        del node.keywords[value]
    else:
        setattr(node, what, copy.deepcopy(value))
    return node


def _children(node: ast.AST) -> Iterator[tuple[tuple, ast.AST]]:
    """((field, index or None), child) of what may be changed below a node."""
    if isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "name", None) in ONLY_WORDS:
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "format_spec"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.keyword) and child.arg in WORDS:
                continue
            if isinstance(child, ast.AST):
                yield (name, index), child


def _step(node: ast.AST, step: tuple) -> ast.AST:
    child = getattr(node, step[0])
    return child if step[1] is None else child[step[1]]


def _shown(chain: list[ast.AST]) -> ast.AST:
    """The smallest part around a change that says where it is: a call, a sum, a comparison; else the statement."""
    wide = ast.Call | ast.BinOp | ast.Compare | ast.BoolOp | ast.Subscript | ast.keyword | ast.stmt | ast.IfExp
    small = ast.Constant | ast.UnaryOp | ast.Name | ast.Attribute | ast.Slice | ast.Tuple | ast.List
    at = len(chain) - 1
    while at and (isinstance(chain[at], small) or not isinstance(chain[at], wide)):
        at -= 1
    return chain[at]


def _span(chain: list[ast.AST]) -> tuple[int, int]:
    inner = next(node for node in reversed(chain) if isinstance(node, ast.stmt | ast.Lambda))
    body = getattr(inner, "body", None)
    return inner.lineno, body[0].lineno - 1 if isinstance(body, list) else inner.end_lineno


def _bounds(module: str, function: str, node: ast.AST, decorator: ast.AST) -> Iterator[Mutant]:
    """`@counts(width=1)` asks for too much: the smallest number that is allowed would be refused."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "counts":
        for keyword in decorator.keywords:
            low, span = keyword.value.value, (node.lineno, node.end_lineno)
            before, after = (f"@counts({keyword.arg}={number})" for number in (low, low + 1))
            yield Mutant(module, function, decorator.lineno, before, after, (), ("bound", (keyword.arg, low + 1)), span)


def _one_line(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While | ast.For):
        node = copy.copy(node)
        node.body, node.orelse = [ast.Expr(ast.Constant(...))], []
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split()).removesuffix(": ...")


def mutants(module: str, text: str) -> list[Mutant]:
    """Every change of a module's functions, their defaults and the rules in their decorators."""
    tree, found = ast.parse(text), []

    def visit(path: tuple, chain: list[ast.AST], function: str) -> None:
        node = chain[-1]
        for what, value in edits(node, chain[-2] if len(chain) > 1 else None):
            changed = copy.deepcopy(_shown(chain))
            place = chain.index(_shown(chain))
            inner, last = changed, None
            for step in path[len(path) - (len(chain) - 1 - place) :]:
                last, inner = (inner, step), _step(inner, step)
            new = edit(inner, what, value)
            if last is None:
                changed = new
            elif last[1][1] is None:
                setattr(last[0], last[1][0], new)
            else:
                getattr(last[0], last[1][0])[last[1][1]] = new
            before, after = _one_line(_shown(chain)), _one_line(changed)
            found.append(Mutant(module, function, node.lineno, before, after, path, (what, value), _span(chain)))
        for step, child in _children(node):
            visit((*path, step), [*chain, child], function)

    def enter(node: ast.AST, path: tuple, chain: list[ast.AST], outer: str) -> None:
        name = f"{outer}.{node.name}".lstrip(".")
        for number, decorator in enumerate(node.decorator_list):  # of these the rules, which are functions, and bounds
            found.extend(_bounds(module, name, node, decorator))
            for steps, inner in _lambdas(decorator, (*path, ("decorator_list", number)), [*chain, decorator]):
                visit(steps, inner, name)
        if isinstance(node, ast.ClassDef):
            for index, member in enumerate(node.body):
                if isinstance(member, ast.FunctionDef | ast.ClassDef):
                    enter(member, (*path, ("body", index)), [*chain, member], name)
            return
        if node.name in ONLY_WORDS:
            return
        for kind, defaults in (("defaults", node.args.defaults), ("kw_defaults", node.args.kw_defaults)):
            for index, default in enumerate(defaults):
                if default is None:
                    continue
                at, first = (*path, ("args", None), (kind, index)), len(found)
                visit(at, [*chain, node.args, default], name)
                place = index if kind == "defaults" else node.args.kwonlyargs[index].arg
                names = [argument.arg for argument in (node.args.posonlyargs + node.args.args)[-len(defaults) :]]
                shown = names[index] if kind == "defaults" else place
                for mutant in found[first:]:
                    mutant.default = (place, at)
                    mutant.span = (min([node.lineno, *(d.lineno for d in node.decorator_list)]),) * 2
                    changed = _apply(ast.parse(text), mutant)
                    for step in at:
                        changed = _step(changed, step)
                    mutant.before, mutant.after = f"{shown}={ast.unparse(default)}", f"{shown}={ast.unparse(changed)}"
        for index, statement in enumerate(node.body):
            visit((*path, ("body", index)), [*chain, statement], name)

    def _lambdas(node: ast.AST, path: tuple, chain: list[ast.AST]) -> Iterator[tuple[tuple, list[ast.AST]]]:
        if isinstance(node, ast.Lambda):
            yield (*path, ("body", None)), [*chain, node, node.body]
            return
        for step, child in _children(node):
            yield from _lambdas(child, (*path, step), [*chain, child])

    for index, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            enter(statement, (("body", index),), [tree, statement], "")
    seen = Counter()
    for mutant in found:
        seen[mutant.name] += 1
        if seen[mutant.name] > 1:
            mutant.after += f" (place {seen[mutant.name]})"
    return found


def _apply(tree: ast.Module, mutant: Mutant) -> ast.Module:
    node = tree
    for step in mutant.path[:-1]:
        node = _step(node, step)
    name, index = mutant.path[-1]
    new = edit(_step(node, mutant.path[-1]), *mutant.edit)
    if index is None:
        setattr(node, name, new)
    else:
        getattr(node, name)[index] = new
    return ast.fix_missing_locations(tree)


def changed_tree(text: str, mutant: Mutant) -> ast.Module:
    """The module's tree with the change made; everything keeps its line."""
    return _apply(ast.parse(text), mutant)


def changed_default(text: str, mutant: Mutant) -> ast.Expression:
    """The expression of the changed default value."""
    node = changed_tree(text, mutant)
    for step in mutant.default[1]:
        node = _step(node, step)
    return ast.fix_missing_locations(ast.Expression(body=node))
