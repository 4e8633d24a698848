"""Message trees as of OpenAssistant: many answers to one prompt, ranked by people; the best of each as a dialogue.

Source: Köpf et al., OpenAssistant Conversations: Democratizing Large Language Model Alignment, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.instructions.chat import Messages
from ffnkit.tasks.rows.splitting import Table, size

NAME = "oasst1"
HUB = ("OpenAssistant/oasst1",)
_ROLES = {"prompter": "user", "assistant": "assistant"}


def languages(name: str) -> tuple[str, ...]:
    """The languages of a task by its name: "oasst1" English, "oasst1:de,pt-BR" these, "oasst1:all" () for all.

    Raises:
        FfnkitError: no language behind the colon.
    """
    if name == NAME:
        return ("en",)
    asked = tuple(each.strip() for each in name.removeprefix(f"{NAME}:").split(",") if each.strip())
    if not asked:
        raise FfnkitError(f"task {name!r}", "no language is named", f"Write {NAME}:en, {NAME}:de,es or {NAME}:all")
    return () if asked == ("all",) else asked


def is_tree(columns: Sequence[str]) -> bool:
    """Whether columns of these names hold messages that name their parents, or whole trees."""
    return {"message_id", "parent_id", "role", "text"} <= set(columns) or {"message_tree_id", "prompt"} <= set(columns)


def best_paths(table: Table, wanted: Sequence[str]) -> list[Messages]:
    """A dialogue for each tree: from its root the reply of the best rank (0; none counts as last), to the end.

    Of replies with equal ranks the first in the file counts. Deleted messages are left out, with what hangs on them.

    Args:
        table: a message a row with the id of its parent (as on the hub), or a tree a row with nested replies (as in
            the released files).
        wanted: languages of the root, such as "en"; () for all.

    Raises:
        FfnkitError: no such columns, or a role that is neither prompter's nor assistant's.
    """
    if not is_tree(list(table)):
        found = f"its columns are {', '.join(map(repr, table))}"
        raise FfnkitError("message trees", found, "Give message_id, parent_id, role, text, lang and rank, or trees")
    nodes = _nested(table) if "parent_id" not in table else _flat(table)
    roots: list[dict[str, Any]] = []
    replies: dict[Any, list[dict[str, Any]]] = {}
    for node in nodes:
        if node.get("deleted"):
            continue
        if node.get("parent_id") is None:
            roots.append(node)
        else:
            replies.setdefault(node["parent_id"], []).append(node)
    return [_path(root, replies) for root in roots if not wanted or root.get("lang") in wanted]


def _flat(table: Table) -> Iterator[dict[str, Any]]:
    for row in range(size(table)):
        yield {name: column[row] for name, column in table.items()}


def _nested(table: Table) -> Iterator[dict[str, Any]]:
    """The messages of whole trees, each with the id of the one above."""
    stack = [(each, None) for each in reversed(table["prompt"])]
    while stack:
        node, parent = stack.pop()
        if not isinstance(node, dict) or "message_id" not in node:
            raise FfnkitError("message trees", "a tree whose prompt is no message", "Give the released files")
        yield {**node, "parent_id": parent}
        stack += [(each, node["message_id"]) for each in reversed(node.get("replies") or [])]


def _path(root: dict[str, Any], replies: dict[Any, list[dict[str, Any]]]) -> Messages:
    messages: Messages = []
    node: dict[str, Any] | None = root
    while node is not None:
        if node.get("role") not in _ROLES or not isinstance(node.get("text"), str):
            found = f"message {node.get('message_id')} has the role {node.get('role')!r}, or no text"
            raise FfnkitError("message trees", found, "Give messages of prompter and assistant")
        messages.append({"role": _ROLES[node["role"]], "content": node["text"]})
        node = min(replies.get(node["message_id"], []), key=_rank, default=None)
    return messages


def _rank(node: dict[str, Any]) -> float:
    rank = node.get("rank")
    return float("inf") if rank is None else float(rank)
