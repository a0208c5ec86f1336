"""`vlm-course check`: answers run in a process of their own, with a time limit, while the tests stay in this one."""

import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from vlm_course.grading import registry, wire
from vlm_course.grading.answers import Failure
from vlm_course.grading.compare import Opaque
from vlm_course.grading.examine import examine
from vlm_course.grading.exercise import Exercise, Shape, Tensors, Value, Verdict
from vlm_course.grading.extract import SourceError, read
from vlm_course.grading.quiz import Question

_MOST_OUTPUT = 10 * 2**20  # bytes that an answer may print


class RemoteAnswer:
    """Answers in a process of their own. Every request has a time limit; the process ends with `close`."""

    def __init__(self, *, time_limit: float, memory_gb: float):
        self._time_limit = time_limit
        self._printed = 0
        self.alive = True
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [_root(), os.getenv("PYTHONPATH")])))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlm_course.grading.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._replies: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read_replies, daemon=True).start()
        threading.Thread(target=self._count_output, daemon=True).start()
        # Importing torch counts for nobody: a cold start on a busy machine can take a minute.
        self._ask("start", 120.0, memory_gb=memory_gb)

    def define(self, path: Path, name: str, off_limits: tuple[str, ...] = (), driver: str | None = None) -> None:
        """Run the definition of `name`, and what it needs."""
        self._ask("define", path=str(path), name=name, off_limits=off_limits, driver=driver)

    def build(self, construct: dict, positional: bool, device: str = "cpu") -> list[tuple[str, Shape]]:
        shapes = self._ask("build", construct=construct, positional=positional, device=device)
        return [(name, tuple(shape)) for name, shape in shapes]

    def load(self, values: Tensors) -> None:
        self._ask("load", values=values)

    def call(self, arguments: tuple[Value, ...]) -> Value | Opaque:
        return self._ask("call", arguments=arguments)

    def close(self) -> None:
        """End the process and what it started."""
        self.alive = False
        if hasattr(os, "killpg"):
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        self._process.kill()
        self._process.wait()

    def _ask(self, what: str, limit: float | None = None, **request):
        try:
            wire.send(self._process.stdin, {"do": what, **request})
            reply = self._replies.get(timeout=limit or self._time_limit)
        except queue.Empty:
            self.close()
            seconds = f"{self._time_limit:g} seconds"
            raise Failure("fatal", f"It was stopped after {seconds}: is there a loop that never ends?") from None
        except OSError:
            reply = None
        if reply is None:
            raise Failure("fatal", self._ended())
        if "says" in reply:
            raise Failure(str(reply["kind"]), str(reply["says"]))
        return reply["result"]

    def _ended(self) -> str:
        self.close()
        if self._printed > _MOST_OUTPUT:
            return f"It was stopped after printing {_MOST_OUTPUT >> 20} MB: take the prints out of your answer."
        code = self._process.returncode
        if code >= 0:
            return f"Your code ended the whole process (exit code {code}): an answer returns its result and goes on."
        return f"The process was killed by signal {-code}: it may have run out of memory."

    def _read_replies(self) -> None:
        try:
            while True:
                self._replies.put(wire.receive(self._process.stdout))
        except (EOFError, ValueError, OSError):
            try:
                # The process closes its pipe a moment before its exit code is known.
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                pass
            self._replies.put(None)

    def _count_output(self) -> None:
        while chunk := self._process.stderr.read1(1 << 16):
            self._printed += len(chunk)
            if self._printed > _MOST_OUTPUT:
                self._process.kill()
                return


@dataclass(frozen=True)
class Result:
    """One exercise's verdict and points."""

    exercise: str
    verdict: Verdict
    points: int
    of: int

    def __str__(self) -> str:
        mark = "right" if self.verdict.passed else "wrong" if self.verdict.attempted else "open "
        return f"{mark}  {self.exercise:<24} {self.points} of {self.of}  {self.verdict.says}"


@dataclass(frozen=True)
class Report:
    """What `vlm-course check` prints. exit_code: 0 all right, 1 something wrong or open, 2 nothing could be checked."""

    results: tuple[Result, ...]
    problem: str = ""

    @property
    def lines(self) -> list[str]:
        """One line an exercise and the sum, or the one sentence why nothing was checked."""
        if self.problem:
            return [self.problem]
        got, of = sum(result.points for result in self.results), sum(result.of for result in self.results)
        return [*map(str, self.results), f"{got} of {of} points"]

    @property
    def exit_code(self) -> int:
        """For the shell."""
        if self.problem:
            return 2
        return 0 if all(result.verdict.passed for result in self.results) else 1

    def __str__(self) -> str:
        return "\n".join(self.lines)


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])


def learner_notebook(chapter: str, start: Path | None = None) -> Path | None:
    """The learner's notebook of a chapter: in work/ below or above `start` (the current directory), or beside it."""
    start = (start or Path.cwd()).resolve()
    for folder in [start / "work", start, *(parent / "work" for parent in start.parents)]:
        if folder.name == "work":
            found = sorted(folder.glob(f"{chapter}_*.ipynb"))
            if found:
                return found[0]
    return None


def check_file(
    chapter: str,
    exercise: str | None = None,
    file: Path | str | None = None,
    *,
    seeds: tuple[int, ...] = (0, 1),
    time_limit: float = 20.0,
    memory_gb: float = 4.0,
) -> Report:
    """Check a chapter's exercises, or one of them, in the learner's notebook or in `file` (.ipynb or .py).

    Each answer runs in a process of its own: `time_limit` seconds a call, `memory_gb` beyond what torch takes.
    """
    chapter = f"{int(chapter):02d}" if str(chapter).isdigit() else str(chapter)
    everything = [*registry.exercises().values(), *registry.questions().values()]
    chosen = [item for item in everything if item.chapter == chapter]
    if not chosen:
        known = sorted({item.chapter for item in everything})
        return Report((), f"Chapter {chapter} has no exercises to check; chapters {', '.join(known)} have.")
    if exercise is not None:
        names = ", ".join(item.name for item in chosen)
        chosen = [item for item in chosen if exercise in (item.name, getattr(item, "attribute", None))]
        if not chosen:
            return Report((), f"Chapter {chapter} has no exercise {exercise!r}; it has {names}.")
    path = Path(file) if file is not None else learner_notebook(chapter)
    if path is None:
        return Report((), f"There is no notebook of chapter {chapter} in work/: run `vlm-course lab`, or give --file.")
    try:
        read(path)
    except SourceError as error:
        return Report((), str(error))
    worker: RemoteAnswer | None = None
    results = []
    try:
        for item in chosen:
            # One process serves until an answer ends it.
            if worker is None or not worker.alive:
                worker = RemoteAnswer(time_limit=time_limit, memory_gb=memory_gb)
            results.append(_check(item, worker, path.resolve(), seeds))
    finally:
        if worker is not None:
            worker.close()
    return Report(tuple(results))


def _check(item: Exercise | Question, worker: RemoteAnswer, path: Path, seeds: tuple[int, ...]) -> Result:
    try:
        if isinstance(item, Question):
            worker.define(path, item.name)
            verdicts = [item.judge(worker.call(()))]
        else:
            worker.define(path, item.attribute, item.off_limits, item.driver)
            verdicts = [examine(item, worker, seed) for seed in seeds]
        verdict = next((v for v in verdicts if not v.passed), verdicts[0])
    except Failure as failure:
        verdict = Verdict(False, failure.says, attempted=failure.kind != "not_attempted")
    return Result(item.name, verdict, item.points if verdict.passed else 0, item.points)
