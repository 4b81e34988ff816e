"""How the engine fails towards the HTTP process.

EngineError
├── EngineUnavailable     it is starting or restarting: nothing was submitted
├── EngineStartFailed     it ended before it was ready for the first time
├── EngineDied            it died while this sequence ran
├── QueueFull             its bounded queue is full: nothing was submitted
└── EngineMisconfigured   what it was started with cannot be served
"""


class EngineError(Exception):
    """The engine did not do what it was asked. The message says why, in words for the client."""


class EngineUnavailable(EngineError):
    """The engine is starting or restarting; nothing was submitted."""


class EngineStartFailed(EngineError):
    """The engine process ended before it was ready for the first time."""


class EngineDied(EngineError):
    """The engine process ended while this sequence ran."""


class QueueFull(EngineError):
    """The engine's bounded queue is full; nothing was submitted."""


class EngineMisconfigured(EngineError):
    """What the engine was started with cannot be served; raised in its process while it starts."""
