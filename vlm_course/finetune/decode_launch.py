"""The decoding step on a GPU: `PlainStep` with every part one Triton kernel, and the choice of their block sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_course.decoder import Decoder
from vlm_course.finetune.decode_plain import PlainStep, State

# rows of a program (pairs of rows for the paired kernels), columns of a tile, warps. The first is used untuned: the
# fastest on an H100 for 7B shapes.
CANDIDATES = {
    "qkv": ((4, 2048, 8), (2, 2048, 4), (4, 1024, 4), (2, 1024, 4)),
    "out": ((8, 1024, 4), (4, 2048, 4), (4, 1024, 4), (4, 4096, 8)),
    "gate_up": ((4, 2048, 8), (2, 2048, 4), (4, 1024, 4), (2, 1024, 4)),
    "down": ((4, 2048, 4), (4, 1024, 4), (8, 1024, 4), (4, 4096, 8)),
    "head": ((4, 1024, 4), (2, 2048, 4), (4, 2048, 8), (8, 1024, 8)),
}


def splits_for(kv_heads: int, processors: int = 132) -> int:
    """Programs among which the keys of one head are divided: a power of two, about two programs a processor."""
    splits = 1
    while splits < 64 and splits * kv_heads <= processors:
        splits *= 2
    return splits


def early_start_works(device: torch.device) -> bool:
    """Whether programmatic dependent launch runs here, tried on a chain of small products. Needs capability 9."""
    if torch.cuda.get_device_capability(device)[0] < 9:
        return False
    from vlm_course.finetune.decode_kernels import residual_kernel

    w, x = torch.eye(64, device=device), torch.ones(64, device=device)
    try:
        for _ in range(10):  # x doubles each time: 1,024 only if each waits for the one before it
            residual_kernel[(16,)](x, w, x, K=64, ROWS=4, BLOCK_K=64, PDL=True, num_warps=1, launch_pdl=True)
        return bool((x == 1024).all())
    except Exception:  # whatever an older Triton says to an option that it does not know
        return False


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _rows(wanted: int, total: int) -> int:
    """The largest power of two up to `wanted` that divides `total`."""
    while total % wanted:
        wanted //= 2
    return wanted


class LaunchedStep(PlainStep):
    """`PlainStep` as five Triton kernels a layer and two for the choice. `blocks_of` maps a kernel to its block sizes.

    pdl: start each kernel while the one before it ends (compute capability 9 and above).
    """

    def __init__(self, decoder: Decoder, state: State, banned: int = -1, *, pdl: bool = False):
        super().__init__(decoder, state, banned)
        from vlm_course.finetune import decode_kernels  # Triton is imported where it is used

        self.kernels, self.pdl = decode_kernels, pdl
        self.options = {"launch_pdl": True} if pdl else {}
        self.block_sizes = {name: sizes[0] for name, sizes in CANDIDATES.items()}
        smallest = min(sizes[0] for sizes in CANDIDATES["head"])
        programs = -(-len(self.head) // (2 * smallest))
        self.best = torch.zeros(programs, device=self.head.device)
        self.which = torch.zeros(programs, dtype=torch.int32, device=self.head.device)

    def _sizes(self, name: str, rows: int, K: int) -> dict[str, int]:
        wanted, block, warps = self.block_sizes[name]
        return {
            "ROWS": _rows(wanted, rows), "BLOCK_K": min(block, _power(K)), "num_warps": warps,
            "PDL": self.pdl, **self.options,
        }  # fmt: skip

    def qkv(self, layer: int) -> None:
        s, w, c = self.state, self.blocks[layer], self.state.config
        sizes = self._sizes("qkv", c.head_dim // 2, c.width)
        grid = ((c.heads + 2 * c.kv_heads) * (c.head_dim // 2) // sizes["ROWS"],)
        self.kernels.qkv_kernel[grid](
            s.x, w.norm1, w.qkv, s.cos, s.sin, s.length, s.q, s.keys[layer], s.values[layer], c.norm_eps, s.capacity,
            K=c.width, HEADS=c.heads, KV_HEADS=c.kv_heads, HALF=c.head_dim // 2, **sizes,
        )  # fmt: skip

    def attention(self, layer: int) -> None:
        s, c = self.state, self.state.config
        group = c.heads // c.kv_heads
        wide = _power(c.head_dim)
        self.kernels.attention_kernel[(c.kv_heads, s.splits)](
            s.q, s.keys[layer], s.values[layer], s.length, s.parts, s.tops, s.sums, s.count, s.mixed,
            s.capacity, c.head_dim**-0.5,
            D=c.head_dim, DP=wide, GROUP=group, GROUP_P=_power(group), SPLITS=s.splits,
            BLOCK_S=max(4, min(64, 4096 // (_power(group) * wide))), PDL=self.pdl, num_warps=4, **self.options,
        )  # fmt: skip

    def _residual(self, name: str, vector: Tensor, matrix: Tensor) -> None:
        N, K = matrix.shape
        sizes = self._sizes(name, N, K)
        self.kernels.residual_kernel[(N // sizes["ROWS"],)](vector, matrix, self.state.x, K=K, **sizes)

    def out(self, layer: int) -> None:
        self._residual("out", self.state.mixed, self.blocks[layer].out)

    def down(self, layer: int) -> None:
        self._residual("down", self.state.hidden, self.blocks[layer].down)

    def gate_up(self, layer: int) -> None:
        s, w, c = self.state, self.blocks[layer], self.state.config
        sizes = self._sizes("gate_up", c.mlp_width, c.width)
        self.kernels.gate_up_kernel[(c.mlp_width // sizes["ROWS"],)](
            s.x, w.norm2, w.gate_up, s.hidden, c.norm_eps, K=c.width, HIDDEN=c.mlp_width, **sizes
        )

    def logits(self) -> int:
        """The best word of every program; returns how many programs there are."""
        s, c = self.state, self.state.config
        sizes = self._sizes("head", _power(c.vocab_size), c.width)
        programs = -(-c.vocab_size // (2 * sizes["ROWS"]))
        self.kernels.head_kernel[(programs,)](
            s.x, self.norm, self.head, self.best, self.which, c.norm_eps, c.vocab_size, self.banned, K=c.width, **sizes
        )
        return programs

    def choose(self) -> None:
        s, c = self.state, self.state.config
        programs = self.logits()
        self.kernels.choose_kernel[(1,)](
            self.best, self.which, self.embedding, s.x, s.length, s.written, s.tokens, programs,
            PROGRAMS_P=_power(programs), K=c.width, BLOCK_K=min(4096, _power(c.width)), PDL=self.pdl, num_warps=8,
            **self.options,
        )  # fmt: skip

    def parts(self) -> dict[str, Callable[[], object]]:
        """Every kernel over all layers (so that no weight is still in a cache when its turn comes again)."""
        layers = range(len(self.blocks))

        def each(run: Callable[[int], None]) -> Callable[[], None]:
            return lambda: [run(layer) for layer in layers] and None

        return {
            "qkv": each(self.qkv), "attention": each(self.attention), "out": each(self.out),
            "gate_up": each(self.gate_up), "down": each(self.down), "head": self.logits,
        }  # fmt: skip

    def tune(self, milliseconds: Callable[[Callable[[], object]], float]) -> dict[str, dict[str, float]]:
        """Take the fastest block sizes of each kernel. `milliseconds` times a function; returns all times."""
        times: dict[str, dict[str, float]] = {}
        for name, candidates in CANDIDATES.items():
            taken: dict[tuple[int, int, int], float] = {}
            for sizes in candidates:
                self.block_sizes[name] = sizes
                taken[sizes] = milliseconds(self.parts()[name])
            self.block_sizes[name] = min(taken, key=taken.get)
            times[name] = {" ".join(map(str, sizes)): ms for sizes, ms in taken.items()}
        times["attention"] = {"": milliseconds(self.parts()["attention"])}
        return times
