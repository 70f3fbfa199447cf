"""`program`: what one pass does, as data. A pure function of what is asked and of layouts.

The steps are executed by `run` on a GPU and by the PTX interpreter in the tests, and read by the
cost model. Nothing here touches a tensor or synchronises with a device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ...contract import Needs, Problem, saved_columns
from ...cost import OLD_INSTRUCTIONS, Schedule
from ..programs import Adapted, Layouts, Program, View, fresh
from .kernels import Column, Kernels, Pass
from .plan import Plan


def program(asked: Pass, layouts: Layouts) -> Program:
    """The steps of a forward pass, or of a backward pass where `asked.needs` says what for."""
    backward = asked.needs is not None
    kernels = Kernels(asked)
    results = (_Backward if backward else _Forward)(kernels, layouts).results()
    return Program(
        layouts.inputs, layouts.x.dtype, layouts.residues, tuple(kernels.steps), tuple(results)
    )


class _Pass:
    """What forward and backward share: views, where each projection's low columns begin."""

    def __init__(self, kernels: Kernels, layouts: Layouts) -> None:
        self.kernels, self.asked, self.layouts = kernels, kernels.asked, layouts
        self.x, self.projections = layouts.x, layouts.projections
        self.begins, self.columns = saved_columns([p.lora_a.shape[0] for p in self.projections])
        keep = 1.0 - self.asked.dropout_p
        self.scales = [scaling / keep for scaling in self.asked.scalings]

    def low(self, name: str, given: bool = True) -> View:
        """Memory for xa or dya. Tensor maps read whole tiles of it, so inactive rows must be zero.

        Not `given`: the kernel that reads it also writes it, inactive rows included.
        """
        zero = self.asked.arch == 90 and self.asked.strategy == "tail" and given
        return self.kernels.make(name, (self.x.shape[0], self.columns), self.x.dtype, zero)


class _Forward(_Pass):
    def results(self) -> list[str | None]:
        """The outputs' names, then xa's."""
        asked, base_outs = self.asked, self.layouts.base_outs
        fused = self._fused()
        if fused is not None:
            return fused
        onepass = asked.strategy == "onepass" and base_outs is None
        delta = asked.strategy == "delta" and base_outs is None
        if base_outs is not None:
            ys = list(base_outs)
        else:
            ys = [self._output(i, made=not delta) for i in range(len(self.projections))]
        if delta:  # before the kernels, which are then launched together
            for p, y in zip(self.projections, ys):
                self.kernels.torch("linear", self.x, p.weight, p.bias, result=y)
        xa = self.low("xa") if asked.save or not onepass else None
        if xa is not None and not onepass:
            self._shrink(xa)
        for i, (p, y) in enumerate(zip(self.projections, ys)):
            low = None if xa is None else xa.columns_from(self.begins[i])
            scaling = asked.scalings[i]
            if base_outs is not None or delta:
                assert low is not None
                self.kernels.expand_add(low, p.lora_b.turned, y, p.lora_bias, scaling)
            else:
                self._base(p, y, low, onepass, scaling)
        return [*[y.tensor for y in ys], xa.tensor if xa is not None and asked.save else None]

    def _output(self, i: int, made: bool = True) -> View:
        p = self.projections[i]
        assert p.weight is not None
        view = fresh(f"y{i}", (self.x.shape[0], p.weight.shape[0]), self.x.dtype)
        return self.kernels.make(view.tensor, view.shape, view.dtype) if made else view

    def _base(self, p: Adapted, y: View, low: View | None, onepass: bool, scaling: float) -> None:
        """The base and the adapter's part in one launch."""
        assert p.weight is not None
        up, kernels = p.lora_b.turned, self.kernels
        if (
            onepass
            and not self.asked.save
            and kernels.decode(self.x, p.weight, y, p.bias, up, p.lora_a, p.lora_bias, scaling)
        ):
            return
        kernels.gemm(
            self.x, p.weight.turned, y, bias=p.bias, low=low, up=up,
            down=p.lora_a if onepass else None, scale=scaling, lora_bias=p.lora_bias,
            lora_bias_scale=scaling,
        )  # fmt: skip

    def _fused(self) -> list[str | None] | None:
        """y and xa by one launch, where there is one."""
        asked, x = self.asked, self.x
        if asked.strategy != "tail" or self.layouts.base_outs or len(self.projections) > 1:
            return None
        (p,) = self.projections
        up, scaling = p.lora_b.turned, asked.scalings[0]
        weight = None if p.weight is None else p.weight.turned
        plan = self.kernels.plan_fused(x, weight, up, p.lora_a, self.columns)
        if plan is None or weight is None:
            return None
        xa, y = self.low("xa", given=False), self._output(0)
        self.kernels.fused(
            plan, x, weight, y, bias=p.bias, low=xa, up=up, down=p.lora_a, scale=scaling,
            lora_bias=p.lora_bias, lora_bias_scale=scaling,
        )  # fmt: skip
        return [y.tensor, xa.tensor if asked.save else None]

    def _shrink(self, xa: View) -> None:
        """xa of all projections: one launch where their adapters are laid out alike."""
        downs = [p.lora_a for p in self.projections]
        alike = all((a.strides, a.dtype) == (downs[0].strides, downs[0].dtype) for a in downs)
        shared: list[Column] = []
        for a, begin, scale in zip(downs, self.begins, self.scales):
            own = [Column(a, row, scale) for row in range(0, a.shape[0], 16)]
            if alike:
                shared += own
            else:
                self.kernels.shrink(self.x, own, xa.columns_from(begin), dropout=True)
        if shared:
            self.kernels.shrink(self.x, shared, xa, dropout=True)


