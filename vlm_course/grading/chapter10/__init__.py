"""Chapter 10: fine-tuning LLaVA."""

from vlm_course.grading.chapter10.lora_budget import LORA_BUDGET
from vlm_course.grading.chapter10.lora_linear import LORA_LINEAR
from vlm_course.grading.chapter10.merged_linear import MERGED_LINEAR
from vlm_course.grading.chapter10.questions import AFTER_MERGING

EXERCISES = (LORA_LINEAR, MERGED_LINEAR, LORA_BUDGET)
QUESTIONS = (AFTER_MERGING,)
