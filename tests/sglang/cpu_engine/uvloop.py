"""Stand-in: SGLang wants this event loop, and asyncio's does for a test."""

from asyncio import DefaultEventLoopPolicy as EventLoopPolicy
from asyncio import new_event_loop

__all__ = ["EventLoopPolicy", "new_event_loop"]
