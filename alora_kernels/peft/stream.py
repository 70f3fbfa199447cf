"""Finds the layers of a model whose input rows are not the tokens of the forward.

Most layers see exactly these tokens. This file finds the others, once, by the model's structure:

    BESIDE    never sees the tokens: towers, projectors, encoders, keys and values of
              cross-attention
    CACHE     sees the whole sequence: a projection of what the cache returns
    EXPERT    sees some of the tokens, in another order: a routed expert
    HEAD      sees the tokens, or some of them: a module that follows the decoder
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BESIDE, CACHE, EXPERT, HEAD = "beside", "cache", "expert", "head"

Children = list[tuple[str, nn.Module]]
IsHead = Callable[[str, nn.Module], bool]

# Names of modules that do not see tokens, for models whose structure alone does not show it.
OTHER_SENSES = re.compile(
    r"vision|visual|image|img|pixel|patch|video|audio|speech|sound|protein|codec|tower|resampler"
    r"|perceiver|qformer|mm_proj|multi_?modal",
    re.IGNORECASE,
)
PROJECTORS = re.compile(r"(?<!embed_)proj|bridge|adapter|merger|connect|align", re.IGNORECASE)
HEADS = re.compile(r"head|score|classifier|cls|qa_outputs|output|predictions|embed_out")
CROSS = re.compile(r"cross|enc(oder)?_?(dec(oder)?_?)?att", re.IGNORECASE)
KEYS_AND_VALUES = {"k", "v", "kv", "key", "value", "keys", "values", "wk", "wv", "wkv"}
EXPERTS = re.compile(r"experts?\w*\.\d+(\.|$)")


def find_places(root: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The place of every layer in `paths` whose rows are not the tokens of the forward.

    Args:
        root: the model whose forward takes the tokens.
        paths: names of modules in it.
    """
    stream = Stream(root)
    places = {}
    for path in paths:
        if stream.beside(path) or reads_other_states(root, path):
            places[path] = BESIDE
        elif reads_cache(root, path):
            places[path] = CACHE
        elif EXPERTS.search(path):
            places[path] = EXPERT
        elif stream.head(path):
            places[path] = HEAD
    return places


class Stream:
    """The part of a model that the tokens run through.

    The decoder is the smallest module that holds the token embeddings and a stack of blocks. In a
    text-only model every module outside the decoder is a head. In other models heads are found by
    name and shape, and all other modules outside the decoder never see the tokens.

    Attributes:
        decoder: the decoder's name in the model; None if no module is the decoder.
        heads: names of modules that follow the decoder.
        others: names of modules that never see the tokens.
    """

    def __init__(self, root: nn.Module) -> None:
        self.heads: list[str] = []
        self.others: list[str] = []
        embeddings = token_embeddings(root)
        self.decoder = None if embeddings is None else _decoder(root, embeddings)
        if embeddings is None or self.decoder is None:
            return
        outputs = _output_embeddings(root)
        vocabulary = getattr(root.get_submodule(embeddings), "num_embeddings", None)

        def is_head(path: str, module: nn.Module) -> bool:
            if _is_tower(path, module):
                return False
            if path in outputs or HEADS.search(_leaf(path)):
                return _is_row_of_heads(module) or not _has_blocks(module)
            width = getattr(module, "out_features", None)
            return width is not None and width == vocabulary

        self._sort_inside(_children(root, self.decoder, embeddings), is_head)
        branches: Children = []
        above = self.decoder
        while above:
            below, above = above, above.rpartition(".")[0]
            branches += _children(root, above, below)
        self._sort_outside(branches, is_head)

    def beside(self, path: str) -> bool:
        return _under(path, self.others)

    def head(self, path: str) -> bool:
        return _under(path, self.heads)

    def _sort_inside(self, children: Children, is_head: IsHead) -> None:
        """Sort modules inside the decoder: some hold towers there (Idefics, GIT, Phi-4)."""
        towers = [(path, module) for path, module in children if _is_tower(path, module)]
        rest = [child for child in children if child not in towers]
        self.heads += [path for path, module in rest if is_head(path, module)]
        self.others += [path for path, _ in towers]
        if any(_has_blocks(module) for _, module in towers):
            self.others += [
                path
                for path, module in rest
                if _leads_in(_leaf(path)) and path not in self.heads and not _has_blocks(module)
            ]

    def _sort_outside(self, branches: Children, is_head: IsHead) -> None:
        text_only = not any(
            _is_tower(p, m) or (_has_blocks(m) and not is_head(p, m)) for p, m in branches
        )
        for path, module in branches:
            (self.heads if text_only or is_head(path, module) else self.others).append(path)


def token_embeddings(root: nn.Module) -> str | None:
    """The name of the module that embeds the tokens."""
    ask = getattr(root, "get_input_embeddings", None)
    found = None
    if callable(ask):
        try:
            found = ask()
        except (NotImplementedError, AttributeError):
            found = None
    names = {id(module): path for path, module in root.named_modules()}
    if found is not None and id(found) in names:
        return names[id(found)]
    tables = [
        (module.num_embeddings, path)
        for path, module in root.named_modules()
        if isinstance(module, nn.Embedding) and not OTHER_SENSES.search(path)
    ]
    return max(tables)[1] if tables else None


def _decoder(root: nn.Module, embeddings: str) -> str | None:
    path = embeddings
    while path:
        path = path.rpartition(".")[0]
        if _has_blocks(root.get_submodule(path)):
            return path
    return None


def _has_blocks(module: nn.Module) -> bool:
    """Whether `module` contains a stack of blocks with linear layers."""
    for stack in module.modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential):
            for block in stack:
                if any(True for _ in block.children()) and _has_linear(block):
                    return True
    return False


