"""Predictions: answered with a confidence before anything runs, revealed after, and compared at the end of the course.

Everything stays in `course-progress.json`, in VLM_COURSE_HOME if that is set, else in the learner's work directory.
Nothing is ever sent.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FILE = "course-progress.json"
_DEFAULT_CONFIDENCE = 0.7
_ENOUGH = 3  # revealed predictions before a calibration plot says anything


@dataclass(frozen=True)
class Prediction:
    """One stored prediction. `right` is None until it has been revealed; `confidence` is a probability in 0..1."""

    name: str
    answer: str
    confidence: float
    right: str | None = None

    @property
    def hit(self) -> bool | None:
        """Whether it came true; None before the answer is revealed."""
        return None if self.right is None else self.answer == self.right


def path() -> Path:
    """Where predictions are kept: found from the current directory, its parents' work/ included."""
    home = os.getenv("VLM_COURSE_HOME")
    if home:
        return Path(home) / _FILE
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.name == "work":
            return folder / _FILE
        if (folder / "work").is_dir() and (folder / "vlm_course").is_dir():
            return folder / "work" / _FILE
    return here / _FILE


def load() -> dict[str, Prediction]:
    """All stored predictions by name. A damaged file is moved aside, and a line says so."""
    file = path()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["predictions"]
        return {name: Prediction(name, **_checked(fields)) for name, fields in stored.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        aside = file.with_name(f"{file.stem}.damaged{file.suffix}")
        os.replace(file, aside)
        print(f"{file.name} could not be read. It is now called {aside.name}, and your predictions start afresh.")
        return {}


def _checked(fields: dict) -> dict:
    """The fields of one stored prediction; TypeError or ValueError when somebody edited them into something else."""
    answer, confidence, right = fields["answer"], float(fields["confidence"]), fields.get("right")
    if not isinstance(answer, str) or not 0 <= confidence <= 1 or not isinstance(right, str | None):
        raise ValueError("not a prediction")
    return {"answer": answer, "confidence": confidence, "right": right}


def save(predictions: dict[str, Prediction]) -> None:
    """Write all predictions. The file is replaced in one step, so an interruption leaves the old or the new one."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {p.name: {"answer": p.answer, "confidence": p.confidence, "right": p.right} for p in predictions.values()}
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".course-progress-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"version": 1, "predictions": stored}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def remember(name: str, answer: str, confidence: float) -> None:
    """Store a prediction. One that has been revealed stays as it was: it was made before the answer was known."""
    predictions = load()
    known = predictions.get(name)
    if known is None or known.right is None:
        predictions[name] = Prediction(name, answer, confidence)
        save(predictions)


def predict(
    name: str,
    question: str,
    options: dict[str, str],
    answer: str | None = None,
    confidence: float | None = None,
    *,
    widget: bool = True,
) -> None:
    """Ask for a prediction: prints question and options, then shows buttons where widgets run.

    `answer` (a key of `options`) and `confidence` (0 to 1, 0.7 if left out) store one without widgets. ValueError for
    an answer or a confidence that cannot be.
    """
    if answer is not None and answer not in options:
        raise ValueError(f"The answer is {answer!r}; the options are {', '.join(options)}.")
    if confidence is not None and not 0 <= confidence <= 1:
        raise ValueError(f"The confidence is {confidence}; it is a probability from 0 to 1, such as 0.7.")
    print(question)
    for key, text in options.items():
        print(f"  {key}) {text}")
    if answer is not None:
        chosen = _DEFAULT_CONFIDENCE if confidence is None else confidence
        remember(name, answer, chosen)
        print(f"You predict {answer}, {chosen:.0%} sure.")
    elif widget:
        _show_buttons(name, options)


def _show_buttons(name: str, options: dict[str, str]) -> None:
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError:
        return
    labels = {f"{key}) {text}": key for key, text in options.items()}
    choice = ipywidgets.RadioButtons(options=list(labels), value=None, layout={"width": "auto"})
    sure = ipywidgets.SelectionSlider(
        options=[(f"{percent}%", percent / 100) for percent in range(20, 101, 10)],
        value=_DEFAULT_CONFIDENCE,
        description="How sure?",
    )
    button, note = ipywidgets.Button(description="Predict"), ipywidgets.Label(value="")

    def store(_button) -> None:
        if choice.value is None:
            note.value = "Choose an option first."
            return
        remember(name, labels[choice.value], sure.value)
        note.value = f"Kept: {labels[choice.value]}, {sure.value:.0%} sure."

    button.on_click(store)
    display(ipywidgets.VBox([choice, sure, ipywidgets.HBox([button, note])]))


def reveal(name: str, right: str, because: str = "") -> None:
    """Say what is right, and why, and how it compares with what was predicted, if anything was."""
    predictions = load()
    made = predictions.get(name)
    print(f"The answer is {right}. {because}".rstrip())
    if made is None:
        print("You made no prediction here.")
        return
    if made.right != right:
        predictions[name] = Prediction(name, made.answer, made.confidence, right)
        save(predictions)
    verdict = "and so it is" if made.answer == right else "and it is not"
    print(f"You predicted {made.answer}, {made.confidence:.0%} sure, {verdict}.")


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence: their mean confidence, the share that came true, and how many there are."""

    confidence: float
    accuracy: float
    count: int


def calibration(predictions: dict[str, Prediction] | None = None) -> list[Bin]:
    """Revealed predictions, grouped by confidence to the nearest 10 %."""
    groups: dict[int, list[Prediction]] = {}
    for prediction in (load() if predictions is None else predictions).values():
        if prediction.hit is not None:
            groups.setdefault(int(prediction.confidence * 10 + 0.5), []).append(prediction)
    return [
        Bin(sum(p.confidence for p in group) / len(group), sum(bool(p.hit) for p in group) / len(group), len(group))
        for _, group in sorted(groups.items())
    ]


def calibration_plot():
    """A figure of how often predictions came true against how sure they were; None, and a line, when too few are."""
    bins = calibration()
    revealed = sum(b.count for b in bins)
    if revealed < _ENOUGH:
        print(f"A calibration plot needs {_ENOUGH} revealed predictions; there are {revealed}.")
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 4.5))
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfectly calibrated")
    sizes = [40 * b.count for b in bins]
    axes.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=sizes, label="your predictions")
    for b in bins:
        axes.annotate(str(b.count), (b.confidence, b.accuracy), textcoords="offset points", xytext=(8, -4))
    axes.set(xlim=(0, 1.05), ylim=(-0.05, 1.05), xlabel="how sure you were", ylabel="share that came true")
    axes.set_title("Calibration: below the line is overconfident")
    axes.legend(loc="upper left")
    return figure


def summary() -> str:
    """What `vlm-course progress` prints: how many predictions were made, how many came true, how sure they were."""
    predictions = load()
    if not predictions:
        return "No predictions yet: answer one at the start of a chapter."
    revealed = [p for p in predictions.values() if p.hit is not None]
    lines = [f"{len(predictions)} predictions, {len(revealed)} revealed."]
    if revealed:
        hits, sure = sum(bool(p.hit) for p in revealed), sum(p.confidence for p in revealed) / len(revealed)
        lines.append(f"{hits} of {len(revealed)} came true ({hits / len(revealed):.0%}); you were {sure:.0%} sure.")
        lines += [
            f"  about {b.confidence:.0%} sure: {b.accuracy:.0%} of {b.count} came true"
            for b in calibration(predictions)
        ]
    return "\n".join(lines)
