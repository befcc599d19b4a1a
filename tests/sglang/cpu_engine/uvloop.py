"""Stand-in: SGLang's engine wants this event loop, and asyncio's does for a test."""

from asyncio import DefaultEventLoopPolicy as EventLoopPolicy

__all__ = ["EventLoopPolicy"]
