"""TextMonkey's token resampler: tokens that say what later ones say again are dropped, and those kept read all of them.

Sources: Liu et al. 2024 (TextMonkey, arXiv 2403.04473), the section on the token resampler; Yuliang-Liu/Monkey at
9ccd057, monkey_model/text_monkey/merge.py (self_soft_matching) and resampler.py (PerceiverResampler).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend, causal_mask
from vlm_course.validation import checks, counts, require_divisible, require_same_device, require_shape


def _check_choice(tokens: Tensor, keep: int) -> None:
    require_shape(tokens, "tokens", "B N D")
    if keep > tokens.shape[1]:
        raise ValueError(f"keep is {keep}, but there are only {tokens.shape[1]} tokens")


@counts(keep=1)
@checks(_check_choice)
def distinct_tokens(tokens: Tensor, keep: int) -> Tensor:
    """Places of the `keep` tokens least like any later one, in order: tokens [B, N, D] -> [B, keep] integers.

    Likeness is the cosine. In the released code a token is compared with those after it alone, so of two alike the
    last one stays, and the very last token always does.
    """
    unit = F.normalize(tokens, dim=-1)  # [B, N, D]
    alike = unit @ unit.transpose(1, 2)  # [B, N, D] x [B, D, N] -> [B, N, N]
    earlier = causal_mask(tokens.shape[1], device=tokens.device)  # [N, N], the token itself included
    repeated = alike.masked_fill(earlier, -2).amax(dim=2)  # [B, N]; -2 is below any cosine
    return repeated.topk(keep, dim=1, largest=False).indices.sort(dim=1).values  # [B, N] -> [B, keep]


def _check_tokens(self: "TokenResampler", tokens: Tensor) -> None:
    require_shape(tokens, "tokens", "B N D", D=self.down.in_features, hint="was it built for another width?")
    require_same_device(tokens=tokens, **{"the resampler": self.scale})
    if self.keep > tokens.shape[1]:
        raise ValueError(f"keep is {self.keep}, but there are only {tokens.shape[1]} tokens")


def _check_sizes(self, dim: int, *, inner: int = 1024, heads: int = 8, keep: int = 512) -> None:
    require_divisible(inner, heads, "inner", "heads")


@checks(_check_tokens, init=_check_sizes)
@counts(dim=1, inner=1, heads=1, keep=1)
class TokenResampler(nn.Module):
    """Fewer tokens of the same width. forward: tokens [B, N, D] -> [B, keep, D].

    The kept tokens are the queries of one attention, narrowed to `inner` channels, to all tokens and to themselves;
    what they read is added to them. `fc2` starts at zero, so at first the tokens are dropped and nothing else happens.
    The defaults are TextMonkey's, for the 1,024 tokens of four windows.
    """

    def __init__(self, dim: int, *, inner: int = 1024, heads: int = 8, keep: int = 512):
        super().__init__()
        self.keep, self.heads = keep, heads
        self.down = nn.Linear(dim, inner, bias=False)
        self.norm_media, self.norm_latents, self.norm = (nn.LayerNorm(inner) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(inner, inner, bias=False) for _ in range(4))
        self.fc1 = nn.Linear(inner, inner, bias=False)
        self.fc2 = nn.Linear(inner, dim, bias=False)
        nn.init.zeros_(self.fc2.weight)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        places = distinct_tokens(tokens, self.keep)  # [B, N, D] -> [B, M]
        kept = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))  # [B, M, D]
        queries = self.norm_latents(self.down(kept))  # [B, M, D] -> [B, M, inner]
        context = torch.cat([self.norm_media(self.down(tokens)), queries], dim=1)  # [B, N + M, inner]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, inner] -> [B, H, T, d]
            for x in (self.to_q(queries), self.to_k(context), self.to_v(context))
        )
        read = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, inner]
        return kept + self.scale * self.fc2(F.gelu(self.fc1(self.norm(read))))  # [B, M, inner] -> [B, M, D]
