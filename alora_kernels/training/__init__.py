"""Training without the prefix: nothing before the invocation costs a gradient.

See `prefix_forward` for the step, `AloraTrainer` for the Trainer, `docs/training.md` for a guide.
"""

from .forward import PrefixOutput, prefix_forward
from .guard import PrefixError, check_prefix, prefix_problems
from .store import PrefixStore

__all__ = [
    "PrefixError",
    "PrefixOutput",
    "PrefixStore",
    "check_prefix",
    "prefix_forward",
    "prefix_problems",
]
