"""The check question of chapter 2."""

from vlm_course.grading.quiz import Option, Question

WHAT_PROJECTION_DOES = Question(
    name="q_2_1",
    chapter="02",
    text="What does the projection layer of LLaVA-1.5 do?",
    options={
        "a": Option(
            "It compresses the image into fewer tokens.",
            "The MLP works on each token by itself: 576 go in and 576 come out. A resampler is what compresses.",
        ),
        "b": Option(
            "It replaces each patch by the nearest word of the vocabulary.",
            "Its output is continuous, and nothing in the training makes it land on a word's embedding.",
        ),
        "c": Option(
            "It maps each visual token to the width of the language model's embeddings, and is trained until the "
            "language model can use the result.",
            "Both halves count: without the width nothing can be joined, without the training the tokens mean nothing.",
        ),
        "d": Option(
            "It brings every visual token to 4096 numbers, in the 7B and the 13B model alike.",
            "The width is the language model's own: 4096 for 7B, 5120 for 13B.",
        ),
    },
    answer="c",
)
