"""PTX text to kernels: statements, labels, registers, shared variables and parameters."""

from __future__ import annotations

import re

from .formats import PtxError


class Instr:
    __slots__ = ("args", "line", "neg", "op", "pred", "text")

    def __init__(self, pred, neg, op, args: list[str], line, text) -> None:
        self.pred, self.neg, self.op, self.args, self.line, self.text = (
            pred,
            neg,
            op,
            args,
            line,
            text,
        )


def split_args(s):
    out, depth, cur = ([], 0, "")
    for c in s:
        if c in "{[(":
            depth += 1
        if c in "}])":
            depth -= 1
        if c == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out


class Kernel:
    def __init__(self, name: str, params, body, shared: bool, reqntid) -> None:
        self.name, self.params, self.shared, self.reqntid = (name, params, dict(shared), reqntid)
        self.regs, self.labels, self.code = ({}, {}, [])
        self.smem_static = 0
        self._parse(body)

    def _parse(self, body):
        scopes, nscope = ([{}], 0)
        for line, text in body:
            t = text.strip()
            while t:
                if t[0] == "{":
                    nscope += 1
                    scopes.append({"#": nscope})
                    t = t[1:].strip()
                    continue
                if t[0] == "}":
                    scopes.pop()
                    t = t[1:].strip()
                    continue
                m = re.match("([$\\w%]+):(?!:)\\s*", t)
                if m:
                    self.labels[self._scoped(m.group(1), scopes)] = len(self.code)
                    t = t[m.end() :]
                    continue
                i = t.find(";")
                if i < 0:
                    if t.startswith((".loc", ".file", ".pragma", ".section")):
                        break
                    raise PtxError(f"line {line}: no ';' in {t!r}")
                st, t = (t[:i].strip(), t[i + 1 :].strip())
                if st:
                    self._stmt(st, line, scopes)

    def _scoped(self, n, scopes):
        return n

    def _stmt(self, st, line, scopes):
        if st.startswith(".reg"):
            ty = re.match("\\.reg\\s+\\.(\\w+)\\s+(.*)", st, re.S)
            for r in split_args(ty.group(2)):
                m = re.match("(.+)<(\\d+)>$", r)
                if m:
                    for k in range(int(m.group(2))):
                        self.regs[f"{m.group(1)}{k}"] = ty.group(1)
                elif len(scopes) > 2:
                    new = f"{r}@{scopes[-1]['#']}"
                    scopes[-1][r] = new
                    self.regs[new] = ty.group(1)
                else:
                    self.regs[r] = ty.group(1)
            return
        m = re.match("\\.shared\\s+\\.align\\s+(\\d+)\\s+\\.\\w+\\s+([\\w$]+)(?:\\[(\\d+)\\])?", st)
        if m:
            al = int(m.group(1))
            self.smem_static = -(-self.smem_static // al) * al
            self.shared[m.group(2)] = self.smem_static
            self.smem_static += int(m.group(3) or 8)
            return
        if st.startswith((".loc", ".pragma", ".local", ".file", ".branchtargets")):
            if st.startswith(".local"):
                raise PtxError(
                    f"line {line}: local memory (a spilled or dynamically indexed array): {st}"
                )
            return
        pred = neg = None
        m = re.match("@(!?)(\\S+)\\s+(.*)", st, re.S)
        if m:
            neg, pred, st = (bool(m.group(1)), m.group(2), m.group(3))
        m = re.match("(\\S+)\\s*(.*)", st, re.S)
        op, rest = (m.group(1), " ".join(m.group(2).split()))

        def ren(txt):
            for sc in scopes[2:]:
                for k, v in sc.items():
                    if k != "#":
                        txt = re.sub(f"(?<![\\w%$]){re.escape(k)}(?![\\w@])", v, txt)
            return txt

        self.code.append(
            Instr(
                ren(pred) if pred else None,
                neg,
                op.split("."),
                [ren(a) for a in split_args(rest)],
                line,
                st,
            )
        )


class Module:
    def __init__(self, text) -> None:
        text = re.sub("/\\*.*?\\*/", "", text, flags=re.S)
        lines = [(i + 1, re.sub("//.*", "", line)) for i, line in enumerate(text.split("\n"))]
        self.kernels, i, gshared, gs = ({}, 0, {}, 0)
        while i < len(lines):
            t = lines[i][1]
            m = re.match(
                "\\s*\\.extern\\s+\\.shared\\s+\\.align\\s+\\d+\\s+\\.\\w+\\s+([\\w$]+)", t
            )
            if m:
                gshared[m.group(1)] = "dyn"
            m2 = re.match(
                "\\s*(?:\\.visible\\s+|\\.weak\\s+)?\\.shared\\s+\\.align\\s+(\\d+)\\s+\\.\\w+\\s+([\\w$]+)\\[(\\d+)\\]",
                t,
            )
            if m2:
                al = int(m2.group(1))
                gs = -(-gs // al) * al
                gshared[m2.group(2)] = gs
                gs += int(m2.group(3))
            m = re.match("\\s*(?:\\.visible\\s+)?\\.entry\\s+([\\w$]+)", t)
            if not m:
                i += 1
                continue
            head = ""
            while "{" not in lines[i][1]:
                head += lines[i][1] + "\n"
                i += 1
            pre, post = lines[i][1].split("{", 1)
            head += pre
            params = []
            for p in re.finditer(
                "\\.param\\s+(?:\\.align\\s+\\d+\\s+)?\\.(\\w+)(?:\\s+\\.ptr)?[^,\\)\\n]*?([\\w$]+)(?:\\[(\\d+)\\])?\\s*(?=[,\\)\\n])",
                head,
            ):
                params.append((p.group(2), p.group(1), int(p.group(3)) if p.group(3) else None))
            rq = re.search("\\.(?:reqntid|maxntid)\\s+(\\d+)", head)
            depth, body = (1, [])
            ln, rest = (lines[i][0], post)
            while True:
                buf = ""
                for c in rest:
                    if c == "{":
                        depth += 1
                    if c == "}":
                        depth -= 1
                        if depth == 0:
                            break
                    buf += c
                body.append((ln, buf))
                if depth == 0:
                    break
                i += 1
                ln, rest = lines[i]
            joined, cur, cl = ([], "", None)
            for ln, b in body:
                b = b.strip()
                if not b:
                    continue
                if b.startswith((".loc", ".file", ".section")):
                    continue
                cur = cur + " " + b if cur else b
                cl = cl or ln
                if cur.rstrip()[-1] in ";:{}":
                    joined.append((cl, cur))
                    cur, cl = ("", None)
            if cur:
                joined.append((cl, cur))
            k = Kernel(m.group(1), params, joined, gshared, int(rq.group(1)) if rq else None)
            k.smem_static = max(k.smem_static, gs)
            self.kernels[k.name] = k
            i += 1
