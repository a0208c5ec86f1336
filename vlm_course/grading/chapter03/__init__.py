"""Chapter 3: fusion."""

from vlm_course.grading.chapter03.dimensions import CROSS_ATTENTION_PARAMETERS, GATED_BLOCK_PARAMETERS
from vlm_course.grading.chapter03.gated_cross_attention import GATED_CROSS_ATTENTION
from vlm_course.grading.chapter03.media_mask import MEDIA_MASK
from vlm_course.grading.chapter03.prefix_mask import PREFIX_MASK
from vlm_course.grading.chapter03.questions import HOW_THEY_MEET, WHY_IT_HALLUCINATES
from vlm_course.grading.chapter03.splice import SPLICE

EXERCISES = (
    SPLICE,
    PREFIX_MASK,
    MEDIA_MASK,
    GATED_CROSS_ATTENTION,
    CROSS_ATTENTION_PARAMETERS,
    GATED_BLOCK_PARAMETERS,
)
QUESTIONS = (HOW_THEY_MEET, WHY_IT_HALLUCINATES)
