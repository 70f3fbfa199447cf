"""`program`: what one pass does, as data. A pure function of what is asked and of layouts.

The strategies `delta`, `tail` and `onepass` are composed of kernels here. Nothing touches a tensor,
and nothing needs Triton.
"""

from __future__ import annotations

from ...contract import Needs, saved_columns
from ..programs import Adapted, Layouts, Program, View, fresh
from .configs import both_in_one_pass
from .kernels import Kernels, Pass, Product


def program(asked: Pass, layouts: Layouts) -> Program:
    """The steps of a forward pass, or of a backward pass where `asked.needs` says what for."""
    kernels = Kernels(asked)
    make = _Forward if asked.needs is None else _Backward
    results = make(kernels, layouts).results()
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

    def low(self, name: str, rows: int) -> View:
        """Memory for xa or dya. Inactive rows are never read."""
        return self.kernels.make(name, (rows, self.columns), self.asked.low_dtype)


class _Forward(_Pass):
    def results(self) -> list[str | None]:
        """The outputs' names, then xa's."""
        asked, kernels, base_outs = self.asked, self.kernels, self.layouts.base_outs
        onepass = asked.strategy == "onepass" and base_outs is None
        fused = onepass or (asked.strategy == "tail" and base_outs is None)
        # Only backward and tail look xa up by row.
        compact = not (fused or asked.save)
        xa = None
        if asked.save or not onepass:
            xa = self.low("xa", asked.max_active if compact else self.x.shape[0])
        if xa is not None and not onepass:
            kernels.shrink(
                self.x, [p.lora_a for p in self.projections], self.scales, self.begins, xa,
                dropout=True, compact=compact,
            )  # fmt: skip
        outs = []
        for i, p in enumerate(self.projections):
            low = None if xa is None else xa.columns_from(self.begins[i])
            if fused:
                outs.append(self._fused(i, p, low, onepass))
                continue
            assert low is not None
            y = self._vendor(i, p) if base_outs is None else base_outs[i]
            bias = kernels.dense(p.lora_bias)
            kernels.expand_add(low, p.lora_b.turned, y, bias, asked.scalings[i], compact=compact)
            outs.append(y)
        return [*[y.tensor for y in outs], xa.tensor if xa is not None and asked.save else None]

    def _fused(self, i: int, p: Adapted, low: View | None, onepass: bool) -> View:
        """The base and the adapter's part in one launch."""
        assert p.weight is not None
        kernels = self.kernels
        y = kernels.make(f"y{i}", (self.x.shape[0], p.weight.shape[0]), self.x.dtype)
        adapter = onepass or self.asked.max_active > 0
        kernels.gemm(Product(
            self.x, p.weight.turned, y, bias=kernels.dense(p.bias),
            down=p.lora_a.turned if onepass else None, low=low if adapter else None,
            up=p.lora_b.turned if adapter else None, lora_bias=kernels.dense(p.lora_bias),
            scaling=self.asked.scalings[i],
        ))  # fmt: skip
        return y

    def _vendor(self, i: int, p: Adapted) -> View:
        """The base by the vendor's library."""
        assert p.weight is not None
        y = fresh(f"y{i}", (self.x.shape[0], p.weight.shape[0]), self.x.dtype)
        self.kernels.torch("linear", self.x, p.weight, p.bias, result=y)
        return y


