"""The guard: prompts and grammar, published formats, rewards, the maths of its training."""

from hysafe.guard import advantages, formats, rewards
from hysafe.guard.protocol import (
    Answer,
    AnswerGrammar,
    Context,
    Entry,
    Episode,
    ParseError,
    PromptPolicy,
    Renaming,
    TokenConstraint,
    episode,
    parse_answer,
    render_prompt,
    split_bank,
    twins,
    write_answer,
)

__all__ = [
    "Answer",
    "AnswerGrammar",
    "Context",
    "Entry",
    "Episode",
    "ParseError",
    "PromptPolicy",
    "Renaming",
    "TokenConstraint",
    "advantages",
    "episode",
    "formats",
    "parse_answer",
    "render_prompt",
    "rewards",
    "split_bank",
    "twins",
    "write_answer",
]
