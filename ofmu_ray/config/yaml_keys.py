"""Keys of YAML as they are written: YAML 1.1 takes `on`, which is an option, for true, and 1 for a number."""

from __future__ import annotations

import yaml

TEXT, NULL, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
"""Types of YAML."""


def with_text_keys(text: str) -> str:
    """The same YAML, its keys in quotes where they would be something else than texts. Raises yaml.YAMLError."""
    node = yaml.compose(text, Loader=yaml.SafeLoader) if ":" in text else None
    return yaml.serialize(node, Dumper=yaml.SafeDumper) if node is not None and _make_texts(node) else text


def _make_texts(node: yaml.Node) -> int:
    """Make texts of all scalar keys; how many were none."""
    if isinstance(node, yaml.SequenceNode):
        return sum(_make_texts(item) for item in node.value)
    if not isinstance(node, yaml.MappingNode):
        return 0
    others = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag not in (TEXT, MERGE)]
    for key in others:
        key.tag = TEXT
    return len(others) + sum(_make_texts(value) for _, value in node.value)
