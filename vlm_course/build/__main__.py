"""`python -m vlm_course.build [--check] [--measure] [NN ...]`."""

import argparse
import sys

from vlm_course.build import main

parser = argparse.ArgumentParser(
    prog="python -m vlm_course.build", description="Build the notebooks from solutions/*.py."
)
parser.add_argument("chapters", nargs="*", help="numbers or slugs; all chapters by default")
parser.add_argument("--check", action="store_true", help="compare with the committed notebooks, execute nothing")
parser.add_argument("--measure", action="store_true", help="renew the measured seconds and memory")
arguments = parser.parse_args()
sys.exit(main(arguments.chapters, check=arguments.check, measure=arguments.measure))
