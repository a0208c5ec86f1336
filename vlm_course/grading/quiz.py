"""Check questions: one right option, and a reason for every option."""

from collections.abc import Callable
from dataclasses import dataclass

from vlm_course.grading.exercise import Verdict


@dataclass(frozen=True)
class Option:
    """One possible answer, and why it is right or wrong."""

    text: str
    reason: str


@dataclass(frozen=True)
class Question:
    """A check question. `options` are keyed by the letter that the learner types."""

    name: str
    chapter: str
    text: str
    options: dict[str, Option]
    answer: str
    points: int = 1

    @property
    def title(self) -> str:
        """How a printed line names it."""
        return "Check question"

    def judge(self, chosen) -> Verdict:
        """The verdict on a letter, with its reason. None and an empty text mean not attempted."""
        if chosen is None or chosen == "":
            return Verdict(False, "Not attempted yet.", attempted=False)
        letter = chosen.strip().strip("()").lower() if isinstance(chosen, str) else chosen
        letters = ", ".join(self.options)
        if not isinstance(letter, str) or letter not in self.options:
            return Verdict(False, f"The answer is one of the letters {letters}; yours is {chosen!r:.80}.")
        if letter != self.answer:
            return Verdict(False, f"Not {letter}. {self.options[letter].reason}", mistake=letter)
        others = "\n".join(f"Not {key}: {option.reason}" for key, option in self.options.items() if key != self.answer)
        return Verdict(True, f"Correct. {self.options[letter].reason}", others)

    def markdown(self) -> str:
        """The question and its options as text, readable without widgets."""
        lines = [f"**{self.text}**", "", *(f"- **{key}**: {option.text}" for key, option in self.options.items())]
        return "\n".join(lines)


def answer_of(value) -> object:
    """The letter in an answer cell: a plain value, or a function of no arguments that returns it."""
    return value() if isinstance(value, Callable) else value


def question(name: str, *, widget: bool = True) -> None:
    """Show a check question: its text and options, and radio buttons that give the reason for what is chosen.

    The text alone is complete; with `widget=False`, or without ipywidgets, nothing else is shown.
    """
    from IPython.display import Markdown, display

    from vlm_course.grading.registry import question as find

    asked = find(name)
    display(Markdown(asked.markdown()))
    if not widget:
        return
    try:
        import ipywidgets
    except ImportError:
        return
    buttons = ipywidgets.RadioButtons(options=list(asked.options), value=None, description="Answer")
    reason = ipywidgets.HTML(value="")

    def chosen(change) -> None:
        verdict = asked.judge(change["new"])
        reason.value = str(verdict).replace("\n", "<br>")

    buttons.observe(chosen, names="value")
    display(ipywidgets.VBox([buttons, reason]))
