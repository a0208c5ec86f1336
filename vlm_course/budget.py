"""What a model needs on a GPU, by formula: memory for weights, cache and activations; time to prefill and to decode.

Times are the roofline's lower bounds (Williams et al. 2009): a step takes as long as the slower of its arithmetic at
the peak rate and its memory traffic at the peak bandwidth. Real programs reach a part of either; `efficiency` is it.
Bytes and GB are decimal (10^9), so a "24 GB" card is taken at its name, a little under what it has.
"""

from dataclasses import dataclass

from vlm_course.costs import bridge_flops
from vlm_course.decoder import DecoderConfig
from vlm_course.llava import LlavaConfig
from vlm_course.validation import counts, require_count, require_number
from vlm_course.vit import ViTConfig


@dataclass(frozen=True)
class GPU:
    """memory in bytes, bandwidth in bytes/s, flops in dense 16-bit tensor operations/s."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    source: str

    def __post_init__(self) -> None:
        for name in ("memory", "bandwidth", "flops"):
            require_number(getattr(self, name), name, above=0)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("T4", 16e9, 320e9, 65e12, "NVIDIA T4 data sheet"),
        GPU("L4", 24e9, 300e9, 121e12, "NVIDIA L4 data sheet; 242 with sparsity, halved"),
        GPU(
            "RTX 4090",
            24e9,
            1008e9,
            165.2e12,
            "NVIDIA Ada GPU architecture white paper, appendix A; 32-bit accumulation",
        ),
        GPU("A100-40GB", 40e9, 1555e9, 312e12, "NVIDIA A100 data sheet, SXM"),
        GPU("A100-80GB", 80e9, 2039e9, 312e12, "NVIDIA A100 data sheet, SXM"),
        GPU("H100-80GB", 80e9, 3350e9, 989.4e12, "NVIDIA H100 data sheet, SXM; 1,979 with sparsity, halved"),
        GPU("H200-141GB", 141e9, 4800e9, 989.4e12, "NVIDIA H200 data sheet, SXM; 1,979 with sparsity, halved"),
    )
}


@counts(group=1, group_bits=0)
@dataclass(frozen=True)
class Quantization:
    """Bits of a weight in the decoder's linear layers. `group` weights share `group_bits` of scale and zero point.

    Embeddings, norms, the head, the vision tower and the bridge stay at 16 bits when `bits` is lower, as in AWQ
    (Lin et al. 2024, arXiv 2306.00978) and GPTQ checkpoints.
    """

    name: str
    bits: float
    group: int | None = None
    group_bits: int = 0

    def __post_init__(self) -> None:
        require_number(self.bits, "bits", above=0)

    @property
    def bytes_per_weight(self) -> float:
        return (self.bits + (self.group_bits / self.group if self.group else 0)) / 8

    @property
    def other_bytes(self) -> float:
        """Bytes of a parameter that is not quantised."""
        return max(self.bits, 16) / 8


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("fp32", 32),
        Quantization("fp16", 16),
        Quantization("int8", 8),  # one scale a row of thousands of weights: left out
        Quantization("int4", 4, group=128, group_bits=16 + 4),
    )
}


def _lookup(table: dict, key, what: str):
    if not isinstance(key, str):
        return key
    if key not in table:
        raise ValueError(f"{what} is {key!r}, known are {', '.join(table)}")
    return table[key]


def _require_counts(minimum: int, **values: int) -> None:
    for name, value in values.items():
        require_count(value, name, minimum)


def _require_efficiency(efficiency: float) -> None:
    require_number(efficiency, "efficiency", high=1, above=0)


def _decoder(config: DecoderConfig | LlavaConfig) -> DecoderConfig:
    if isinstance(config, LlavaConfig):
        return config.text
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"the model is a {type(config).__name__}, expected a DecoderConfig or a LlavaConfig")
    return config


def _linear_weights(text: DecoderConfig) -> int:
    """Weights of all blocks' linear layers: what is quantised, and what every token is multiplied with."""
    attention = 2 * text.width * text.head_dim * (text.heads + text.kv_heads)
    return text.layers * (attention + 3 * text.width * text.mlp_width)


def decoder_parameters(text: DecoderConfig) -> int:
    """Parameters of `Decoder(config)`."""
    text = _decoder(text)
    embeddings = text.vocab_size * text.width * (1 if text.tie_embeddings else 2)
    return _linear_weights(text) + embeddings + (2 * text.layers + 1) * text.width


def _require_tower(vision: ViTConfig) -> None:
    if not isinstance(vision, ViTConfig):
        raise ValueError(f"the tower is a {type(vision).__name__}, expected a ViTConfig")


