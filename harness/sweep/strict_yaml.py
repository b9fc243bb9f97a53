"""YAML of people one does not know: what `safe_load` reads, less what a small file could hurt with."""

from __future__ import annotations

import re
from typing import Any

import yaml

from harness.errors import short

MAX_DEPTH = 16  # of mappings and lists in each other; a sweep needs 6
MAX_NUMBER = 2**53  # above, JSON readers no longer agree on a whole number


def load_yaml(text: str) -> Any:
    """The value a YAML text stands for: names, numbers, lists, and mappings with names as keys.

    Raises ValueError in one line, with the number of the text's line if it is known.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{place}not YAML: {problem}") from error
    except (ValueError, LookupError) as error:  # a scalar that its tag cannot read, such as 2026-99-99
        raise ValueError(f"not YAML: {str(error) or type(error).__name__}") from error


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses what a hostile file could hurt with: aliases (a short file could stand for a
    huge one), deep nesting (the parser recurses), endless numbers; and keys that are repeated or no names."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent):
            raise _refused("aliases (*name) are not allowed in a sweep", event)
        if self._depth >= MAX_DEPTH:
            raise _refused(f"nested deeper than {MAX_DEPTH}", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or not key.isprintable():
                raise _refused(f"the key {short(key)} is not a name", key_node)
            if key in seen:
                raise _refused(f"the key {key!r} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) > MAX_NUMBER:
            raise _refused(f"a whole number beyond {MAX_NUMBER}", node)
        return number


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _refused(problem: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


# YAML 1.1 reads `1e-3` as a string, because it wants a dot; people mean a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
