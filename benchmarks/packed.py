"""NaViT's packing beside a padded batch: the same tower, the same images, the same features."""

import torch

from benchmarks.timing import Row, beside, in_turn
from vlm_course.packing import PackedVisionTransformer, PackedViTConfig, pack_images, unpack_images

IMAGES, SHORTEST, LONGEST, PATCH = 64, 64, 336, 16


@torch.no_grad()
def packing(device: str, pairs: int) -> list[Row]:
    """64 images with sides drawn uniformly from 64 to 336 pixels, each cut down to whole patches.

    Packed: rows as long as the largest image, filled by first fit. Padded: one image a row, as long as the largest.
    Laying out the patches is part of both times.
    """
    draw = torch.Generator().manual_seed(0)
    sides = torch.randint(SHORTEST, LONGEST + 1, (IMAGES, 2), generator=draw) // PATCH * PATCH
    images = [torch.randn(3, *size, generator=draw).to(device) for size in sides.tolist()]
    largest = int((sides // PATCH).prod(dim=1).max())
    tower = PackedVisionTransformer(PackedViTConfig(patch_size=PATCH, width=192, layers=12, heads=3, mlp_width=512))
    tower.to(device).eval()
    layouts = {"course": {"capacity": largest}, "padded": {"rows": [[index] for index in range(IMAGES)]}}

    def run(layout: str) -> list[torch.Tensor]:
        packed = pack_images(images, PATCH, **layouts[layout])
        return unpack_images(tower(packed), packed)

    for ours, padded in zip(run("course"), run("padded"), strict=True):
        torch.testing.assert_close(ours, padded, atol=2e-3, rtol=2e-3)
    seconds = in_turn({layout: lambda layout=layout: run(layout) for layout in layouts}, pairs)
    return [
        beside("packing", seconds["course"], {"the same tower, padded to the largest": seconds["padded"]}, asked=0.60)
    ]