def vit_parameters(vision: ViTConfig) -> int:
    """Parameters of `VisionTransformer(config)`."""
    _require_tower(vision)
    D, M = vision.width, vision.mlp_width
    block = 4 * D * D + 4 * D + 2 * D * M + M + D + 4 * D
    embedding = vision.channels * vision.patch_size**2 * D + D + (1 + vision.n_patches) * D
    return embedding + vision.layers * block + (4 if vision.pre_norm else 2) * D


def parameters(config: DecoderConfig | LlavaConfig) -> int:
    """Parameters of the whole model: a `Decoder`, or a `Llava` with the bridge that its config names."""
    count = decoder_parameters(_decoder(config))
    if isinstance(config, LlavaConfig):
        first = (config.vision.width + 1) * config.text.width
        second = (config.text.width + 1) * config.text.width if config.bridge == "mlp" else 0
        count += vit_parameters(config.vision) + first + second
    return count


def weight_bytes(config: DecoderConfig | LlavaConfig, quantization: str | Quantization = "fp16") -> float:
    """Bytes of all weights. "int4" leaves 16 bits to what is not a linear layer of the decoder's blocks."""
    quantization = _lookup(QUANTIZATIONS, quantization, "quantization")
    linear = _linear_weights(_decoder(config))
    return linear * quantization.bytes_per_weight + (parameters(config) - linear) * quantization.other_bytes


def kv_cache_bytes(config: DecoderConfig | LlavaConfig, tokens: int, *, batch: int = 1, bits: int = 16) -> float:
    """Bytes of the keys and values of `tokens` tokens in each of `batch` rows.

    Grouped queries (Ainslie et al. 2023, arXiv 2305.13245) divide it by heads / kv_heads; `bits` quantises it.
    """
    text = _decoder(config)
    _require_counts(0, tokens=tokens)
    _require_counts(1, batch=batch, bits=bits)
    return 2 * text.layers * text.kv_heads * text.head_dim * tokens * batch * bits / 8


def activation_bytes(
    config: DecoderConfig | LlavaConfig, tokens: int, *, batch: int = 1, bits: int = 16, fused: bool = True
) -> float:
    """Most bytes that are alive at once in the decoder's inference pass over `tokens` tokens, weights and cache apart.

    In a block's MLP: the model's input, the block's input, the residual stream and its normed copy, with SwiGLU's
    gate, its partner and their product. In its attention: the stream is not there yet, but queries, keys, values,
    the turned queries, and two times the keys while these are turned. The larger of both; all blocks reuse it.
    `fused=False` adds scores and softmax, heads x tokens x tokens, which a fused kernel never writes.
    """
    text = _decoder(config)
    _require_counts(1, tokens=tokens, batch=batch, bits=bits)
    heads, groups = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = 3 * text.width + 2 * heads + 4 * groups + (0 if fused else 2 * text.heads * tokens)
    mlp = 4 * text.width + 3 * text.mlp_width
    return batch * tokens * max(mlp, attention) * bits / 8


def vit_flops(vision: ViTConfig, *, layers: int | None = None) -> int:
    """Floating-point operations of one image's matrix products in the first `layers` blocks (all by default)."""
    _require_tower(vision)
    layers = vision.layers if layers is None else layers
    _require_counts(0, layers=layers)
    if layers > vision.layers:
        raise ValueError(f"layers is {layers}, but the tower has {vision.layers} blocks")
    tokens, D = 1 + vision.n_patches, vision.width
    embedding = 2 * vision.n_patches * vision.channels * vision.patch_size**2 * D
    return embedding + layers * (2 * tokens * (4 * D * D + 2 * D * vision.mlp_width) + 4 * tokens * tokens * D)


def decoder_flops(text: DecoderConfig, tokens: int, *, past: int = 0, logits: int = 1, dense: bool = False) -> int:
    """Operations of one row's matrix products for `tokens` new tokens behind `past` cached ones.

    A multiply-add counts as two. Attention counts the pairs that a causal mask allows; `dense=True` counts every
    query with every key, as profilers do. `logits` is the number of positions that the head is applied to.
    """
    _require_counts(0, past=past, logits=logits)
    _require_counts(1, tokens=tokens)
    pairs = tokens * (past + tokens) if dense else tokens * past + tokens * (tokens + 1) // 2
    attention = 4 * text.layers * text.heads * text.head_dim * pairs
    return 2 * _linear_weights(text) * tokens + attention + 2 * logits * text.width * text.vocab_size


