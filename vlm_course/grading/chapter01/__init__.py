"""Chapter 1: vision encoders."""

from vlm_course.grading.chapter01.class_and_positions import CLASS_AND_POSITIONS
from vlm_course.grading.chapter01.contrastive_logits import CONTRASTIVE_LOGITS
from vlm_course.grading.chapter01.contrastive_loss import CONTRASTIVE_LOSS
from vlm_course.grading.chapter01.patch_budget import PATCH_BUDGET
from vlm_course.grading.chapter01.patchify import PATCHIFY
from vlm_course.grading.chapter01.questions import FIRST_STEP
from vlm_course.grading.chapter01.select_features import SELECT_FEATURES
from vlm_course.grading.chapter01.vit_flops import VIT_FLOPS

EXERCISES = (
    PATCHIFY,
    CLASS_AND_POSITIONS,
    VIT_FLOPS,
    PATCH_BUDGET,
    CONTRASTIVE_LOGITS,
    CONTRASTIVE_LOSS,
    SELECT_FEATURES,
)
QUESTIONS = (FIRST_STEP,)
