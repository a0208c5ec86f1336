"""The matrix that proves a check: every mistake fails under its own name, the blank stub is not an attempt, and every
correct answer passes, for several seeds.

    python -m vlm_course.grading.prove [EXERCISE ...]
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from vlm_course.grading.answers import LocalAnswer
from vlm_course.grading.examine import examine
from vlm_course.grading.exercise import Exercise, FunctionInterface
from vlm_course.grading.registry import exercises, twin


@dataclass(frozen=True)
class Proof:
    """What the matrix found. `survivors` passed though wrong, `unnamed` failed under another name."""

    exercise: str
    mistakes: int
    correct: int
    survivors: tuple[str, ...]
    unnamed: tuple[str, ...]
    alarms: tuple[str, ...]
    stubs_taken_for_attempts: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the check is proven."""
        return not (self.survivors or self.unnamed or self.alarms or self.stubs_taken_for_attempts)

    def __str__(self) -> str:
        line = f"{self.exercise}: killed {self.mistakes - len(self.survivors)} of {self.mistakes}"
        line += f", false alarms {len(self.alarms)} of {self.correct}"
        faults = {
            "survivors": self.survivors,
            "unnamed": self.unnamed,
            "rejected": self.alarms,
            "stubs": self.stubs_taken_for_attempts,
        }
        return line + "".join(f"; {kind}: {', '.join(names)}" for kind, names in faults.items() if names)


def stubs(item: Exercise) -> dict:
    """The blank answers: what a learner's notebook holds before anything is written."""

    def blank(*_args, **_kwargs):
        raise NotImplementedError("write your solution here")

    if isinstance(item.interface, FunctionInterface):
        return {"blank": blank}

    class BlankForward(nn.Module):
        def __init__(self, *_args, **_kwargs):
            super().__init__()

        forward = blank

    # A builder that raises, and a class of which only the call raises; the latter has no parameters yet.
    return {"blank": blank, "blank forward": BlankForward}


def correct_answers(item: Exercise) -> dict:
    """The package's own definition and the differently written ones."""
    return {"the package's": twin(item), **item.also_correct}


def prove(item: Exercise, seeds: Iterable[int] = range(3)) -> Proof:
    """Run the whole matrix of one exercise."""
    survivors, unnamed, alarms, attempts = [], [], [], []
    for seed in seeds:
        for name, mistake in item.mistakes.items():
            verdict = examine(item, LocalAnswer(mistake.answer, item.off_limits, item.driver), seed)
            if verdict.passed:
                survivors.append(f"{name} (seed {seed})")
            elif verdict.mistake != name:
                unnamed.append(f"{name} (seed {seed}: {verdict.says})")
        for name, answer in correct_answers(item).items():
            # The package's own answer is right and not allowed, so it is judged here by what it computes.
            verdict = examine(item, LocalAnswer(answer, driver=item.driver), seed)
            if not verdict.passed:
                alarms.append(f"{name} (seed {seed}: {verdict.says})")
        for name, stub in stubs(item).items():
            if examine(item, LocalAnswer(stub, item.off_limits, item.driver), seed).attempted:
                attempts.append(f"{name} (seed {seed})")
    return Proof(
        item.name,
        len(item.mistakes),
        len(correct_answers(item)),
        tuple(survivors),
        tuple(unnamed),
        tuple(alarms),
        tuple(attempts),
    )


def main(names: list[str]) -> int:
    """Print one line an exercise; 1 if any check is not proven."""
    known = exercises()
    proofs = []
    for name in names or known:
        proofs.append(prove(known[name]))
        print(proofs[-1], flush=True)
    return 0 if all(proof.holds for proof in proofs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
