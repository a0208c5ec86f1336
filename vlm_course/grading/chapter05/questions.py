"""The check question of chapter 5."""

from vlm_course.grading.quiz import Option, Question

HOW_MANY_NEW = Question(
    name="q_5_1",
    chapter="05",
    text="How many components that did not exist before does LLaVA add to connect vision and language?",
    options={
        "a": Option(
            "None: the language model learns to read CLIP's features as they are.",
            "The widths differ, 1024 against 4096 or 5120, so the two tensors cannot even be joined.",
        ),
        "b": Option(
            "One: the bridge between the vision tower and the language model.",
            "Tower and language model are taken as they are; the bridge is the only part that starts from fresh "
            "weights. The language model is tuned later, but not replaced.",
        ),
        "c": Option(
            "Two: the bridge, and a cross-attention layer in every block of the language model.",
            "Flamingo adds cross-attention. LLaVA puts visual tokens among the words, and ordinary self-attention "
            "reads them.",
        ),
        "d": Option(
            "Three: a vision tower, a bridge and a language model.",
            "The model has three parts, but two of them were there before: CLIP ViT-L/14 and Vicuna.",
        ),
    },
    answer="b",
)
