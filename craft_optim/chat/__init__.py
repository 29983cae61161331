"""Anchors for language models: chats, prompts and texts as tokens, with a mark on those that count."""

from craft_optim.chat.anchors import chat_anchors
from craft_optim.chat.models import load_language_model
from craft_optim.chat.questions import self_questions
from craft_optim.chat.records import read_records
from craft_optim.chat.rows import Row, answered, batch_of, prompted

__all__ = [
    "Row",
    "answered",
    "batch_of",
    "chat_anchors",
    "load_language_model",
    "prompted",
    "read_records",
    "self_questions",
]