def _is_row_of_heads(module: nn.Module) -> bool:
    """Whether `module` is a list of single linear layers, such as one head for each codebook."""
    return isinstance(module, nn.ModuleList) and all(
        isinstance(m, nn.Linear | Conv1D) or hasattr(m, "base_layer") for m in module
    )


def _has_linear(module: nn.Module) -> bool:
    return any(
        isinstance(m, nn.Linear | Conv1D) or hasattr(m, "base_layer") for m in module.modules()
    )


def _is_tower(path: str, module: nn.Module) -> bool:
    if OTHER_SENSES.search(_leaf(path)):
        return True
    if isinstance(module, nn.ModuleList):
        return False  # the decoder's own blocks
    return any(isinstance(m, PreTrainedModel | nn.Conv2d | nn.Conv3d) for m in module.modules())


def _leads_in(name: str) -> bool:
    return bool(PROJECTORS.search(name)) and not name.startswith(("project_", "embed"))


def _output_embeddings(root: nn.Module) -> set[str]:
    heads = set()
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            try:
                heads.add(id(module.get_output_embeddings()))
            except (NotImplementedError, AttributeError):
                continue
    return {path for path, module in root.named_modules() if id(module) in heads}


def _children(root: nn.Module, parent: str, without: str) -> Children:
    """The children of `parent`, except the one that holds `without`."""
    lead = f"{parent}." if parent else ""
    children = root.get_submodule(parent).named_children()
    return [(lead + n, module) for n, module in children if not _under(without, [lead + n])]


def _under(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


# ---------------------------------------------------------------------- attention


def reads_other_states(root: nn.Module, path: str) -> bool:
    """Whether this is a key or value projection of cross-attention."""
    parent_path, _, leaf = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    names = [name for name in parent_path.split(".")[-2:] if not name.isdigit()]
    cross = (
        getattr(parent, "is_cross_attention", False) is True
        or CROSS.search(type(parent).__name__)
        or any(map(CROSS.search, names))
    )
    if not cross:
        return False
    # GPT-2's cross-attention computes queries in q_attn, and keys and values in c_attn.
    return bool(KEYS_AND_VALUES & set(leaf.lower().split("_"))) or (
        leaf == "c_attn" and hasattr(parent, "q_attn")
    )


def projects_cache(root: nn.Module) -> str | None:
    """The name of the first layer that projects what the cache returned; None if there is none."""
    for path, module in root.named_modules():
        kind: Any = type(module)
        for child in projections_of_cache(kind):
            layer = getattr(module, child, None)
            if isinstance(layer, nn.Module) and _has_linear(layer):
                return f"{path}.{child}" if path else child
    return None


def reads_cache(root: nn.Module, path: str) -> bool:
    """Whether the layer projects what the cache returned (latent attention's kv_b_proj)."""
    parent, _, leaf = path.rpartition(".")
    kind: Any = type(root.get_submodule(parent))
    return leaf in projections_of_cache(kind)


@cache
def projections_of_cache(kind: type) -> frozenset[str]:
    """Names of the children that an attention class calls on what `cache.update` returned.

    They are read from the source of the class's forward.
    """
    forward = _source(kind, "forward")
    if forward is None:
        return frozenset({"kv_b_proj"})  # the name that every latent attention uses
    found: set[str] = set()
    returned: set[str] = set()
    for statement in _in_order(forward):
        if isinstance(statement, ast.Assign) and _is_update(statement.value):
            returned |= _names(*statement.targets)
            continue
        if isinstance(statement, ast.Assign) and _root_name(statement.value) in returned:
            returned |= _names(*statement.targets)
        if not returned:
            continue
        for child, arguments in _calls_of_self(statement):
            hit = [bool(_names(argument) & returned) for argument in arguments]
            if not any(hit):
                continue
            method = _source(kind, child)
            if method is None:
                found.add(child)
                continue
            names = [a.arg for a in method.args.args[1:]]
            inside = {name for name, is_hit in zip(names, hit) if is_hit}
            found |= {
                inner
                for statement in _in_order(method)
                for inner, given in _calls_of_self(statement)
                if any(_names(argument) & inside for argument in given)
            }
    return frozenset(found)


def _source(kind: type, name: str) -> ast.FunctionDef | None:
    function = inspect.unwrap(getattr(kind, name, None) or _source)
    if function is _source or not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _in_order(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """Simple statements in the order of the text."""
    stack: list[ast.stmt] = list(reversed(function.body))
    while stack:
        statement = stack.pop()
        inner = [
            s
            for field in ("body", "orelse", "finalbody")
            for s in getattr(statement, field, [])
            if isinstance(s, ast.stmt)
        ]
        if inner:
            stack += reversed(inner)
        else:
            yield statement


def _is_update(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "update"
        and bool(re.search(r"cache|past", ast.unparse(value.func.value)))
    )


def _calls_of_self(tree: ast.AST) -> list[tuple[str, list[ast.expr]]]:
    return [
        (node.func.attr, [*node.args, *(k.value for k in node.keywords)])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    ]


def _names(*trees: ast.AST) -> set[str]:
    return {n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)}


def _root_name(value: ast.expr) -> str | None:
    """The variable behind indices, attributes and methods: `kv` of `kv[0].transpose(1, 2)`."""
    while not isinstance(value, ast.Name):
        if isinstance(value, ast.Call):
            value = value.func
        elif isinstance(value, ast.Subscript | ast.Attribute):
            value = value.value
        else:
            return None
    return value.id
