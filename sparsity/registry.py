"""Methods by name: scores, schedules, scopes and updates as settings, help, plans, cards and records refer to them.

A method is an object with a `name`, a `label` and a docstring. Settings give its name, or `my.module:Method` for a method
that the user wrote; the callback also accepts an instance. This needs only the standard library.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Method:
    """A score, schedule, scope or update."""

    name: str = ""
    """The method's name in settings."""
    label: str = ""
    """The method's description in cards and plots: a phrase that fits into a sentence."""


def name_of(method: Any) -> str:
    """Return the name of a method, which is an instance or a class; `module:Class` if it has none."""
    kind = method if inspect.isclass(method) else type(method)
    return getattr(method, "name", "") or f"{kind.__module__}:{kind.__qualname__}"


def label_of(method: Any) -> str:
    """Return the label of a method, which is an instance or a class; its name if it has none."""
    return getattr(method, "label", "") or name_of(method)


class Registry(Mapping[str, T], Generic[T]):
    """The methods of one kind, by name.

    Args:
        kind: The name of the kind in settings, such as "score".
        members: The built-in methods by name: instances, or classes if settings create the instances.
        base: The class that a user's own method must extend.
    """

    def __init__(self, kind: str, members: Mapping[str, T], base: type) -> None:
        self.kind = kind
        self._members = dict(members)
        self._base = base
        self._holds_classes = any(inspect.isclass(member) for member in self._members.values())

    def __getitem__(self, name: str) -> T:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def find(self, choice: str | T, key: str = "") -> T:
        """Return the method that `choice` names, or `choice` itself if it is a method.

        Args:
            choice: A name, `module:Name`, or a method.
            key: The setting's name in errors; the kind if it is empty.

        Raises:
            ValueError: The name is unknown, cannot be imported, or is not a method of this kind.
        """
        key = key or self.kind
        if not isinstance(choice, str):
            return self._checked(choice, key)
        if choice in self._members:
            return self._members[choice]
        module, colon, name = choice.partition(":")
        if not colon:
            raise ValueError(
                f"{key}={choice} is not known: choose one of {', '.join(self)}, or name your own as my.module:Name."
            )
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{key}={choice} cannot be loaded ({error}): give the module as Python imports it, a colon and the name in it."
            ) from error
        if inspect.isclass(found) and issubclass(found, self._base) and not self._holds_classes:
            found = found()
        return self._checked(found, key)

    def help_lines(self) -> list[str]:
        """Return each name with the first sentence of its docstring."""
        width = max(map(len, self))
        return [f"{name:{width}}  {_first_sentence(member)}" for name, member in self.items()]

    def _checked(self, method: Any, key: str) -> T:
        base, is_class = self._base.__name__, inspect.isclass(method)
        is_one = issubclass(method, self._base) if is_class else isinstance(method, self._base)
        if is_one and is_class == self._holds_classes:
            found: T = method
            return found
        if is_one and is_class:
            raise ValueError(f"{key}={method.__name__} is a class: give an instance, {method.__name__}().")
        shown = name_of(method) if is_class or isinstance(method, Method) else repr(method)
        raise ValueError(f"{key}={shown} is no {base}: extend sparsity's {base}, or choose one of {', '.join(self)}.")


def _first_sentence(member: Any) -> str:
    kind = member if inspect.isclass(member) else type(member)
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
