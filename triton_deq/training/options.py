"""How to train, whatever the model."""

from dataclasses import dataclass, field

from ..checks import check_choice, check_count, check_number

OPTIMIZERS = ("adam", "adamw", "sgd", "nesterov")
AUTOCAST = ("none", "bf16", "bf16-state")


def _option(default, purpose: str):
    return field(default=default, metadata={"help": purpose})


@dataclass(frozen=True)
class TrainingOptions:
    """The numbers of a run; each field's `metadata["help"]` says what it is.

    The learning rate rises linearly over the first `warmup_steps` and falls as half a cosine to `final_lr`
    at `steps`.

    Raises:
        TypeError, ValueError: a field that cannot be, by its name.
    """

    steps: int = _option(1000, "steps of the optimiser in all")
    pretrain_steps: int = _option(0, "the first of them, which train the model unrolled, without a solve")
    optimizer: str = _option("adam", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = _option(2.5e-4, "the largest learning rate")
    final_lr: float = _option(0.0, "where the cosine ends")
    warmup_steps: int = _option(0, "steps in which the learning rate rises to lr")
    momentum: float = _option(0.9, "of sgd and nesterov")
    weight_decay: float = _option(0.0, "on all parameters; decoupled in adamw")
    clip: float = _option(0.25, "largest norm of the whole gradient; 0: any")
    autocast: str = _option("none", f"one of {', '.join(AUTOCAST)}: torch.autocast, and a DEQ's state")
    validate_every: int = _option(500, "steps between validations; there is one at the end, too")
    checkpoint_every: int = _option(500, "steps between checkpoints; the last and the best are kept")
    log_every: int = _option(50, "steps that a line of metrics is the mean of")
    seed: int = _option(0, "of weights, dropout and probes")

    def __post_init__(self):
        for name in ("steps", "validate_every", "checkpoint_every", "log_every"):
            check_count(name, getattr(self, name))
        for name in ("pretrain_steps", "warmup_steps", "seed"):
            check_count(name, getattr(self, name), least=0)
        for name in ("pretrain_steps", "warmup_steps"):
            if getattr(self, name) > self.steps:
                raise ValueError(
                    f"{name}={getattr(self, name)} is more than steps={self.steps}: lower it, or raise steps"
                )
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("autocast", self.autocast, AUTOCAST)
        check_number("lr", self.lr, 0, open_low=True)
        check_number("final_lr", self.final_lr, 0, self.lr)
        check_number("momentum", self.momentum, 0, 1, open_low=self.optimizer == "nesterov")
        check_number("weight_decay", self.weight_decay, 0)
        check_number("clip", self.clip, 0)
