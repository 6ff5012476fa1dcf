"""Whether what is trained more than once, or taken over from an earlier iteration, goes together with how prompts are chosen."""

from __future__ import annotations

from onlinerl.config import RunConfig
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm


def check_repeats(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse items that would be trained twice in an iteration, and responses that would be taken over from nowhere.

    Raises:
        ConfigError: naming the selector, or the key of the prompts.
    """
    name, selector, needs = config.algorithm["name"], config.selection, algorithm.needs
    if selector.reuses and needs.replay:
        raise ConfigError(
            f"is {selector.name}, and {name} as configured trains items of earlier iterations once more itself: some "
            "would come twice in an iteration",
            field="selection.name",
            fix="choose another selector" + (", or set algorithm.replay=0" * ("replay" in type(algorithm).model_fields)),
        )
    if selector.reuses and needs.carried:
        raise ConfigError(
            f"is {selector.name}, which takes whole groups over, and {name} as configured the last pair of each prompt",
            field="selection.name",
            fix="choose another selector",
        )
    if needs.carried and not config.prompts.reuse:
        raise ConfigError(
            f"is false, so no prompt comes again, and {name} as configured takes over what was trained of a prompt before",
            field="prompts.reuse",
            fix="set it to true",
        )
