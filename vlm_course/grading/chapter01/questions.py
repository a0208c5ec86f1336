"""The check question of chapter 1."""

from vlm_course.grading.quiz import Option, Question

FIRST_STEP = Question(
    name="q_1_1",
    chapter="01",
    text="What does a vision transformer do to an image first?",
    options={
        "a": Option(
            "It lets every pixel attend to every other pixel.",
            "336 x 336 pixels would be 112,896 tokens. Attention comes later, among patches.",
        ),
        "b": Option(
            "It finds the objects and makes a token of each.",
            "The cut is a fixed grid that knows nothing of the content: one object spreads over many patches.",
        ),
        "c": Option(
            "It slides small overlapping filters over the image, as a convolutional network does.",
            "It is close: the step is a convolution. But the stride is the kernel's size, so nothing overlaps.",
        ),
        "d": Option(
            "It cuts the image into squares that do not overlap and maps each to a vector with one linear map.",
            "The two together are one convolution with stride = kernel = patch size. Class token, positions and the "
            "transformer follow.",
        ),
    },
    answer="d",
)
