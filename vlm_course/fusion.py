"""How visual features meet text: spliced in at <image> (LLaVA), or read through gated cross-attention (Flamingo)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlm_course.attention import attend, media_attention_mask
from vlm_course.validation import checks, checks_on_request, counts, require_same_device, require_shape


def _cause(placeholders: int, features: int) -> str:
    if placeholders == 0:
        return "does the prompt lack its <image>?"
    if placeholders == 1:
        return "was <image> not expanded to one placeholder per feature?"
    if features == placeholders + 1 and math.isqrt(placeholders) ** 2 == placeholders:
        return "is the CLS token still among the features?"
    if abs(features - placeholders) == 1:
        return "was a patch token dropped with CLS?"
    if placeholders < features:
        return "did truncation cut the prompt inside the image?"
    return "does the prompt hold more images than were given?"


def _splice_rule(embeds, ids, features, image_id, *, check):
    """Compares the placeholders of every row with the features. This reads values back from the device, so training
    passes `check=False`, and a compiled graph or the meta device never does it."""
    ranks = (embeds.dim(), ids.dim(), features.dim()) == (3, 2, 3)
    if not ranks or embeds.shape[:2] != ids.shape or features.shape[-1] != embeds.shape[-1]:
        raise ValueError(
            f"embeds {tuple(embeds.shape)}, ids {tuple(ids.shape)}, features {tuple(features.shape)}: expected "
            "[B, T, D], [B, T] and [images, M, D]; does the bridge end in another width than the language model's?"
        )
    if 0 in embeds.shape or 0 in features.shape:
        raise ValueError(f"embeds {tuple(embeds.shape)}, features {tuple(features.shape)}: expected no axis of size 0")
    require_same_device(embeds=embeds, ids=ids, features=features)
    if not check or ids.is_meta or torch.compiler.is_compiling():
        return
    images, per_image = features.shape[:2]
    found = (ids == image_id).sum(dim=1).tolist()
    for row, count in enumerate(found):
        if count % per_image:
            raise ValueError(
                f"image has {count} placeholders but the tower gave {per_image} features (row {row}): "
                + _cause(count, per_image)
            )
    if sum(found) != images * per_image:
        raise ValueError(
            f"the batch has {sum(found)} placeholders but the tower gave {images} x {per_image} = "
            f"{images * per_image} features: {_cause(sum(found), images * per_image)}"
        )


@checks_on_request(_splice_rule)
def splice_image_features(embeds: Tensor, ids: Tensor, features: Tensor, image_id: int) -> Tensor:
    """Puts the visual features where the placeholders are; every other token keeps its embedding.

    embeds [B, T, D]; ids [B, T]; features [n_images, M, D] in the order in which the images appear, row after row
    (n_images = B with one image per row) -> [B, T, D], with the embeddings' dtype. Waits for no device value.
    Raises ValueError when a row's placeholders are not whole images (`check=False` leaves that out).
    Source: LLaVA (Liu et al. 2023), section 4.1.
    """
    is_image = ids == image_id  # [B, T]
    order = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # [B * T], the feature that each placeholder takes
    chosen = features.flatten(0, 1)[order].view_as(embeds)  # [n_images * M, D] -> [B, T, D]
    return torch.where(is_image[..., None], chosen.to(embeds.dtype), embeds)


@counts(image_id=0, count=1)
def expand_image_placeholder(ids: list[int], image_id: int, count: int) -> list[int]:
    """Repeats every <image> `count` times, one placeholder per visual token. Apply it once, before padding."""
    return [token for token in ids for _ in range(count if token == image_id else 1)]


def _media_mask_rule(ids, image_id, n_images):
    require_shape(ids, "ids", "B T", floating=False)
    if not (ids.is_meta or torch.compiler.is_compiling()):
        most = int((ids == image_id).sum(dim=1).max())
        if most > n_images:
            raise ValueError(f"a row has {most} image tokens but n_images is {n_images}: was <image> expanded already?")


@counts(image_id=0, n_images=1)
@checks(_media_mask_rule)
def media_mask(ids: Tensor, image_id: int, n_images: int) -> Tensor:
    """Which image each token reads: the last one before it (an <image> reads itself), none before the first.

    ids [B, T] with one unexpanded <image> per image -> boolean [B, T, n_images].
    Source: Flamingo (Alayrac et al. 2022), section 2.3 and figure 7.
    """
    seen = (ids == image_id).cumsum(dim=1)  # [B, T], images so far, this token included
    numbers = torch.arange(1, n_images + 1, device=ids.device)  # [n_images]
    return seen[:, :, None] == numbers  # [B, T] -> [B, T, n_images]


@counts(image_id=0, n_images=1, eos_id=0)
@checks(lambda ids, image_id, n_images, eos_id: _media_mask_rule(ids, image_id, n_images))
def packed_media_mask(ids: Tensor, image_id: int, n_images: int, eos_id: int) -> Tensor:
    """`media_mask` for rows that hold several documents: behind <eos> no image is seen until the next <image>.

    ids [B, T] -> boolean [B, T, n_images]. Source: Idefics (Laurencon et al. 2023), the masks of packed sequences.
    """
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)  # [T]
    last_image = torch.where(ids == image_id, place, 0).cummax(dim=1).values  # [B, T], 0 before the first
    last_eos = torch.where(ids == eos_id, place, 0).cummax(dim=1).values
    before = last_eos.roll(1, dims=1).index_fill(1, torch.zeros(1, dtype=torch.long, device=ids.device), 0)
    return media_mask(ids, image_id, n_images) & (last_image > before)[:, :, None]


class SquaredReLU(nn.Module):
    """max(x, 0) squared: the activation in Flamingo's new layers. Source: Primer (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def _cross_attention_rule(self, text, media, mask):
    hint = "was the block built for other towers?"
    require_shape(text, "text", "B T D", D=self.to_q.in_features, hint=hint)
    require_shape(media, "media", "B I M D", B=text.shape[0], D=self.to_k.in_features, hint=hint)
    require_shape(mask, "mask", "B T I", B=text.shape[0], T=text.shape[1], I=media.shape[1], floating=None)
    require_same_device(text=text, media=media, mask=mask, **{"the block": self.attention_gate})


