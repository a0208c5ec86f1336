"""The process that holds an answer: runs its definitions, then does what the checker asks over standard input.

Started by runner.py; it knows no tests. Prints go to standard error, where the runner counts them.
"""

import ast
import linecache
import os
import sys
from pathlib import Path

import torch
from torch import nn

from vlm_course.grading import wire
from vlm_course.grading.answers import Failure, LocalAnswer, stopped
from vlm_course.grading.extract import needed, read, statements


def define(path: Path, name: str):
    """The object that the file defines under `name`. Failure says why there is none."""
    found, broken = statements(read(path))
    chosen = needed(found, name)
    if not chosen:
        for piece, error in broken:
            if name in piece.text:
                raise Failure("error", f"Line {error.lineno} of {piece.label} is not Python: {error.msg}.")
        raise Failure("not_attempted", f"{path.name} does not define {name}.")
    namespace = {"__name__": "answer"}
    for statement in chosen:
        filename = f"<{statement.piece.label}>"
        # Entries without a modification time stay: messages quote the line that failed.
        text = statement.piece.text
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        module = compile(ast.Module(body=[statement.node], type_ignores=[]), filename, "exec")
        try:
            exec(module, namespace)
        except BaseException as error:
            raise stopped(error) from None
    return namespace[name]


def limit_memory(gigabytes: float) -> None:
    """Allow that much more memory than is in use now, where the system can limit it (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * os.sysconf("SC_PAGE_SIZE") + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    except (ImportError, OSError, ValueError):
        return


def serve(requests, replies) -> None:
    """Answer requests until the checker is done."""
    answer: LocalAnswer | None = None
    while True:
        try:
            request = wire.receive(requests)
        except EOFError:
            return
        try:
            match request["do"]:
                case "start":
                    limit_memory(request["memory_gb"])
                    reply = {"result": None}
                case "define":
                    target = define(Path(request["path"]), request["name"])
                    # A choice may be a plain value; asked for, it gives itself.
                    target = target if callable(target) else lambda value=target: value
                    answer = LocalAnswer(target, tuple(request["off_limits"]), request["driver"])
                    reply = {"result": None}
                case "build":
                    shapes = answer.build(request["construct"], request["positional"], request["device"])
                    reply = {"result": [(name, tuple(shape)) for name, shape in shapes]}
                case "load":
                    answer.load(request["values"])
                    reply = {"result": None}
                case "call":
                    reply = {"result": answer.call(tuple(request["arguments"]))}
        except Failure as failure:
            reply = {"kind": failure.kind, "says": failure.says}
        except MemoryError as error:
            reply = {"kind": "error", "says": stopped(error).says}
        wire.send(replies, reply)


def main() -> None:
    """Keep the two pipes for messages, and give the answer's own code an empty input and a counted output."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdin = open(os.devnull)
    # The first call on the meta device imports much of torch: not on the learner's clock.
    nn.Linear(1, 1, device="meta")(torch.empty(1, 1, device="meta"))
    serve(requests, replies)


if __name__ == "__main__":
    main()
