"""Chapter 2: the projection bridge."""

from vlm_course.grading.chapter02.bridge_flops import BRIDGE_FLOPS
from vlm_course.grading.chapter02.perceiver_resampler import PERCEIVER_RESAMPLER
from vlm_course.grading.chapter02.projection_13b import VISION_PROJECTION_13B
from vlm_course.grading.chapter02.projection_parameters import PROJECTION_PARAMETERS
from vlm_course.grading.chapter02.projection_share import PROJECTION_SHARE
from vlm_course.grading.chapter02.questions import WHAT_PROJECTION_DOES
from vlm_course.grading.chapter02.resampler_parameters import RESAMPLER_PARAMETERS
from vlm_course.grading.chapter02.vision_projection import VISION_PROJECTION

EXERCISES = (
    VISION_PROJECTION,
    VISION_PROJECTION_13B,
    PROJECTION_PARAMETERS,
    PROJECTION_SHARE,
    BRIDGE_FLOPS,
    RESAMPLER_PARAMETERS,
    PERCEIVER_RESAMPLER,
)
QUESTIONS = (WHAT_PROJECTION_DOES,)
