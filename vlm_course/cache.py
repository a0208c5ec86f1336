"""Keys and values of the tokens that a decoder has read, kept between the steps of a generation."""

from torch import Tensor

from vlm_course.validation import counts, method_checks, readable, require_count, require_shape


def _check_update(self, layer, keys, values):
    require_count(layer, "layer", 0)
    if layer >= len(self._buffers):
        raise ValueError(f"layer is {layer}, but the cache has {len(self._buffers)} layers")
    if keys.dim() != 4 or keys.shape != values.shape or 0 in (*keys.shape[:2], keys.shape[3]):
        shapes = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"{shapes}: expected [B, H, T, d] for both, none but T of size 0")
    stored = self._buffers[layer]
    if stored is not None:
        held, new = stored[0].shape, keys.shape
        if held[:2] != new[:2] or held[3] != new[3]:
            raise ValueError(
                f"keys are {tuple(new)}, but the cache holds {tuple(held)}: expected its rows, heads and width"
            )
        if stored[0].device != keys.device:
            raise ValueError(f"keys are on {keys.device}, but the cache is on {stored[0].device}")
    if keys.device != values.device:
        raise ValueError(f"keys are on {keys.device}, but the values are on {values.device}")


def _check_select(self, rows, *, room=0):
    require_shape(rows, "rows", "n", floating=False)
    require_count(room, "room", 0)
    batch = next((len(stored[0]) for stored in self._buffers if stored is not None), None)
    if batch is not None and readable(rows) and rows.device.type == "cpu":  # elsewhere a look would wait for the device
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= batch:
            raise ValueError(f"rows run from {low} to {high}, expected 0 to {batch - 1}: the cache holds {batch} rows")


@method_checks(update=_check_update, select=_check_select)
@counts(layers=1, capacity=0)
class KVCache:
    """Keys and values of the tokens seen so far, one growing buffer per layer. For inference: writes are in place.

    `capacity` reserves room for that many tokens at once; without it the buffers double when they are full.
    """

    def __init__(self, layers: int, *, capacity: int = 0):
        self.capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Tokens stored. All layers agree between two calls of the model."""
        return self._lengths[-1]

    def select(self, rows: Tensor, *, room: int = 0) -> "KVCache":
        """A copy with the given rows of the batch, repeated where `rows` [n] repeats them, and room for more tokens.

        So that many questions can go on from one image that was read once.
        """
        copy = KVCache(len(self._buffers), capacity=self.length + room)
        for layer, buffers in enumerate(self._buffers):
            if buffers is not None:
                copy.update(layer, *(stored[rows, :, : self._lengths[layer]] for stored in buffers))
        return copy

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, H, T, d] of the new tokens; returns those of all tokens, [B, H, past + T, d]."""
        start, end = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or end > buffers[0].shape[2]:
            room = max(end, self.capacity, 2 * start)
            grown = tuple(new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (keys, values))
            if buffers is not None:
                for old, new in zip(buffers, grown, strict=True):
                    new[:, :, :start] = old[:, :, :start]
            buffers = self._buffers[layer] = grown
        for stored, new in zip(buffers, (keys, values), strict=True):
            stored.narrow(2, start, end - start).copy_(new)  # stored[:, :, start:end] = new, at half its price
        self._lengths[layer] = end
        return buffers[0].narrow(2, 0, end), buffers[1].narrow(2, 0, end)
