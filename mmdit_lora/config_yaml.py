"""YAML as people write configs: the scalars of YAML 1.2, no tags, no key twice; every key with its line.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is False, `010` is 8 and `1:30` is 90. In a config each of them is
a trap (`mixed_precision: no`), so the loader here resolves scalars by YAML 1.2's core schema.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from mmdit_lora.errors import InputError

_MOST_NODES = 10_000_000
Lines = dict[tuple[Any, ...], int]

_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_CORE = (
    ("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]  # not those of SafeLoader

    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node))  # SafeLoader's would read 010 as octal

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node).lower()
        return float(
            text.replace(".inf", "inf").replace(".nan", "nan") if text.lstrip("+-") in (".inf", ".nan") else text
        )


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would misread: 'no' for readers of 1.1, '1e-4' for ours."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


# A config has no bytes, dates, sets or pairs: SafeLoader's constructors of these, asked for by a tag, are left out.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, *, where: str, numbered: bool = True) -> tuple[Any, Lines]:
    """The value of `text`, and the line (from 1) of every key of its mappings, by its path of keys.

    Args:
        where: the text's name in errors. numbered: whether a line number follows it (a file) or not (an argument).

    Raises:
        InputError: no YAML, a tag (`!!python/object` and its kin), a key twice; with the line.
    """
    lines: Lines = {}

    def visit(node: yaml.Node) -> None:
        _visit(node, (), lines, where, numbered, seen=set())

    return construct(lambda: _Loader(text), where=where, numbered=numbered, visit=visit), lines


def construct(
    make: Callable[[], Any], *, where: str, numbered: bool = True, visit: Callable[[yaml.Node], None] | None = None
) -> Any:
    """The value of the document of a PyYAML loader.

    Args:
        make: makes the loader. where, numbered: as of `parse_yaml`. visit: looks at the nodes before anything is made of them.

    Raises:
        InputError: no YAML, or its aliases stand for more than `_MOST_NODES`; with the line.
    """
    try:
        loader = make()
        node = loader.get_single_node()
        if node is None:
            return None
        if visit is not None:
            visit(node)
        _refuse_bomb(node, {}, where, numbered)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if numbered and mark is not None else where
        if isinstance(error, yaml.constructor.ConstructorError) and "tag" in str(error.problem):
            raise InputError(
                f"holds a YAML tag ({error.problem})",
                where=place,
                cure="write plain values: no objects are made of tags",
            ) from None
        raise InputError(f"is not YAML: {error.problem or error.context}", where=place) from None
    except yaml.YAMLError as error:
        raise InputError(f"is not YAML: {error}", where=where) from None
    except (RecursionError, ValueError, KeyError) as error:  # KeyError: `!!bool x`
        raise InputError(f"is not YAML that can be read: {error}", where=where) from None


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that this module and any other reader read alike, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _refuse_bomb(node: yaml.Node, sizes: dict[int, float], where: str, numbered: bool) -> float:
    """How many values a node stands for where every alias is written out; `InputError` for too many, or for a node in itself.

    Args:
        sizes: of the nodes that were counted, by id.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until it is counted: in itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_refuse_bomb(part, sizes, where, numbered) for part in parts)
    if sizes[id(node)] > _MOST_NODES:
        raise InputError(
            f"its aliases (*name) stand for more than {_MOST_NODES:,} values",
            where=f"{where}:{node.start_mark.line + 1}" if numbered else where,
            cure="write the values out",
        )
    return sizes[id(node)]


def _visit(node: yaml.Node, keys: tuple[Any, ...], lines: Lines, where: str, numbered: bool, *, seen: set[int]) -> None:
    """Note the line of each key, refuse a key twice. `seen` ends the loop of an alias inside its own anchor."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _visit(item, (*keys, None), lines, where, numbered, seen=seen)
    elif isinstance(node, yaml.MappingNode):
        here: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in here and name != "<<":
                raise InputError(
                    f"the key {name!r} stands twice (first in line {here[name]})",
                    where=f"{where}:{line}" if numbered else where,
                    cure="keep one of them",
                )
            here[name] = line
            lines[(*keys, name)] = line
            _visit(value, (*keys, name), lines, where, numbered, seen=seen)
