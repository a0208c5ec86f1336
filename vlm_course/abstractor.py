"""mPLUG-Owl's visual abstractor, the bridge of DocOwl 1 and, with places for its crops, of UReader.

Learned queries read the image in every layer, and themselves beside it; a gated feed-forward net follows.
Sources: Ye et al. 2023 (mPLUG-Owl, arXiv 2304.14178), the section on the architecture; DocOwl (arXiv 2307.02499), which
keeps it; X-PLUG/mPLUG-Owl at 903fb73, mPLUG-Owl/mplug_owl/configuration_mplug_owl.py, for the sizes;
LukeForeverYoung/UReader at 978ac69, mplug_owl/modeling_mplug_owl.py, MplugOwlVisualAbstractorModel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend
from vlm_course.shape_cropping import CropPositions
from vlm_course.validation import checks, counts, require_divisible, require_same_device, require_shape


def _check_layer(self: "AbstractorLayer", queries: Tensor, features: Tensor) -> None:
    require_shape(queries, "queries", "B M D", D=self.to_q.in_features)
    require_shape(features, "features", "B N D", B=queries.shape[0], D=self.to_q.in_features)
    require_same_device(queries=queries, features=features, **{"the layer": self.to_q.weight})


def _check_layer_sizes(self, dim: int, heads: int, mlp_width: int) -> None:
    require_divisible(dim, heads, "dim", "heads")


@counts(dim=1, heads=1, mlp_width=1)
@checks(_check_layer, init=_check_layer_sizes)
class AbstractorLayer(nn.Module):
    """Queries attend to themselves and to the image at once. forward: queries [B, M, D], features [B, N, D] ->
    [B, M, D].

    The residual stream holds the normalised queries, not what came in: the released code adds to them, and calls it
    a hack. A LayerNorm stands inside the gated net, before its last map.
    """

    def __init__(self, dim: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_features, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, mlp_width), nn.Linear(dim, mlp_width)
        self.norm_gated = nn.LayerNorm(mlp_width, eps=1e-6)
        self.down = nn.Linear(mlp_width, dim)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        x = self.norm_queries(queries)
        context = torch.cat([x, self.norm_features(features)], dim=1)  # [B, M, D], [B, N, D] -> [B, M + N, D]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        x = x + self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D]
        y = self.norm_mlp(x)
        return x + self.down(self.norm_gated(F.silu(self.gate(y)) * self.up(y)))  # [B, M, D] -> hidden -> [B, M, D]


def _check_forward(self: "VisualAbstractor", features: Tensor, places: Tensor | None = None) -> None:
    hint = "was the bridge built for another vision tower?"
    require_shape(features, "features", "B N D", D=self.queries.shape[1], hint=hint)
    require_same_device(features=features, bridge=self.queries)
    if (places is None) != (self.positions is None):
        have = 0 if self.positions is None else self.positions.rows.num_embeddings
        got = "no places" if places is None else f"places {list(places.shape)}"
        raise ValueError(f"got {got}, but the bridge knows {have} rows and columns of crops: give both or neither")


def _check_sizes(self, vision_dim: int, llm_dim: int, *, heads: int = 16, **rest: object) -> None:
    require_divisible(vision_dim, heads, "vision_dim", "heads")


@checks(_check_forward, init=_check_sizes)
@counts(vision_dim=1, llm_dim=1, queries=1, layers=1, heads=1, mlp_width=1, places=0)
class VisualAbstractor(nn.Module):
    """`queries` tokens and an end token for each image or crop. forward: features [B, N, D_vision], with CLS where the
    tower has one, places [B, 2] -> [B, queries + 1, D_llm].

    `places` > 0 gives UReader's rows and columns of crops (`CropPositions`), added before the last linear map, and then
    forward needs the crops' places; 0 is DocOwl 1's and mPLUG-Owl's. The defaults are the released sizes.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        *,
        queries: int = 64,
        layers: int = 6,
        heads: int = 16,
        mlp_width: int = 4096,
        places: int = 0,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, vision_dim) * 0.02)
        self.layers = nn.ModuleList(AbstractorLayer(vision_dim, heads, mlp_width) for _ in range(layers))
        self.positions = CropPositions(vision_dim, places=places) if places else None
        self.project = nn.Linear(vision_dim, llm_dim)
        self.end = nn.Parameter(torch.randn(1, 1, llm_dim) * 0.02)

    def forward(self, features: Tensor, places: Tensor | None = None) -> Tensor:
        x = self.queries.expand(len(features), -1, -1)  # [M, D] -> [B, M, D]
        for layer in self.layers:
            x = layer(x, features)  # [B, M, D]
        if self.positions is not None:
            x = self.positions(x, places)  # [B, M, D]
        tokens = self.project(x)  # [B, M, D] -> [B, M, D_llm]
        return torch.cat([tokens, self.end.expand(len(tokens), -1, -1)], dim=1)  # [B, M + 1, D_llm]
