"""Which prompts the iteration samples: a selector chooses them, and they are on the disk before anybody uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onlinerl import users_code
from onlinerl.controller import history
from onlinerl.controller.iteration import Iteration
from onlinerl.errors import OnlineRLError, PromptError
from onlinerl.protocols.selection import Selector
from onlinerl.types import Pool, Selected, SelectRecord


def select(it: Iteration) -> SelectRecord:
    """Ask the selector once. What it chose stays, whatever happens later.

    Raises:
        PromptError: if it chooses what cannot be sampled.
    """
    table = it.parts.store.selection(it.number)
    pool = history.pool(it)
    if not table.sealed:
        chosen = _asked(it.parts.config.selection, pool)
        _require_possible(pool, chosen)
        _require_reusable(it.parts.config.selection, pool, chosen)
        table.clear()
        table.append(chosen)
        table.seal()
    chosen = list(table)
    return {
        "prompts": len(chosen),
        "visited": sum(one.prompt_id in pool.visits for one in chosen),
        "reused": sum(one.reused_from is not None for one in chosen),
        "newest": it.sampling_version,
    }


def _asked(selector: Selector, pool: Pool) -> list[Selected]:
    """What it chooses; what code of the user's own raises is said with its line."""
    try:
        chosen = list(selector.select(pool))
    except OnlineRLError:
        raise
    except Exception as problem:
        raise PromptError(
            f"{type(selector).__name__}.select failed: {users_code.said(problem)}{users_code.line(problem)}",
            field="selection.name",
            fix=users_code.FIX,
        ) from problem
    if strange := [one for one in chosen if not isinstance(one, Selected)]:
        raise _wrong(f"a {type(strange[0]).__name__}, which is no Selected")
    return chosen


def _require_possible(pool: Pool, chosen: Sequence[Selected]) -> None:
    """Refuse what cannot be sampled: a prompt that is no training prompt, or is there twice, or may not come again."""
    may, ids = {prompt.id for prompt in pool.open}, [one.prompt_id for one in chosen]
    if strange := [i for i in ids if i not in may]:
        known = strange[0] in {prompt.id for prompt in pool.prompts}
        raise _wrong(
            f"{len(strange)} prompts that may not be sampled, e.g. {strange[0]!r}, which "
            + ("an earlier iteration has sampled (prompts.reuse is false)" if known else "is no training prompt")
        )
    if len(set(ids)) < len(ids):
        raise _wrong(f"{len(ids) - len(set(ids))} prompts twice")
    if not pool.per_iteration <= len(ids) <= pool.most:
        raise _wrong(f"{len(ids)} prompts, and {pool.per_iteration} to {pool.most} are wanted")
    if odd := [one for one in chosen if not (math.isfinite(one.probability) and 0 < one.probability <= 1)]:
        raise _wrong(f"prompt {odd[0].prompt_id!r} with probability {odd[0].probability}")


def _require_reusable(selector: Selector, pool: Pool, chosen: Sequence[Selected]) -> None:
    """Refuse responses that nobody has judged, that are not the last ones, or that `check` was told nothing of."""
    for one in chosen:
        if one.reused_from is None:
            continue
        if not selector.reuses:
            raise _wrong(f"responses of iteration {one.reused_from} to prompt {one.prompt_id!r}, and its `reuses` is False")
        visit = pool.visits.get(one.prompt_id)
        if visit is None or visit.sampled_in != one.reused_from:
            last = (
                "there are none that were judged" if visit is None else f"the last that were judged are of {visit.sampled_in}"
            )
            raise _wrong(f"responses of iteration {one.reused_from} to prompt {one.prompt_id!r}, and {last}")


def _wrong(what: str) -> PromptError:
    return PromptError(
        f"chooses {what}",
        field="selection.name",
        fix="choose another selector, add prompts, or correct `select` of your own; a resume then asks it again",
    )
