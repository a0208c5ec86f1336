"""What a fine-tuning does, in one frozen record, and how it went, in another."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..training import Stage
from ..validation import counts, require_number, require_one_of

MODES = ("projector", "lora", "full")
DTYPES = ("float32", "autocast", "bfloat16")

# LLaVA-1.5's own (lr, lr of the projector): scripts/v1_5/pretrain.sh, finetune_lora.sh and finetune.sh of its
# repository; the first two are also in table 9 of its paper.
RATES = {"projector": (1e-3, 1e-3), "lora": (2e-4, 2e-5), "full": (2e-5, 2e-5)}

# May differ when a run goes on: they change how it is computed or how often it is written down, not what it learns.
_FREE = ("micro_batch", "divide", "save_every", "log_every", "compile", "workers")


@counts(steps=1, batch=1, micro_batch=1, lora_rank=1, log_every=1, seed=0, workers=0)
@dataclass(frozen=True)
class FinetunePlan:
    """A fine-tuning of `Llava`; the vision tower is frozen in all of them.

    Attributes:
        mode: what learns. "projector": the bridge alone (LLaVA's first stage). "lora": thin matrices beside the
            language model's frozen ones, and the bridge. "full": the language model and the bridge.
        steps, batch: optimizer steps; conversations a step, of all processes together.
        micro_batch: rows (conversations, or packed rows) computed at once by a process; the loss is the same for any.
            None: as many as there are, and half as many each time that memory is exhausted.
        lr, bridge_lr: greatest learning rates of what learns and of the bridge; by default LLaVA-1.5's.
        lora_rank, lora_alpha, lora_dropout: see `lora.add_lora`; alpha is by default twice the rank.
        warmup, final: as in `training.Stage`: share of the steps with a rising rate; share of the peak at the end.
        clip: greatest norm of all gradients; None leaves them as they are. Mode "full" in bfloat16 then takes each step
            inside the backward pass, so that gradients need no memory of their own, if `micro_batch` is the batch.
        dtype: "float32"; "autocast": float32 weights, bfloat16 products; "bfloat16": frozen weights (with "full" all
            of them, rounded stochastically) in bfloat16. What learns in the first two modes, and what is divided among
            GPUs, stays in float32, where small steps are not lost, and is multiplied in bfloat16.
        compile: hand the layers to torch.compile (on a GPU; see `finetune.fast`).
        divide: mode "full" on several GPUs: weights, gradients and optimizer divided among them (FSDP2), or, with
            False, a whole model on each (DistributedDataParallel), which is faster where it fits.
        save_every, log_every: seconds between two running states (None: none at all, for measurements); steps between
            two looks at the loss, by default 1, on a GPU 10, since a look waits for it.
        seed: of LoRA's first values and of dropout.
        workers: threads that make batches ahead; by default 4 where images are read for a GPU, else none.

    Source: LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744), table 9 and the released scripts.
    """

    mode: str = "lora"
    steps: int = 1000
    batch: int = 128
    micro_batch: int | None = None
    lr: float | None = None
    bridge_lr: float | None = None
    lora_rank: int = 128
    lora_alpha: float | None = None
    lora_dropout: float = 0.05
    warmup: float = 0.03
    final: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    dtype: str = "float32"
    compile: bool = False
    divide: bool = True
    save_every: float | None = 600.0
    log_every: int | None = None
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        require_one_of(self.mode, "mode", MODES)
        require_one_of(self.dtype, "dtype", DTYPES)
        rate, bridge_rate = RATES[self.mode]
        if self.lr is not None:
            bridge_rate = self.lr if self.mode == "projector" else bridge_rate
        for name, default in (("lr", rate), ("bridge_lr", bridge_rate), ("lora_alpha", 2.0 * self.lora_rank)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        require_number(self.lora_alpha, "lora_alpha", above=0)
        require_number(self.lora_dropout, "lora_dropout", 0, 1)
        if self.save_every is not None:
            require_number(self.save_every, "save_every", low=0)
        for number, beta in enumerate(self.betas):
            require_number(beta, f"betas[{number}]", 0, 1)
        self.stage(("bridge.",))  # checks the rest

    def stage(self, trains: tuple[str, ...]) -> Stage:
        """The `training.Stage` of this plan in which the parameters with these prefixes learn."""
        return Stage(
            name=self.mode,
            trains=trains,
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            lrs=(("bridge.", self.bridge_lr),),
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            final=self.final,
            clip=1.0 if self.clip is None else self.clip,
        )

    def identity(self) -> dict:
        """What must be the same where a run goes on."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


@dataclass(frozen=True)
class Report:
    """How a call of `Trainer.run` went.

    Attributes:
        step, steps: where it stopped, and where the plan ends.
        loss: of the last step, in nats an answer token.
        seconds: from the first step of this call to its last.
        samples_per_s: conversations of all processes a second, without the first step of the call.
        memory: greatest memory in use on this process's GPU, in bytes; 0 on a CPU.
        micro_batch: rows that were computed at once.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    samples_per_s: float
    memory: int
    micro_batch: int

    @property
    def done(self) -> bool:
        """Whether the plan is fulfilled."""
        return self.step == self.steps
