"""What a bridge costs, in closed form: visual tokens, tensor shapes, parameters and floating-point operations."""

from torch import nn

from vlm_course.bridges import VisionProjection
from vlm_course.validation import checks, counts, require_divisible, require_square


@counts(height=1, width=1, patch_size=1)
def visual_tokens(height: int, width: int, patch_size: int) -> int:
    """Patches of a `height` x `width` image (px). A convolution with stride = kernel = patch_size drops the remainder.

    Source: Dosovitskiy et al. 2021 (ViT, arXiv 2010.11929), section 3.1. Class tokens are not counted.
    """
    return (height // patch_size) * (width // patch_size)


@counts(image_size=1, patch_size=1, vision_dim=1, llm_dim=1, text_tokens=0)
def pipeline_shapes(
    image_size: int, patch_size: int, vision_dim: int, llm_dim: int, text_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Shapes on the way from a square image to the language model's input, without the batch.

    Source: Liu et al. 2024 (LLaVA-1.5, arXiv 2310.03744): 336, 14, 1024, 4096 for 7B and 336, 14, 1024, 5120 for 13B.
    """
    patches = (image_size // patch_size) ** 2
    return {
        "image": (3, image_size, image_size),
        "features": (patches, vision_dim),
        "projected": (patches, llm_dim),
        "sequence": (patches + text_tokens, llm_dim),
    }


@counts(vision_dim=1, llm_dim=1)
def projection_parameters(vision_dim: int, llm_dim: int) -> int:
    """Parameters of `VisionProjection(vision_dim, llm_dim)`: two weight matrices and two biases."""
    first = vision_dim * llm_dim + llm_dim
    second = llm_dim * llm_dim + llm_dim
    return first + second


@counts(vision_dim=1, llm_dim=1, llm_parameters=1)
def projection_share(vision_dim: int, llm_dim: int, llm_parameters: int) -> float:
    """Parameters of the bridge over those of the language model, as a fraction."""
    return (vision_dim * llm_dim + llm_dim + llm_dim * llm_dim + llm_dim) / llm_parameters


@counts(tokens=1, vision_dim=1, llm_dim=1)
def bridge_flops(kind: str, tokens: int, vision_dim: int, llm_dim: int) -> int:
    """Floating-point operations of the matrix products of one image's bridge; a multiply-add counts as two.

    `kind` is "linear" or "mlp"; anything else raises ValueError. Biases and the GELU, under 0.1 % here, are left out.
    """
    if kind == "linear":
        return 2 * tokens * vision_dim * llm_dim
    if kind == "mlp":
        return 2 * tokens * (vision_dim * llm_dim + llm_dim * llm_dim)
    raise ValueError(f"kind is {kind!r}, expected 'linear' or 'mlp'")


@counts(dim=1, queries=1, depth=1, heads=1, head_dim=1, mlp_ratio=1)
def resampler_parameters(dim: int, queries: int, depth: int, heads: int, head_dim: int, mlp_ratio: int) -> int:
    """Parameters of `PerceiverResampler`: its linear maps have no biases, its LayerNorms have a scale and a shift.

    Source: Alayrac et al. 2022 (Flamingo, arXiv 2204.14198), appendix A.1.1, without time embeddings.
    """
    norm = 2 * dim
    attention = 2 * norm + 4 * dim * heads * head_dim
    feed_forward = norm + 2 * dim * mlp_ratio * dim
    return queries * dim + depth * (attention + feed_forward) + norm


def build_projection_13b() -> nn.Module:
    """The bridge of LLaVA-1.5-13B: CLIP's 1024 to Vicuna-13B's 5120."""
    return VisionProjection(1024, 5120)


# What follows covers every bridge of the package: parameters, then operations of one image's matrix products and
# convolutions (a multiply-add counts as two; biases, norms and activations are left out).


@counts(vision_dim=1, llm_dim=1)
def linear_parameters(vision_dim: int, llm_dim: int) -> int:
    """Parameters of `LinearBridge(vision_dim, llm_dim)`."""
    return vision_dim * llm_dim + llm_dim


@counts(vision_dim=1, llm_dim=1, factor=1)
def shuffle_parameters(vision_dim: int, llm_dim: int, *, factor: int = 2) -> int:
    """Parameters of `ShuffleProjection`: a LayerNorm and the MLP, over factor**2 patches side by side."""
    return 2 * factor**2 * vision_dim + projection_parameters(factor**2 * vision_dim, llm_dim)


def _check_shuffle(tokens: int, vision_dim: int, llm_dim: int, *, factor: int = 2) -> None:
    require_divisible(tokens, factor**2, "tokens", "factor**2")


@counts(tokens=1, vision_dim=1, llm_dim=1, factor=1)
@checks(_check_shuffle)
def shuffle_flops(tokens: int, vision_dim: int, llm_dim: int, *, factor: int = 2) -> int:
    """Operations of `ShuffleProjection` on `tokens` patches."""
    return bridge_flops("mlp", tokens // factor**2, factor**2 * vision_dim, llm_dim)


@counts(tokens=1, dim=1, queries=1, depth=1, heads=1, head_dim=1, mlp_ratio=1)
def resampler_flops(
    tokens: int, *, dim: int, queries: int, depth: int = 1, heads: int = 8, head_dim: int = 64, mlp_ratio: int = 4
) -> int:
    """Operations of `PerceiverResampler` on `tokens` features: the keys are the features and the queries."""
    keys, inner = tokens + queries, heads * head_dim
    maps = 2 * dim * inner * (2 * queries + 2 * keys)  # queries and what they read; keys and values
    attention = 4 * queries * keys * inner
    feed_forward = 4 * queries * dim * mlp_ratio * dim
    return depth * (maps + attention + feed_forward)


def _regnet_block(in_channels: int, channels: int, cells: int) -> tuple[int, int]:
    """(parameters, operations) of `RegBlock` on a map of so many cells."""
    squeezed = max(1, round(in_channels / 4))
    convolutions = in_channels * channels + 9 * channels + channels * channels
    gate = 2 * channels * squeezed
    norms = 3 * 2 * channels
    if in_channels != channels:
        convolutions += in_channels * channels
        norms += 2 * channels
    return convolutions + gate + squeezed + channels + norms, 2 * (convolutions * cells + gate)


def _abstractor(
    vision_dim: int, llm_dim: int, queries: int, hidden: int, depth: int, mlp_depth: int, cells: int
) -> tuple[int, int]:
    widths = [vision_dim] + [hidden] * max(depth - 1, 0)
    blocks = [_regnet_block(width, hidden, cells) for width in widths[:depth]]
    blocks += [_regnet_block(hidden, hidden, queries)] * depth
    mlp = hidden * llm_dim + (mlp_depth - 1) * llm_dim * llm_dim
    parameters = sum(block[0] for block in blocks) + mlp + mlp_depth * llm_dim
    return parameters, sum(block[1] for block in blocks) + 2 * queries * mlp


@counts(vision_dim=1, llm_dim=1, queries=1, hidden=1, depth=1, mlp_depth=1)
@checks(lambda *args, queries, **rest: require_square(queries, "queries"))
def abstractor_parameters(
    *, vision_dim: int, llm_dim: int, queries: int, hidden: int = 1024, depth: int = 3, mlp_depth: int = 2
) -> int:
    """Parameters of `CAbstractor` without learned positions, which add one vector for each patch."""
    return _abstractor(vision_dim, llm_dim, queries, hidden, depth, mlp_depth, 0)[0]


@counts(tokens=1, vision_dim=1, llm_dim=1, queries=1, hidden=1, depth=1, mlp_depth=1)
@checks(lambda *args, queries, **rest: require_square(queries, "queries"))
def abstractor_flops(
    tokens: int, *, vision_dim: int, llm_dim: int, queries: int, hidden: int = 1024, depth: int = 3, mlp_depth: int = 2
) -> int:
    """Operations of `CAbstractor` on `tokens` patches: the first stage sees all of them, the second `queries`."""
    return _abstractor(vision_dim, llm_dim, queries, hidden, depth, mlp_depth, tokens)[1]


@counts(dim=1, vision_dim=1, queries=1, layers=1, mlp_width=1, cross_every=1, vocab_size=0, max_length=1)
def qformer_parameters(
    *, dim: int = 768, vision_dim: int = 1408, queries: int = 32, layers: int = 12, mlp_width: int = 3072,
    cross_every: int = 2, vocab_size: int = 0, max_length: int = 512,
) -> int:  # fmt: skip
    """Parameters of `QFormer`; the number of heads does not matter."""
    norm = 2 * dim
    attention = 4 * (dim * dim + dim) + norm
    cross = 2 * (dim * dim + dim) + 2 * (vision_dim * dim + dim) + norm
    mlp = 2 * dim * mlp_width + mlp_width + dim + norm
    count = queries * dim + norm + layers * (attention + mlp) + -(-layers // cross_every) * cross
    return count + (layers * mlp + (vocab_size + max_length) * dim if vocab_size else 0)


@counts(tokens=1, dim=1, vision_dim=1, queries=1, layers=1, mlp_width=1, cross_every=1, words=0)
def qformer_flops(
    tokens: int, *, dim: int = 768, vision_dim: int = 1408, queries: int = 32, layers: int = 12,
    mlp_width: int = 3072, cross_every: int = 2, words: int = 0,
) -> int:  # fmt: skip
    """Operations of `QFormer` on `tokens` features and an instruction of `words` tokens."""
    length = queries + words
    itself = 8 * length * dim * dim + 4 * length * length * dim
    image = 4 * queries * dim * dim + 4 * tokens * vision_dim * dim + 4 * queries * tokens * dim
    return layers * (itself + 4 * length * dim * mlp_width) + -(-layers // cross_every) * image