@counts(dim=1, media_dim=1, heads=1, head_dim=1)
@checks(_cross_attention_rule)
class GatedCrossAttention(nn.Module):
    """Text reads images through cross-attention; both sub-layers pass a tanh gate that starts at zero, so a new block
    changes nothing until it is trained.

    forward: text [B, T, D], media [B, n_images, M, D_media], mask [B, T, n_images] from `media_mask` -> [B, T, D].
    `norm` is called with a width. `feed_forward` holds its own norm; by default it is a LayerNorm and an MLP of four
    times the width with `activation` inside. Implementations differ there: the paper's table of sizes lists
    `SquaredReLU`, open_flamingo's code has GELU (the default here), Idefics RMSNorm and SwiGLU. Biases: none.
    Sources: Flamingo (Alayrac et al. 2022, arXiv 2204.14198), section 2.2, figure 4 and, for the activation, the table
    of sizes in its appendix as the flamingo-mini project's wiki quotes it; mlfoundations/open_flamingo,
    open_flamingo/src/helpers.py, GatedCrossAttentionBlock.
    """

    def __init__(
        self,
        *,
        dim: int,
        media_dim: int,
        heads: int = 8,
        head_dim: int = 64,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[], nn.Module] = nn.GELU,
        feed_forward: nn.Module | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.norm = norm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(media_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(media_dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        if feed_forward is None:
            mlp = [nn.Linear(dim, 4 * dim, bias=False), activation(), nn.Linear(4 * dim, dim, bias=False)]
            feed_forward = nn.Sequential(norm(dim), *mlp)
        self.feed_forward = feed_forward
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, text: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        keys = media.flatten(1, 2)  # [B, I, M, D_media] -> [B, I * M, D_media]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, H * d] -> [B, H, T, d]
            for x in (self.to_q(self.norm(text)), self.to_k(keys), self.to_v(keys))
        )
        read = attend(q, k, v, mask=media_attention_mask(mask, media.shape[2]))  # [B, H, T, d], zeros before any image
        read = self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, T, d] -> [B, T, D]
        text = text + self.attention_gate.tanh() * read
        return text + self.feed_forward_gate.tanh() * self.feed_forward(text)
