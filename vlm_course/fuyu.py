"""Fuyu's way of reading images: no vision tower; one linear map takes the pixels of a patch to the language model.

Patches of 30 x 30 pixels, row by row, and a newline token after every row, which tells the decoder how wide the image
is: any size can be read without position embeddings for images. Sources: Bavishi et al. 2023, "Fuyu-8B: A Multimodal
Architecture for AI Agents" (Adept's announcement); transformers, FuyuModel.vision_embed_tokens and FuyuImageProcessor.
"""

from torch import Tensor, nn

from vlm_course.patches import patchify
from vlm_course.validation import require_shape


class LinearPatches(nn.Module):
    """Pixels straight to the language model's width. forward: pixels [B, C, H, W] -> [B, N, D_llm].

    Fuyu flattens a patch in the order (row, column, channel); `patchify` has the channel first. Height and width may
    differ from image to image; the patch size must divide both, else ValueError.
    """

    def __init__(self, *, patch_size: int, width: int, channels: int = 3):
        super().__init__()
        self.patch_size, self.channels = patch_size, channels
        self.linear = nn.Linear(patch_size * patch_size * channels, width)

    def forward(self, pixels: Tensor) -> Tensor:
        require_shape(pixels, "pixels", "B C H W", C=self.channels)
        patches = patchify(pixels, self.patch_size)  # [B, C, H, W] -> [B, N, C*p*p]
        patches = patches.unflatten(-1, (self.channels, -1)).transpose(-1, -2).flatten(-2)  # -> [B, N, p*p*C]
        return self.linear(patches)  # [B, N, p*p*C] -> [B, N, D_llm]


def fuyu_image_ids(grid: tuple[int, int], *, image_id: int, newline_id: int) -> list[int]:
    """The placeholders of one image: a row of `image_id`, then `newline_id`, for every row of the grid.

    grid (rows, columns) of patches -> rows * (columns + 1) ids. Raises ValueError for a grid without patches.
    """
    rows, columns = grid
    if min(grid) < 1:
        raise ValueError(f"the grid is {grid}, expected at least one row and one column of patches")
    return ([image_id] * columns + [newline_id]) * rows