def prefill_flops(config: DecoderConfig | LlavaConfig, tokens: int, *, images: int = 0) -> int:
    """Operations of one row's first pass: `tokens` tokens in all (visual ones included), and `images` encodings."""
    _require_counts(0, images=images)
    flops = decoder_flops(_decoder(config), tokens)
    if images and not isinstance(config, LlavaConfig):
        raise ValueError(f"{images} images, but a {type(config).__name__} has no vision tower: pass a LlavaConfig")
    if images:
        vision = config.vision
        run = config.feature_layer % (vision.layers + 1)  # blocks up to the layer whose features are used
        bridge = bridge_flops(config.bridge, vision.n_patches, vision.width, config.text.width)
        flops += images * (vit_flops(vision, layers=run) + bridge)
    return flops


def prefill_seconds(
    config: DecoderConfig | LlavaConfig, gpu: str | GPU, tokens: int, *, images: int = 0, batch: int = 1,
    quantization: str | Quantization = "fp16", efficiency: float = 1.0,
) -> float:  # fmt: skip
    """Shortest time to the first token. Quantised weights are read faster, but multiplied in 16 bits all the same."""
    gpu = _lookup(GPUS, gpu, "gpu")
    _require_efficiency(efficiency)
    _require_counts(1, batch=batch)
    arithmetic = batch * prefill_flops(config, tokens, images=images) / gpu.flops
    traffic = weight_bytes(config, quantization) / gpu.bandwidth
    return max(arithmetic, traffic) / efficiency


def decode_seconds(
    config: DecoderConfig | LlavaConfig, gpu: str | GPU, context: int, new_tokens: int, *, batch: int = 1,
    quantization: str | Quantization = "fp16", kv_bits: int = 16, efficiency: float = 1.0,
) -> float:  # fmt: skip
    """Shortest time for `new_tokens` more tokens of each row, one after the other, behind `context` tokens.

    Every step reads the decoder's weights once for the whole batch (of the embeddings only the head), and the cache
    of every row.
    """
    gpu = _lookup(GPUS, gpu, "gpu")
    text = _decoder(config)
    _require_efficiency(efficiency)
    _require_counts(0, context=context, new_tokens=new_tokens)
    _require_counts(1, batch=batch)
    weights = weight_bytes(text, quantization)
    if not text.tie_embeddings:
        weights -= text.vocab_size * text.width * _lookup(QUANTIZATIONS, quantization, "quantization").other_bytes
    seconds = 0.0
    for past in range(context, context + new_tokens):
        traffic = (weights + kv_cache_bytes(text, past, batch=batch, bits=kv_bits)) / gpu.bandwidth
        seconds += max(traffic, batch * decoder_flops(text, 1, past=past) / gpu.flops)
    return seconds / efficiency


@dataclass(frozen=True)
class Budget:
    """A model's needs on one GPU; memory in bytes, times in seconds."""

    gpu: GPU
    tokens: int
    weights: float
    kv_cache: float
    activations: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.memory

    @property
    def latency(self) -> float:
        return self.prefill + self.decode


def budget(
    config: DecoderConfig | LlavaConfig, gpu: str | GPU, *, text_tokens: int, new_tokens: int, images: int = 0,
    batch: int = 1, quantization: str | Quantization = "fp16", kv_bits: int = 16, chunk: int | None = None,
    efficiency: float = 1.0,
) -> Budget:  # fmt: skip
    """Memory and time of answering: `text_tokens` and `images` in, `new_tokens` out, for each row of the batch.

    `chunk` tokens at a time pass the decoder in the prefill (all of them by default), which bounds the activations.
    The activations of the vision tower, freed before the decoder runs, are not counted.
    """
    gpu = _lookup(GPUS, gpu, "gpu")
    _require_counts(0, text_tokens=text_tokens, new_tokens=new_tokens, images=images)
    if chunk is not None:
        _require_counts(1, chunk=chunk)
    tokens = text_tokens + (images * config.visual_tokens if isinstance(config, LlavaConfig) else 0)
    options = {"batch": batch, "quantization": quantization, "efficiency": efficiency}
    return Budget(
        gpu=gpu,
        tokens=tokens,
        weights=weight_bytes(config, quantization),
        kv_cache=kv_cache_bytes(config, tokens + new_tokens, batch=batch, bits=kv_bits),
        activations=activation_bytes(config, tokens if chunk is None else min(chunk, tokens), batch=batch),
        prefill=prefill_seconds(config, gpu, tokens, images=images, **options),
        decode=decode_seconds(config, gpu, tokens, new_tokens, kv_bits=kv_bits, **options),
    )
