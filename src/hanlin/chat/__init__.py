"""How families write conversations: one format a file, found by `chat_format_for`."""

from hanlin.chat.registry import chat_format_for, list_formats

__all__ = ["chat_format_for", "list_formats"]
