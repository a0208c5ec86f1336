"""`vlm-course ask IMAGE QUESTION`: one question about one image, answered by the shipped model.

The question is read first (`scope`): what the model was not made for is refused. What is left is put to the model in
the wording of its training (`answering`). An image unlike the scenes of the training gets its answer with a warning
(`novelty`).
"""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..image_files import ImageFileError, load_image
from .scope import QuestionError, Refusal, understand

if TYPE_CHECKING:
    from ..trace import TraceRow
    from .drawing import Mark
    from .reader import Reader

MAX_SIDE = 1024  # the model sees 96 pixels; more than this is only for the picture with the boxes
UNSURE = 0.6


@dataclass
class Outcome:
    """Everything that is known after a question; the fields are the keys of `--json`.

    Attributes:
        understood: the question in the wording of the training, None if it was refused.
        answer: None if there is none, and then `error` says why in one sentence.
        confidence: probability of the answer's tokens.
        boxes: label and corners (x, y, x, y in pixels of the file) of what the answer is about; a point has equal ones.
        steps: every question that was put to the model, with its reply and the probability of that.
        trace: with `--trace`, a row for every tensor; else empty. JSON has the same fields as `trace.to_json`.
    """

    image: str
    question: str
    understood: str | None = None
    answer: str | None = None
    confidence: float | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)
    boxes: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    trace: list[TraceRow] = field(default_factory=list)


def ask(image: str | Path, question: str, *, boxes: str | Path | None = None, trace: bool = False) -> Outcome:
    """Put one question about one image to the shipped model.

    Args:
        boxes: draw what the answer is about into this image file.
        trace: list every tensor on the way to the answer.

    Returns:
        the outcome; where the image or the question cannot be used, its `error` says why and nothing is raised.
    """
    outcome = Outcome(str(image), question)
    try:
        _ask(outcome, boxes, trace)
    except (ImageFileError, QuestionError, _Unusable) as error:
        outcome.error = str(error)
    return outcome


def main(
    image: str | Path, question: str, boxes: str | Path | None = None, trace: bool = False, json: bool = False
) -> int:
    """Answer on standard output, warnings and errors on standard error.

    Args:
        boxes: draw what the answer is about into this image file.
        trace: list every tensor on the way to the answer.
        json: print one JSON object with the fields of `Outcome` instead.

    Returns:
        0 with an answer, 2 where the image or the question cannot be used.
    """
    outcome = ask(image, question, boxes=boxes, trace=trace)
    if json:
        print(jsonlib.dumps(asdict(outcome), indent=2, ensure_ascii=False))
    else:
        for warning in outcome.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if outcome.error:
            print(outcome.error, file=sys.stderr)
        else:
            print("\n".join([outcome.answer, *map(_in_words, outcome.boxes)]))
            if outcome.trace:
                from ..trace import format_table

                print(format_table(outcome.trace))
    return 2 if outcome.error else 0


class _Unusable(ValueError):
    pass


def _ask(outcome: Outcome, boxes: str | Path | None, trace: bool) -> None:
    target = _check_target(boxes, outcome.image)
    intent = understand(outcome.question)
    picture = load_image(outcome.image, max_side=MAX_SIDE)
    if isinstance(intent, Refusal):
        raise _Unusable(intent.sentence)

    from ..pretrained import load_small
    from . import novelty
    from .answering import answer, point_out
    from .reader import Reader

    reader = Reader(load_small(), picture)
    outcome.understood = intent.canonical()
    if novelty.load().is_new(reader.patches).item():
        outcome.warnings.append(
            "this image is unlike the drawn scenes that the model was trained on, so do not rely on the answer"
        )
    found = answer(reader, intent)
    outcome.answer, outcome.confidence = found.text, round(found.probability, 4)
    # Neighbouring numbers share the probability of a coordinate, so a low one says little about a place.
    if found.probability < UNSURE and intent.kind not in ("box", "point"):
        outcome.warnings.append(f"the model is not sure (probability {found.probability:.2f})")
    marks = point_out(reader, intent, found) if target or intent.kind in ("box", "point") else []
    outcome.boxes = [_in_file_pixels(mark, picture) for mark in marks]
    if target:
        from .drawing import draw_marks

        draw_marks(picture, marks).save(target)
        if not marks:
            outcome.warnings.append("there is nothing to point to, so the picture has no boxes")
    outcome.steps = [asdict(reply) | {"probability": round(reply.probability, 4)} for reply in reader.replies]
    if trace:
        outcome.trace = _trace(outcome, reader)


def _check_target(boxes: str | Path | None, image: str) -> Path | None:
    if boxes is None:
        return None
    from PIL import Image

    target = Path(boxes).expanduser()
    if Image.registered_extensions().get(target.suffix.lower()) not in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        raise _Unusable(f"The boxes cannot be drawn into {str(boxes)!r}: give the name of a .png file.")
    if not target.parent.is_dir():
        raise _Unusable(f"There is no directory {str(target.parent)!r} for the picture with the boxes: make it first.")
    if target.exists() and Path(image).expanduser().exists() and target.samefile(Path(image).expanduser()):
        raise _Unusable("The picture with the boxes would overwrite the image: give another name.")
    return target


def _in_file_pixels(mark: Mark, picture) -> dict:
    """A mark on the picture, which may have been shrunk, in pixels of the file."""
    scale = picture.info["file_size"][0] / picture.width
    return {"label": mark.label, "xyxy": [round(value * scale, 1) for value in mark.xyxy]}


def _in_words(place: dict) -> str:
    left, top, right, bottom = place["xyxy"]
    if (left, top) == (right, bottom):
        return f"{place['label']}: pixel x {left:.0f}, y {top:.0f}"
    return f"{place['label']}: pixels x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"


def _trace(outcome: Outcome, reader: Reader) -> list[TraceRow]:
    import torch

    from ..trace import trace

    return trace(reader.model, torch.tensor([reader.prompt(outcome.understood)]), reader.pixels)
