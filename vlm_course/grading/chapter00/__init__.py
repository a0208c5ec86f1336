"""Chapter 0: two modalities, one model."""

from vlm_course.grading.chapter00.pipeline_shapes import PIPELINE_SHAPES
from vlm_course.grading.chapter00.questions import CORE_CHALLENGE
from vlm_course.grading.chapter00.visual_tokens import VISUAL_TOKENS

EXERCISES = (VISUAL_TOKENS, PIPELINE_SHAPES)
QUESTIONS = (CORE_CHALLENGE,)
