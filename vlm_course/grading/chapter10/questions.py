"""The check question of chapter 10."""

from vlm_course.grading.quiz import Option, Question

AFTER_MERGING = Question(
    name="q_10_1",
    chapter="10",
    text="You tuned a model with LoRA of rank 128, merged A and B into the weights and saved it. What is true of it?",
    options={
        "a": Option(
            "It is smaller than the model you started from, because only A and B are stored.",
            "A file of A and B alone is small, but that is what you save without merging. A merged weight has the "
            "size it always had.",
        ),
        "b": Option(
            "It answers more slowly: each layer now multiplies by three matrices.",
            "That is the model before merging. W + (alpha / rank) B A is one matrix of the old size.",
        ),
        "c": Option(
            "It has the size and the speed of the model you started from, and loads wherever that one does.",
            "Merging leaves nothing of LoRA but other numbers in the same weights, so every program that reads the "
            "model reads it too. Keep A and B as well, if you want to take the update out exactly or mix it anew.",
        ),
        "d": Option(
            "It can only do the new task: the old weights are gone.",
            "The update has low rank and is added to weights that stay as they were. The model may forget some of what "
            "it knew, which must be measured, but it is not a new model.",
        ),
    },
    answer="c",
)
