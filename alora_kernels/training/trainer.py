"""AloraTrainer: transformers' Trainer that computes no gradients for the frozen prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..invocation import invocation_of
from .forward import MODES, PrefixOutput, prefix_forward
from .guard import PrefixError, check_prefix, unwrap
from .layout import IGNORE
from .store import PrefixStore

STARTS = "invocation_starts"


class AloraTrainerMixin:
    """Adds `prefix=` to a Trainer class: `class MyTrainer(AloraTrainerMixin, SFTTrainer): ...`.

    Args:
        prefix: "no_grad", "cached" or "full" (the Trainer's own step).
        prefix_store: the store in which `cached` keeps prefixes; by default 4 GiB in memory.
        prefix_chunk_size: `chunk_size` of `prefix_forward`.

    A batch may have `invocation_starts` `[B]` (see AloraDataCollator). Without it, and if the
    trainer knows where the answer begins (`completion_only_loss`), the last invocation before the
    answer counts. Otherwise the last invocation of the row counts.

    Raises:
        PrefixError: the trainer's arguments or its model do not work without the prefix's gradient.
        ValueError: `prefix` is unknown, or a store is given without "cached".
    """

    def __init__(
        self,
        *args: Any,
        prefix: str = "no_grad",
        prefix_store: PrefixStore | None = None,
        prefix_chunk_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        if prefix not in MODES:
            raise ValueError(
                f"{type(self).__name__}: prefix must be one of {MODES}, got {prefix!r}"
            )
        if prefix_store is not None and prefix != "cached":
            raise ValueError(
                f"{type(self).__name__}: prefix_store is given, but prefix={prefix!r} keeps nothing"
            )
        self.prefix = prefix
        self.prefix_store = prefix_store
        self.prefix_chunk_size = prefix_chunk_size
        if prefix == "cached" and prefix_store is None:
            self.prefix_store = PrefixStore()
        super().__init__(*args, **kwargs)
        if prefix != "full":
            self._check_arguments()
            check_prefix(self.model)  # type: ignore[attr-defined]
            # compute_loss below divides by num_items_in_batch, whatever the model's loss does.
            self.model_accepts_loss_kwargs = True

    def _check_arguments(self) -> None:
        args: Any = self.args  # type: ignore[attr-defined]
        problems = []
        other = self._other_loss()
        if other is not None:
            problems.append(
                f"the loss of its own that {other.__name__}.compute_loss takes (only the next "
                "token's loss, of Trainer and SFTTrainer, can leave the prefix out)"
            )
        if getattr(args, "packing", False) or getattr(args, "eval_packing", None):
            problems.append("packing=True (several sequences in a row, one cut each)")
        if getattr(self, "padding_free", False) or getattr(args, "padding_free", False):
            problems.append("padding_free=True (the whole batch in one row)")
        if getattr(args, "label_smoothing_factor", 0.0):
            problems.append(f"label_smoothing_factor={args.label_smoothing_factor}")
        if getattr(self, "compute_loss_func", None) is not None:
            problems.append("compute_loss_func")
        if getattr(args, "neftune_noise_alpha", None):
            problems.append(f"neftune_noise_alpha={args.neftune_noise_alpha}")
        if getattr(args, "loss_type", "nll") not in ("nll", None):
            problems.append(f"loss_type={args.loss_type!r}")
        if getattr(args, "use_liger_kernel", False):
            problems.append("use_liger_kernel=True (its fused loss replaces the model's forward)")
        if getattr(self, "aux_loss_enabled", False):
            problems.append("the router's auxiliary loss")
        if getattr(args, "n_gpu", 1) > 1:
            problems.append("DataParallel over several GPUs (use one process for each GPU)")
        if getattr(args, "deepspeed", None):
            problems.append("deepspeed")
        if (getattr(args, "fsdp_plugin_args", None) or {}).get("activation_checkpointing"):
            problems.append(
                "fsdp_config's activation_checkpointing (use gradient_checkpointing=True)"
            )
        if problems:
            raise PrefixError(
                f"{type(self).__name__}: prefix={self.prefix!r} does not work with "
                f"{'; '.join(problems)}. Turn it off, or use prefix='full'"
            )

    def _other_loss(self) -> type | None:
        """The next class whose `compute_loss` would be skipped, if it takes a loss of its own."""
        mro = type(self).__mro__
        behind = mro[mro.index(AloraTrainerMixin) + 1 :]
        kind = next(kind for kind in behind if "compute_loss" in vars(kind))
        known = kind is Trainer or (
            kind.__name__ == "SFTTrainer" and kind.__module__.startswith("trl.trainer")
        )
        return None if known else kind

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = list(getattr(self, "_signature_columns"))  # noqa: B009, the base class's
        wanted = ("prompt_ids", "answer_ids", "prompt_length", "invocation_start", STARTS)
        self._signature_columns: Any = [*columns, *(c for c in wanted if c not in columns)]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # A caller that wants outputs compares all logits with all labels; only `full` has them all.
        if self.prefix == "full" or return_outputs:
            return super().compute_loss(  # type: ignore[misc]
                model,
                self._for_the_model(inputs),
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        inputs = dict(inputs)
        starts = self._take_starts(inputs)
        output = self._prefix_forward(model, inputs, starts, num_items_in_batch)
        loss = output.loss
        if loss is None:
            raise ValueError(
                f"{type(self).__name__}: the batch has no labels (it holds {sorted(inputs)})"
            )
        args: Any = self.args  # type: ignore[attr-defined]
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts all processes, but DDP averages their gradients.
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        self._record(output, inputs)
        return loss

    def _prefix_forward(
        self, model: Any, inputs: dict[str, Any], starts: Any, count: Tensor | int | None
    ) -> PrefixOutput:
        known = ("input_ids", "attention_mask", "labels", "position_ids")
        rest = {k: v for k, v in inputs.items() if k not in known}
        return prefix_forward(
            model,
            inputs["input_ids"],
            inputs.get("attention_mask"),
            inputs.get("labels"),
            self.prefix,
            starts=starts,
            position_ids=inputs.get("position_ids"),
            num_items_in_batch=count,
            store=self.prefix_store,
            chunk_size=self.prefix_chunk_size,
            # Hugging Face's accelerate applies autocast inside the model's forward.
            store_extra=str(self.accelerator.mixed_precision),  # type: ignore[attr-defined]
            **rest,
        )

    def _take_starts(self, inputs: dict[str, Any]) -> Any:
        """The starts of a batch: removed from it, or found before its answers; None if neither."""
        starts = inputs.pop(STARTS, None)
        if starts is None and getattr(self, "completion_only_loss", False):
            starts = self._starts_before_answer(inputs)
        return starts

    def _for_the_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch as the model's forward and generate take it: without starts, but with PEFT's
        `alora_offsets`, which count from the end of the row."""
        inputs = dict(inputs)
        starts = self._take_starts(inputs)
        ids = inputs.get("input_ids")
        if starts is None or ids is None or inputs.get("alora_offsets") is not None:
            return inputs
        if self._invocation() is not None:
            starts = starts.tolist() if isinstance(starts, Tensor) else starts
            width = ids.shape[1]
            inputs["alora_offsets"] = [
                None if s is None or s < 0 else width - int(s) for s in starts
            ]
        return inputs

    def _invocation(self) -> list[int] | None:
        """The invocation of the active adapter; None for a plain LoRA, or without an adapter."""
        peft = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        config = getattr(unwrap(peft), "active_peft_config", None)
        return invocation_of(config)

    def _starts_before_answer(self, inputs: dict[str, Any]) -> Tensor | None:
        """The start of the last invocation before the first label, so not one in an answer.

        None without labels, or if the adapter has no invocation.
        """
        from ..activation import find_invocation_starts

        tokens = self._invocation()
        if tokens is None or inputs.get("labels") is None:
            return None
        labels, ids = inputs["labels"], inputs["input_ids"]
        column = torch.arange(ids.shape[1], device=ids.device)
        first = torch.where(labels != IGNORE, column, ids.shape[1]).amin(1)
        prompt = (column < first.unsqueeze(1)).to(torch.int64)
        if inputs.get("attention_mask") is not None:
            prompt = prompt * inputs["attention_mask"]
        return find_invocation_starts(ids, tokens, prompt)

    def _record(self, output: PrefixOutput, inputs: dict[str, Any]) -> None:
        """Log the token accuracy and count the tokens, as TRL's SFTTrainer does in its own step."""
        metrics = getattr(self, "_metrics", None)
        if metrics is None or not hasattr(self, "_total_train_tokens"):
            return
        assert output.logits is not None and output.labels is not None
        gather: Any = self.accelerator.gather_for_metrics  # type: ignore[attr-defined]
        with torch.no_grad():
            valid = output.labels != IGNORE
            hit = (output.logits.argmax(-1) == output.labels) & valid
            valid_sum, hit_sum = gather(valid.sum()).sum(), gather(hit.sum()).sum()
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        accuracy = (hit_sum / valid_sum).item() if valid_sum > 0 else 0.0
        metrics[mode]["mean_token_accuracy"].append(accuracy)
        if mode == "train":
            mask = inputs.get("attention_mask")
            count = mask.sum() if mask is not None else torch.tensor(inputs["input_ids"].numel())
            self._total_train_tokens += gather(count.to(valid_sum.device)).sum().item()
        metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> Any:
        names: list[str] = self.label_names  # type: ignore[attr-defined]
        labelled = bool(names) and all(inputs.get(name) is not None for name in names)
        if self.prefix == "full" or not prediction_loss_only or not labelled:
            # With labels the Trainer calls `compute_loss`, which converts the batch. Without, or to
            # generate, it passes the batch to the model directly.
            generates = getattr(self.args, "predict_with_generate", False)  # type: ignore[attr-defined]
            if generates or not labelled:
                inputs = self._for_the_model(inputs)
            return super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **generation
            )
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        count = self._get_num_items_in_batch([inputs], self.args.device)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss.detach(), None, None


class AloraTrainer(AloraTrainerMixin, Trainer):
    """transformers' Trainer for an aLoRA PEFT model, without work for the frozen prefix.

        trainer = AloraTrainer(model, args, train_dataset=rows, prefix="cached",
                               data_collator=AloraDataCollator(tokens, pad_token_id=0))
        trainer.train()

    Everything else is as in the Trainer: evaluation, checkpoints and resuming, accumulation, mixed
    precision, gradient checkpointing, DDP and FSDP2.
    """