class _Backward(_Pass):
    def results(self) -> list[str | None]:
        """The names of dx, then of every lora_a's gradient, every lora_b's, every lora_bias's."""
        assert self.asked.needs is not None
        needs = self.asked.needs
        self.dya = None
        if needs.x or any(needs.lora_a):
            self.dya = self.low("dya", self.x.shape[0])
        self.dx: View | None = None
        grads: list[tuple[str | None, str | None, str | None]] = [
            self._projection(i, needs) for i in range(len(self.projections))
        ]
        das, dbs, dbiases = zip(*grads)
        return [None if self.dx is None else self.dx.tensor, *das, *dbs, *dbiases]

    def _projection(self, i: int, needs: Needs) -> tuple[str | None, str | None, str | None]:
        """One projection's part of dx; the names of its gradients."""
        p, dy, kernels = self.projections[i], self.layouts.dys[i], self.kernels
        scaling, rank = self.asked.scalings[i], p.lora_a.shape[0]
        low = None
        if self.dya is not None and (needs.x or needs.lora_a[i]):
            low = self.dya.columns_from(self.begins[i])
        # onepass makes dya on the way to dx.
        onepass = self.asked.strategy == "onepass" and needs.x and p.weight is not None
        wants_bias = needs.lora_bias[i] and p.lora_bias is not None
        db = dbias = da = None
        made = onepass
        if needs.lora_b[i] or wants_bias:
            assert self.layouts.xa is not None
            xa = self.layouts.xa.columns_from(self.begins[i])
            both = (
                low is not None
                and not onepass
                and self.asked.max_active > 0
                and both_in_one_pass(p.lora_b.shape[0], rank, self.asked.low_dtype)
            )
            db = kernels.make(f"db{i}", p.lora_b.shape, p.lora_b.dtype)
            if wants_bias:
                dbias = kernels.make(f"dbias{i}", p.lora_b.shape[:1], p.lora_b.dtype)
            if both:
                assert low is not None
                kernels.grad_b(
                    dy, xa, p.lora_b, low, db, scale=self.scales[i], sums=dbias, scaling=scaling
                )
                made = True
            else:
                kernels.grad(dy, xa, rank, db, sums=dbias, scaling=scaling)
        if low is not None and not made:
            kernels.shrink(dy, [p.lora_b.turned], self.scales[i : i + 1], [0], low, dropout=False)
        if needs.x:
            assert low is not None
            self._add_to_dx(i, p, dy, low)
        if needs.lora_a[i]:
            assert low is not None
            da = kernels.make(f"da{i}", p.lora_a.shape, p.lora_a.dtype)
            kernels.grad(self.x, low, rank, da, transposed=True, dropout=True)
        return (
            None if da is None else da.tensor,
            db.tensor if db is not None and needs.lora_b[i] else None,
            None if dbias is None else dbias.tensor,
        )

    def _add_to_dx(self, i: int, p: Adapted, dy: View, dya: View) -> None:
        """dx (+)= dy · weight + keep ⊙ (dya · lora_a); `onepass` computes dya and stores it."""
        kernels, strategy, x = self.kernels, self.asked.strategy, self.x
        prefix, first = not self.asked.prefix_grad, self.dx is None
        if p.weight is None:
            if first:
                self.dx = kernels.make("dx", x.shape, x.dtype, zero=True)
            assert self.dx is not None
            kernels.expand_add(dya, p.lora_a, self.dx, None, 1.0, dropout=True)
            return
        # Tiles without an active row store zeros: then fusing is safe for any lora_a.
        fused = (strategy == "tail" or prefix) and dya.dtype == x.dtype
        onepass = strategy == "onepass"
        if not (onepass or fused or prefix):
            if first:
                self.dx = fresh("dx", x.shape, x.dtype)
                kernels.torch("mm", dy, p.weight, result=self.dx)
            else:
                kernels.torch("addmm_", self.dx, dy, p.weight)
        else:
            if first:
                self.dx = kernels.make("dx", x.shape, x.dtype)
            assert self.dx is not None
            adapter = onepass or (fused and self.asked.max_active > 0)
            kernels.gemm(Product(
                dy, p.weight, self.dx, down=p.lora_b if onepass else None,
                low=dya if adapter else None, up=p.lora_a if adapter else None,
                scaling=self.scales[i] if onepass else 1.0, dropout=adapter, add=not first,
                active_only=prefix,
            ))  # fmt: skip
        if not (onepass or fused):
            assert self.dx is not None
            kernels.expand_add(dya, p.lora_a, self.dx, None, 1.0, dropout=True)
