"""YAML from people one does not know: `safe_load` without the features that let a small file do harm."""

from __future__ import annotations

import re
from typing import Any

import yaml

from harness.errors import short

MAX_DEPTH = 16  # of nested mappings and lists; a sweep needs 6
MAX_NUMBER = 2**53  # JSON readers disagree on larger whole numbers


def load_yaml(text: str) -> Any:
    """Parse a YAML text of names, numbers, lists, and mappings with names as keys.

    Raises ValueError with a message of one line, which names the line of the text if it is known.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{line}not YAML: {problem}") from error
    except (ValueError, LookupError) as error:  # a scalar that its tag cannot read, such as 2026-99-99
        raise ValueError(f"not YAML: {str(error) or type(error).__name__}") from error


class _StrictLoader(yaml.SafeLoader):
    """A `SafeLoader` that refuses aliases (a short file can expand to a huge one), deep nesting (the parser
    recurses), very long numbers, repeated keys, and keys that are not names."""

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
                raise _refused(f"the key {key!r} is repeated", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) > MAX_NUMBER:
            raise _refused(f"a whole number beyond {MAX_NUMBER}", node)
        return number


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _refused(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


# YAML 1.1 reads `1e-3` as a string, because it has no dot; people mean a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
