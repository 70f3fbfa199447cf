"""Training that computes no gradients for the tokens before the invocation.

See `prefix_forward` for one training step, `AloraTrainer` for the Trainer, and `docs/training.md`
for a guide.
"""

from .collator import AloraDataCollator
from .forward import PrefixOutput, prefix_forward
from .guard import PrefixError, check_prefix, prefix_problems
from .store import PrefixStore
from .trainer import AloraTrainer, AloraTrainerMixin

__all__ = [
    "AloraDataCollator",
    "AloraTrainer",
    "AloraTrainerMixin",
    "PrefixError",
    "PrefixOutput",
    "PrefixStore",
    "check_prefix",
    "prefix_forward",
    "prefix_problems",
]
