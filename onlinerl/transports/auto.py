"""Whichever transport goes best with where learner and engine are."""

from __future__ import annotations

from onlinerl import registry
from onlinerl.errors import ConfigError
from onlinerl.protocols.transport import Layout, TransportConfig
from onlinerl.transports._stream import Stream


class Auto(Stream):
    """ipc where learner and replica share a GPU, nccl between GPUs, gloo on CPUs; disk for an engine that only loads files."""

    backend: str = "auto"

    def check(self, layout: Layout) -> None:
        """One of them must go with it."""
        self.resolve(layout)

    def resolve(self, layout: Layout) -> TransportConfig:
        """The one with the lowest precedence of those that go with the layout, with the keys that are set here."""
        candidates: list[type[TransportConfig]] = [
            registry.load("transports", name, TransportConfig) for name in registry.names("transports")
        ]
        for cls in sorted((c for c in candidates if c.precedence is not None), key=lambda c: c.precedence or 0):
            keys = {key: value for key, value in self if key != self.chosen_by}
            chosen = cls(**{key: value for key, value in keys.items() if key in cls.model_fields})
            try:
                chosen.check(layout)
            except ConfigError:
                continue
            for key, value in keys.items():
                if key not in cls.model_fields and value != type(self).model_fields[key].default:
                    raise ConfigError(
                        f"is {value}, and {chosen.backend}, which is chosen here, would not read it",
                        field=f"sync.{key}",
                        fix="leave it out",
                    )
            return chosen
        raise ConfigError(
            "none of the transports goes with this layout", field="sync.backend", fix="name one, to see why it does not"
        )