class _Backward(_Pass):
    def __init__(self, kernels: Kernels, layouts: Layouts) -> None:
        super().__init__(kernels, layouts)
        assert self.asked.needs is not None
        self.needs: Needs = self.asked.needs
        # onepass makes dya on the way to dx; a layer whose x needs no gradient has no such way.
        self.onepass = (
            self.asked.strategy == "onepass"
            and self.needs.x
            and self.projections[0].weight is not None
        )
        self.fused: list[Plan | None] = [None] * len(self.projections)
        if self.asked.strategy == "tail" and self.needs.x:
            self.fused = [
                kernels.plan_fused(
                    dy, p.weight, p.lora_a, p.lora_b.turned, self.columns, i > 0,
                    not self.asked.prefix_grad,
                )
                for i, (p, dy) in enumerate(zip(self.projections, layouts.dys))
            ]  # fmt: skip

    def results(self) -> list[str | None]:
        """The names of dx, then of every lora_a's gradient, every lora_b's, every lora_bias's."""
        dya = None
        if self.needs.x or any(self.needs.lora_a):
            dya = self.low("dya", None in self.fused)
        done = [False] * len(self.projections)  # which dB came with dya
        if dya is not None and not self.onepass:
            done = self._dya(dya)
        dx = None
        if self.needs.x:
            assert dya is not None
            dx = self._dx(dya)
        das, dbs, dbiases = [
            [self._gradient(name, i, dya, done[i]) for i in range(len(self.projections))]
            for name in ("a", "b", "bias")
        ]
        return [dx, *das, *dbs, *dbiases]

    def _dya(self, dya: View) -> list[bool]:
        """dya where no later kernel makes it; whether dB was made beside it."""
        done = [False] * len(self.projections)
        for i, (p, dy) in enumerate(zip(self.projections, self.layouts.dys)):
            if self.fused[i] is not None:
                continue
            own, scale = dya.columns_from(self.begins[i]), self.scales[i]
            if self.needs.lora_b[i]:
                done[i] = self.kernels.grad_b(dy, self._xa(i), p.lora_b, own, scale, f"db{i}")
            if not done[i]:
                right = p.lora_b.turned
                columns = [Column(right, row, scale) for row in range(0, right.shape[0], 16)]
                self.kernels.shrink(dy, columns, own, dropout=False)
        return done

    def _xa(self, i: int) -> View:
        """What forward saved for a projection."""
        assert self.layouts.xa is not None
        return self.layouts.xa.columns_from(self.begins[i])

    def _gradient(self, what: str, i: int, dya: View | None, done: bool) -> str | None:
        """The name of dA, dB or the gradient of lora_bias; None where not wanted."""
        p, dy, name = self.projections[i], self.layouts.dys[i], f"d{what}{i}"
        if what == "a" and self.needs.lora_a[i]:
            assert dya is not None
            out = self.kernels.make(name, p.lora_a.shape, p.lora_a.dtype)
            self.kernels.grad(self.x, dya.columns_from(self.begins[i]), out.turned, dropout=True)
        elif what == "b" and self.needs.lora_b[i]:
            if not done:
                out = self.kernels.make(name, p.lora_b.shape, p.lora_b.dtype)
                self.kernels.grad(dy, self._xa(i), out, dropout=False)
        elif what == "bias" and self.needs.lora_bias[i] and p.lora_bias is not None:
            self.kernels.bias_gradient(name, dy, self.asked.scalings[i], p.lora_bias)
        else:
            return None
        return name

    def _dx(self, dya: View) -> str:
        prefix, kernels, x = not self.asked.prefix_grad, self.kernels, self.x
        given = self.projections[0].weight is None  # only the adapter's part of dx is asked for
        by_vendor = self.asked.strategy == "delta" and not prefix and not given
        if by_vendor:
            dx = fresh("dx", x.shape, x.dtype)
        else:
            dx = kernels.make("dx", x.shape, x.dtype, zero=given)
        for i, (p, dy) in enumerate(zip(self.projections, self.layouts.dys)):
            low, scaling = dya.columns_from(self.begins[i]), self.asked.scalings[i]
            plan = self.fused[i]
            if plan is not None:
                assert p.weight is not None
                kernels.fused(
                    plan, dy, p.weight, dx, bias=None, low=low, up=p.lora_a,
                    down=p.lora_b.turned, scale=scaling,
                )  # fmt: skip
                continue
            inside = self.asked.strategy != "delta" and p.weight is not None
            if by_vendor and i == 0:
                kernels.torch("mm", dy, p.weight, result=dx)
            elif by_vendor:
                kernels.torch("addmm_", dx, dy, p.weight, result=None)
            elif p.weight is not None:
                kernels.gemm(
                    dy, p.weight, dx, low=low if inside else None, up=p.lora_a if inside else None,
                    down=p.lora_b.turned if self.onepass else None, scale=scaling, dropout=inside,
                    add=i > 0, active_only=prefix,
                )  # fmt: skip
            if not inside:
                kernels.expand_add(low, p.lora_a, dx, None, 1.0, dropout=True)
        return dx.tensor


