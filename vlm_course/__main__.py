"""`python -m vlm_course` is the same program as `vlm-course`."""

from vlm_course.cli import main

main()
