"""What a bridge costs, in closed form: visual tokens, tensor shapes, parameters and floating-point operations."""

from torch import nn

from vlm_course.bridges import VisionProjection


def visual_tokens(height: int, width: int, patch_size: int) -> int:
    """Patches of a `height` x `width` image (px). A convolution with stride = kernel = patch_size drops the remainder.

    Source: Dosovitskiy et al. 2021 (ViT, arXiv 2010.11929), section 3.1. Class tokens are not counted.
    """
    return (height // patch_size) * (width // patch_size)


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


def projection_parameters(vision_dim: int, llm_dim: int) -> int:
    """Parameters of `VisionProjection(vision_dim, llm_dim)`: two weight matrices and two biases."""
    first = vision_dim * llm_dim + llm_dim
    second = llm_dim * llm_dim + llm_dim
    return first + second


def projection_share(vision_dim: int, llm_dim: int, llm_parameters: int) -> float:
    """Parameters of the bridge over those of the language model, as a fraction."""
    return (vision_dim * llm_dim + llm_dim + llm_dim * llm_dim + llm_dim) / llm_parameters


def bridge_flops(kind: str, tokens: int, vision_dim: int, llm_dim: int) -> int:
    """Floating-point operations of the matrix products of one image's bridge; a multiply-add counts as two.

    `kind` is "linear" or "mlp"; anything else raises ValueError. Biases and the GELU, under 0.1 % here, are left out.
    """
    if kind == "linear":
        return 2 * tokens * vision_dim * llm_dim
    if kind == "mlp":
        return 2 * tokens * (vision_dim * llm_dim + llm_dim * llm_dim)
    raise ValueError(f"kind is {kind!r}, expected 'linear' or 'mlp'")


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
