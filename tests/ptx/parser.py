"""PTX text to kernels: statements, scopes, labels, registers, variables and parameters."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
from typing import Any

from .formats import PtxError

_COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
_LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
_LINE = re.compile(r"\.(?:loc|file|section)\b[^\n]*")
_GUARD = re.compile(r"@(!?)(\S+)\s+(.*)", re.S)
_WORD = re.compile(r"[%$A-Za-z_][\w$]*")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{};]*)\{", re.S)
_VARIABLE = re.compile(
    r"(\.extern\s+)?(?:\.visible\s+|\.weak\s+|\.common\s+)?\.(shared|global|const)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*(?:=\s*([^;]*))?;"
)
_SIZE = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclasses.dataclass(slots=True, eq=False)
class Instr:
    """One instruction; `words` are all names in its operands, `target` the pc of a branch."""

    pred: str | None
    neg: bool
    op: list[str]
    args: list[str]
    line: int
    text: str
    source: str
    words: frozenset[str]
    scopes: tuple[int, ...]
    target: int = -1
    fn: Any = None
    collective: bool = False


@dataclasses.dataclass
class Variable:
    """A module-level variable of the `global` or `const` space."""

    size: int
    align: int
    data: bytes


@functools.cache
def split_args(text: str) -> list[str]:
    """Comma-separated operands, brackets kept whole. The list is shared: do not change it."""
    if not any(c in text for c in "{[("):
        return [a.strip() for a in text.split(",")] if text.strip() else []
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        out.append(text[start:].strip())
    return out


def _width(ty: str) -> int:
    return _SIZE[ty.lstrip("bfus")]


class Kernel:
    """A parsed entry: `code`, `regs` (name to type), shared variables and parameters."""

    def __init__(self, name: str, params: list[tuple[str, str, int | None]], head: str) -> None:
        self.name, self.params = name, params
        self.regs: dict[str, str] = {}
        self.code: list[Instr] = []
        self.shared: dict[str, int | str] = {}
        self.smem_static = 0
        self.local = ""  # the declaration of local memory, refused when the kernel is launched
        self.directives = head

    @property
    def is_cluster(self) -> bool:
        return ".reqnctapercluster" in self.directives or ".explicitcluster" in self.directives

    def add_shared(self, name: str, align: int, size: int) -> None:
        self.smem_static = -(-self.smem_static // align) * align
        self.shared[name] = self.smem_static
        self.smem_static += size


class Module:
    """Everything in a PTX file: `kernels` by name, module variables, the target arch."""

    def __init__(self, text: str) -> None:
        self.header = text[:2000]
        # Comments go, line numbers stay.
        text = _COMMENT.sub(
            lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n") or " ", text
        )
        self._lines = [m.end() for m in re.finditer("\n", text)]
        self.files = {m[1]: m[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        self.kernels: dict[str, Kernel] = {}
        self.variables: dict[str, Variable] = {}
        outside, pos = [], 0
        for m in _ENTRY.finditer(text):
            if m.start() < pos:
                continue
            outside.append(text[pos : m.start()])
            kernel = Kernel(m[1], _params(m[2] or ""), m[3])
            pos = _Body(self, kernel, text, m.end()).end
            self.kernels[kernel.name] = kernel
        outside.append(text[pos:])
        for m in _VARIABLE.finditer("".join(outside)):
            self._variable(m)

    def _variable(self, m: re.Match[str]) -> None:
        count = 1 if m[6] is None else int(m[6] or 0)
        size, align = count * _width(m[4]), int(m[3] or _width(m[4]))
        if m[2] == "shared":
            for kernel in self.kernels.values():
                if m[1]:
                    kernel.shared[m[5]] = "dyn"
                else:
                    kernel.add_shared(m[5], align, size)
            return
        values = [int(v, 0) for v in re.findall(r"-?\b(?:0x[\da-fA-F]+|\d+)\b", m[7] or "")]
        data = b"".join(
            (v % (1 << 8 * _width(m[4]))).to_bytes(_width(m[4]), "little") for v in values
        )
        self.variables[m[5]] = Variable(size, align, data.ljust(size, b"\0"))

    def line_of(self, pos: int) -> int:
        """1-based line of a character."""
        return bisect.bisect_right(self._lines, pos) + 1


def _params(text: str) -> list[tuple[str, str, int | None]]:
    out = []
    for p in split_args(" ".join(text.split())):
        m = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?$", p)
        if not m:
            raise PtxError(f"parameter not understood: {p!r}")
        out.append((m[2], m[1], int(m[3]) if m[3] else None))
    return out


class _Body:
    """Parses one kernel's body from just behind its opening brace; `end` is behind the closing."""

    def __init__(self, module: Module, kernel: Kernel, text: str, pos: int) -> None:
        self.module, self.k = module, kernel
        self.names: list[dict[str, str]] = [{}]
        self.scopes: tuple[int, ...] = (0,)
        self.labels: dict[tuple[int, str], int] = {}
        self.source = ""
        counter = 0
        while True:
            while text[pos].isspace():
                pos += 1
            c = text[pos]
            if c == "{":
                counter += 1
                self.names.append({})
                self.scopes += (counter,)
                pos += 1
            elif c == "}":
                self.names.pop()
                self.scopes = self.scopes[:-1]
                pos += 1
                if not self.names:
                    break
            elif m := _LINE.match(text, pos):
                self._location(m[0])
                pos = m.end()
            elif m := _LABEL.match(text, pos):
                self.labels[self.scopes[-1], m[1]] = len(kernel.code)
                pos = m.end()
            else:
                end = text.find(";", pos)
                if end < 0:
                    raise PtxError(
                        f"line {module.line_of(pos)}: no ';' after {text[pos : pos + 40]!r}"
                    )
                self._statement(text[pos:end].strip(), pos)
                pos = end + 1
        self.end = pos
        self._resolve()

    def _location(self, text: str) -> None:
        m = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if m:
            name = self.module.files.get(m[1], m[1])
            self.source = f"{name.rsplit('/', 1)[-1]}:{m[2]}"

    def _statement(self, text: str, pos: int) -> None:
        if not text:
            return
        if text[0] == ".":
            self._directive(text, pos)
            return
        line, pred, neg = self.module.line_of(pos), None, False
        if text[0] == "@" and (m := _GUARD.match(text)):
            neg, pred, text = bool(m[1]), self._rename(m[2]), m[3]
        op, _, rest = " ".join(text.split()).partition(" ")
        rest = self._rename(" ".join(rest.split()))
        args = split_args(rest)
        words = frozenset(_WORD.findall(rest))
        self.k.code.append(
            Instr(pred, neg, op.split("."), args, line, " ".join(text.split()),
                  self.source, words, self.scopes)
        )  # fmt: skip

    def _directive(self, text: str, pos: int) -> None:
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            for name in split_args(m[2]):
                if many := re.match(r"(.+)<(\d+)>$", name):
                    for i in range(int(many[2])):
                        self.k.regs[f"{many[1]}{i}"] = m[1]
                elif len(self.scopes) > 1:
                    self.names[-1][name] = f"{name}@{self.scopes[-1]}"
                    self.k.regs[f"{name}@{self.scopes[-1]}"] = m[1]
                else:
                    self.k.regs[name] = m[1]
        elif m := re.match(
            r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?", text
        ):
            width = _width(m[2])
            self.k.add_shared(m[3], int(m[1] or width), width * int(m[4] or 1))
        elif text.startswith(".local"):
            self.k.local = f"line {self.module.line_of(pos)}: {text}"

    def _rename(self, text: str) -> str:
        """Names declared in an inner scope get that scope's number."""
        if not any(self.names[1:]):
            return text

        def inner(m: re.Match[str]) -> str:
            for names in reversed(self.names[1:]):
                if m[0] in names:
                    return names[m[0]]
            return m[0]

        return _WORD.sub(inner, text)

    def _resolve(self) -> None:
        """Branch targets: the innermost scope's label wins."""
        for ins in self.k.code:
            if ins.op[0] != "bra":
                continue
            for scope in reversed(ins.scopes):
                if (scope, ins.args[0]) in self.labels:
                    ins.target = self.labels[scope, ins.args[0]]
                    break
            else:
                raise PtxError(f"line {ins.line}: no label {ins.args[0]}")
