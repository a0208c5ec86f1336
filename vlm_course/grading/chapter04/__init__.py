"""Chapter 4: visual instruction tuning."""

from vlm_course.grading.chapter04.answer_weights import ANSWER_WEIGHTS
from vlm_course.grading.chapter04.division_factor import DIVISION_FACTOR
from vlm_course.grading.chapter04.instruction_loss import INSTRUCTION_LOSS
from vlm_course.grading.chapter04.pack_row import PACK_ROW
from vlm_course.grading.chapter04.questions import WHAT_TUNING_CHANGES
from vlm_course.grading.chapter04.response_labels import RESPONSE_LABELS
from vlm_course.grading.chapter04.response_loss import RESPONSE_LOSS
from vlm_course.grading.chapter04.vicuna_prompt import VICUNA_PROMPT

EXERCISES = (
    VICUNA_PROMPT,
    RESPONSE_LABELS,
    INSTRUCTION_LOSS,
    RESPONSE_LOSS,
    DIVISION_FACTOR,
    ANSWER_WEIGHTS,
    PACK_ROW,
)
QUESTIONS = (WHAT_TUNING_CHANGES,)
