"""Write the word list of the shipped tokenizer again: python -m vlm_course.pretrained"""

import json

from ..worlds.templates import vocabulary
from . import FOLDER

(FOLDER / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=0) + "\n", encoding="utf-8")