def program_of(problem: Problem, strategy: str, machine: tuple[int, int]) -> Program:
    """The program of a problem whose tensors are contiguous and aligned.

    `machine`: multiprocessors and arch.
    """
    rows, dtype, adapter = problem.rows, problem.dtype, problem.adapter_dtype
    k, count = problem.in_features, len(problem.ranks)
    projections = [
        Adapted(
            None if problem.base_given else fresh(f"weight{i}", (n, k), dtype), None,
            fresh(f"lora_a{i}", (r, k), adapter), fresh(f"lora_b{i}", (n, r), adapter), None,
        )
        for i, (n, r) in enumerate(zip(problem.out_features, problem.ranks))
    ]  # fmt: skip
    layouts = Layouts(fresh("x", (rows, k), dtype), tuple(projections))
    asked = Pass(
        strategy, (1.0,) * count, problem.active, *machine,
        dropout_p=0.5 if problem.dropout else 0.0,
    )  # fmt: skip

    def wide(name: str) -> tuple[View, ...]:
        return tuple(
            [fresh(f"{name}{i}", (rows, n), dtype) for i, n in enumerate(problem.out_features)]
        )

    if problem.backward:
        needs = Needs(True, (True,) * count, (True,) * count, (False,) * count)
        xa = fresh("xa", (rows, saved_columns(problem.ranks)[1]), dtype)
        layouts = layouts._replace(xa=xa, dys=wide("dy"))
        return program(asked._replace(needs=needs), layouts)
    if problem.base_given:
        layouts = layouts._replace(base_outs=wide("base_out"))
    return program(asked, layouts)


@functools.lru_cache(maxsize=1024)
def schedules(problem: Problem, strategy: str, machine: tuple[int, int]) -> tuple[Schedule, ...]:
    """What the cost model asks for: the GEMM of each projection.

    Empty where the vendor's library serves (`delta`, a given base).
    """
    found = []
    for plan in [launch.plan for launch in program_of(problem, strategy, machine).launches]:
        rows, columns = plan.tile
        if rows == 0:
            continue
        full = "sm90" in plan.kernel or problem.arch not in OLD_INSTRUCTIONS
        kinds: Sequence[str] = [kind for kind in ("decode", "fused") if kind in plan.kernel]
        splits = plan.grid[1] if "decode" in kinds else 1
        found.append(Schedule(kinds[0] if kinds else "gemm", rows, columns, full, splits))
    return tuple(found)
