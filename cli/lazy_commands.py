"""Groups of commands whose modules are imported when a command runs.

Celery, SQLAlchemy and the HTTP client need a second to import. Each command needs only some of them, and help none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from config.garbage_collection import freeze_imported_objects


@dataclass(frozen=True, kw_only=True)
class LazyCommand:
    """Where a command is defined."""

    module: str
    attribute: str
    """A function, or the `typer.Typer` of a group."""
    summary: str
    """The first sentence of its help."""
    command_class: str = ""
    """The class of the command in the same module, if it has one of its own."""


class LazyGroup(TyperGroup):
    """A group that knows names and summaries of its commands, and imports a command when it runs."""

    table: ClassVar[Mapping[str, LazyCommand]]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        summaries = {name: TyperCommand(name, help=lazy.summary) for name, lazy in self.table.items()}
        self.commands = dict(self.commands) | summaries

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that the arguments name."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.load(name), rest

    def load(self, name: str) -> Any:
        """Return a command. Import it if it is not imported yet."""
        lazy = self.table.get(name)
        if lazy is not None and type(self.commands[name]) is TyperCommand and self.commands[name].callback is None:
            self.commands[name] = _imported(name, lazy)
        return self.commands[name]

    def load_all(self) -> None:
        """Import all commands of this group and of its groups."""
        for name in self.commands:
            command = self.load(name)
            if isinstance(command, LazyGroup):
                command.load_all()


def _imported(name: str, lazy: LazyCommand) -> Any:
    with freeze_imported_objects():
        module = import_module(lazy.module)
    target = getattr(module, lazy.attribute)
    if isinstance(target, typer.Typer):
        group = typer.main.get_group(target)
        group.name = name
        return group
    single = typer.Typer(add_completion=False)
    single.command(name, cls=getattr(module, lazy.command_class) if lazy.command_class else None)(target)
    return typer.main.get_command(single)
