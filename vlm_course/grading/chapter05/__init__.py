"""Chapter 5: the LLaVA architecture."""

from vlm_course.grading.chapter05.greedy_cached import GREEDY_CACHED
from vlm_course.grading.chapter05.greedy_decode import GREEDY_DECODE
from vlm_course.grading.chapter05.kv_cache import PLAIN_KV_CACHE
from vlm_course.grading.chapter05.pass_floor import PASS_FLOOR
from vlm_course.grading.chapter05.plain_llava import PLAIN_LLAVA
from vlm_course.grading.chapter05.questions import HOW_MANY_NEW

EXERCISES = (PLAIN_LLAVA, GREEDY_DECODE, PLAIN_KV_CACHE, GREEDY_CACHED, PASS_FLOOR)
QUESTIONS = (HOW_MANY_NEW,)
