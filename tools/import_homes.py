"""A contract for import-linter: each library has one home, over all modules, so that a new one is protected without being named."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class Homes(Contract):
    """A table with one row per library: `LIBRARY: HOMES | REACHED FROM`.

    HOMES are the modules (with all that is in them) that may import it. REACHED FROM are those that may import a home; of a row that
    has this part no other module may depend on the library, not even through others. A library that has no row is refused.
    """

    table = fields.ListField(subfield=fields.StringField())
    everywhere = fields.ListField(subfield=fields.StringField())
    """Libraries that any module may import."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Compare the table with the imports that there are."""
        rows = dict(map(_parsed, self.table))
        own = {
            name for name in graph.modules if not graph.is_module_squashed(name)
        }  # a library is one module, whatever is in it
        (root,) = {name.partition(".")[0] for name in own}
        wrong: list[list[str]] = []
        for library in sorted(graph.modules - own - sys.stdlib_module_names):
            importers = graph.find_modules_that_directly_import(library)
            if library not in rows:
                wrong += [[each, library] for each in sorted(importers) if library not in self.everywhere]
                continue
            homes, reached_from = rows[library]
            wrong += [[each, library] for each in sorted(importers) if not _within(each, root, homes)]
            if reached_from is not None:
                for each in sorted(graph.find_downstream_modules(library) - importers):
                    if not _within(each, root, homes + reached_from):
                        wrong.append(list(graph.find_shortest_chain(each, library) or ()))
        return ContractCheck(kept=not wrong, metadata={"wrong": wrong})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Each chain of imports that should not be."""
        for chain in check.metadata["wrong"]:
            output.print_error(" -> ".join(chain), bold=False)


def _parsed(row: str) -> tuple[str, tuple[list[str], list[str] | None]]:
    library, _, rest = row.partition(":")
    homes, bar, reached_from = rest.partition("|")
    return library.strip(), (_names(homes), _names(reached_from) if bar else None)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _within(module: str, root: str, homes: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{root}.{home}.") for home in homes)
