"""Functions of other people's modules, replaced for as long as an attached model lives.

A model file calls its attention, and mlx-lm's generation its helpers, by a global name. What stands under
that name is replaced in the namespace where it is looked up. That need not be a module which can be imported
by its name: mlx-lm runs a folder's own ``model_file`` without registering it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

Namespace = dict[str, Any]
# from the function found to the one that takes its place, which must be inert where no bounded cache is
Replacement = Callable[[Callable[..., Any]], Callable[..., Any]]


class User:
    """On whose behalf functions are replaced, until :func:`give_back` or this object's end."""


def take_over(namespace: Namespace, name: str, replacement: Replacement, user: User) -> None:
    """Replace the function ``name`` of a namespace, or join those for whom that has been done."""
    if not hasattr(namespace[name], "_kvret_users"):
        stock = namespace[name]
        ours = functools.wraps(stock)(replacement(stock))
        vars(ours).update(_kvret_stock=stock, _kvret_users=weakref.WeakValueDictionary())
        namespace[name] = ours
    users = namespace[name]._kvret_users
    if id(user) not in users:
        users[id(user)] = user
        weakref.finalize(user, _restore_unused, namespace, name).atexit = False


def give_back(namespace: Namespace, name: str, user: User) -> None:
    """Undo :func:`take_over`; the stock function comes back with the last user's leave."""
    getattr(namespace[name], "_kvret_users", {}).pop(id(user), None)
    _restore_unused(namespace, name)


def _restore_unused(namespace: Namespace, name: str) -> None:
    function = namespace[name]
    # the dictionary may count one more for a moment, of whom nothing but the key is left
    if hasattr(function, "_kvret_stock") and not list(function._kvret_users.values()):
        namespace[name] = function._kvret_stock
