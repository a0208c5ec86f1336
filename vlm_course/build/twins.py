"""A definition that a chapter has the learner write is the package's own, word for word.

Two definitions are twins when their syntax trees are equal, docstrings and the decorators of `vlm_course.validation`
aside, and when every global name in them means the same object in the chapter and in the package.
"""

import ast
import builtins
import importlib
import symtable
from itertools import zip_longest
from types import ModuleType

from vlm_course.build.errors import cell_name

VALIDATION = "vlm_course.validation"
MISSING = object()
UNKNOWN = object()
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SCOPES = (*DEFINITIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def twin_problems(notebook, slug: str) -> list[str]:
    """One sentence for each difference between the exercises of a chapter and the twins that they name."""
    return [
        f"{slug}, {cell_name(cell, position)}: {problem}"
        for position, cell in enumerate(notebook.cells, start=1)
        for twin in cell.metadata.get("vlm_course", {}).get("twin", [])
        for problem in _compare(cell.source, twin, notebook)
    ]


def _compare(source: str, twin: str, notebook) -> list[str]:
    module_name, _, name = twin.rpartition(".")
    module = _module(module_name)
    if module is MISSING:
        return [f"there is no module {module_name}"]
    theirs = _definition(ast.parse(_read(module)), name)
    ours = _definition(ast.parse(_python(source)), name)
    if theirs is None:
        return [f"{module_name} defines no {name}"]
    if ours is None:
        return [f"the cell defines no {name}"]
    ours, theirs = _bare(ours, None), _bare(theirs, module)
    if ast.dump(ours) != ast.dump(theirs):
        return [f"{name} differs from {twin}: {_first_difference(ours, theirs)}"]
    bindings = _bindings(notebook)
    problems = []
    for used in sorted(global_names(theirs) - {name}):
        wanted = getattr(module, used, getattr(builtins, used, MISSING))
        found = bindings.get(used) or [getattr(builtins, used, MISSING)]
        if any(value is not wanted for value in found):
            what = "is not defined" if MISSING in found else "means another object"
            problems.append(f"{used}, which {name} uses, {what} in the chapter; in {module_name} it is {wanted!r}")
    return problems


def global_names(definition: ast.AST) -> set[str]:
    """The names that a definition looks up in its module, its bases, defaults and annotations included."""
    names = set()

    def visit(table):
        for symbol in table.get_symbols():
            looked_up = (
                symbol.is_referenced()
                if table.get_type() == "module"
                else symbol.is_global() and symbol.is_referenced()
            )
            if looked_up:
                names.add(symbol.get_name())
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(ast.unparse(definition), "<definition>", "exec"))
    return names


def _read(module: ModuleType) -> str:
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()


def _python(cell: str) -> str:
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(cell)


def _definition(tree: ast.Module, name: str):
    return next((node for node in tree.body if isinstance(node, DEFINITIONS) and node.name == name), None)


def _bare(definition, module: ModuleType | None):
    """The definition without docstrings and, for the package's, without its validation decorators."""
    for node in ast.walk(definition):
        if not isinstance(node, DEFINITIONS):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.decorator_list = [
            entry for entry in node.decorator_list if module is None or not _validates(entry, module)
        ]
    return definition


def _validates(decorator: ast.expr, module: ModuleType) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    path = []
    while isinstance(function, ast.Attribute):
        path.insert(0, function.attr)
        function = function.value
    value = getattr(module, function.id, None) if isinstance(function, ast.Name) else None
    for attribute in path:
        value = getattr(value, attribute, None)
    return getattr(value, "__module__", None) == VALIDATION


def _first_difference(ours: ast.AST, theirs: ast.AST) -> str:
    lines = zip_longest(ast.unparse(ours).splitlines(), ast.unparse(theirs).splitlines(), fillvalue="")
    one, other = next((a, b) for a, b in lines if a != b)
    return f"{one.strip()!r} in the chapter, {other.strip()!r} in the package"


def _bindings(notebook) -> dict[str, list]:
    """The objects that a chapter's cells bind to each global name: UNKNOWN where only running would tell, MISSING where
    an import fails.

    A twin, and `Name = part("Name", ...)`, count as the package's object: they are compared on their own.
    """
    bindings: dict[str, list] = {}
    twins = {}
    for cell in notebook.cells:
        for twin in cell.metadata.get("vlm_course", {}).get("twin", []):
            module, _, name = twin.rpartition(".")
            twins[name] = getattr(_module(module), name, MISSING)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in _module_level(ast.parse(_python(cell.source))):
            for name, value in _bound(node, twins):
                bindings.setdefault(name, []).append(value)
    return bindings


def _module_level(tree: ast.AST):
    """The nodes that run in the module's own scope."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, SCOPES) and not _is_part(node):
            yield from _module_level(node)


def _bound(node: ast.AST, twins: dict) -> list[tuple[str, object]]:
    if isinstance(node, ast.Import):
        # `import a.b` binds a, `import a.b as c` binds a.b.
        names = [
            (alias.asname, alias.name) if alias.asname else 2 * (alias.name.partition(".")[0],) for alias in node.names
        ]
        return [(bound, _module(name)) for bound, name in names]
    if isinstance(node, ast.ImportFrom):
        return [(alias.asname or alias.name, _imported(node.module, alias.name)) for alias in node.names]
    if isinstance(node, DEFINITIONS):
        return [(node.name, twins.get(node.name, UNKNOWN))]
    if _is_part(node):
        name = node.targets[0].id
        return [(name, twins.get(name, UNKNOWN))]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [(node.id, UNKNOWN)]
    return []


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return MISSING


def _imported(module: str, name: str):
    value = getattr(_module(module), name, MISSING)
    return _module(f"{module}.{name}") if value is MISSING else value


def _is_part(node: ast.AST) -> bool:
    """`Name = part("Name", globals())`, the learner's own object or the package's."""
    if not isinstance(node, ast.Assign):
        return False
    target, value = node.targets[0], node.value
    if len(node.targets) > 1 or not isinstance(target, ast.Name) or not isinstance(value, ast.Call):
        return False
    called = isinstance(value.func, ast.Name) and value.func.id == "part"
    return called and bool(value.args) and isinstance(value.args[0], ast.Constant) and value.args[0].value == target.id
