"""What `finetune check` says about the rows of a recipe: a look at the head of each local file, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.config.model_files import CHAT_END, TokenFacts, read_token_facts
from finetune.config.objectives import ROW_KINDS, ROWS_IN_WORDS, RowKind, setting_for
from finetune.config.schema import DataFile, DataSection, Recipe
from finetune.config.sources import is_pattern, suffix_of
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.columns import template_of
from finetune.data.conversation import Conversation, Passage
from finetune.data.feedback.rows import read_feedback
from finetune.data.fit import other_kind
from finetune.data.messages import interpret
from finetune.data.rows import read_rows
from finetune.data.templates import DataTemplate, FeedbackTemplate, MessagesTemplate, TurnsTemplate
from finetune.data.unread import in_words, unread_columns, unread_problem
from finetune.errors import DataError, Problem

LARGE_LIST_BYTES = 2**25
ROWS = 1000
"""Rows of a file that are looked at; `prepare` reads them all."""


def look(recipe: Recipe) -> list[str]:
    """Notes on columns that nothing reads, and on where the model stops.

    Raises DataError for such columns where the recipe wants that, for a template that cannot be read, and for rows of
    another kind than the objective takes. Other bad rows are left to `prepare`, which reads every row.
    """
    facts = read_token_facts(recipe.model.path) if Path(recipe.model.path).is_dir() else None
    section = recipe.data
    notes: list[str] = []
    problems: list[Problem] = []
    chats = False
    for file in (*section.train, *section.eval):
        if file.skip:
            continue
        seen = _Seen(file, section, facts, ROW_KINDS[recipe.train.objective])
        chats |= seen.chats
        if seen.other is not None and not seen.good:
            what = f"holds {ROWS_IN_WORDS[seen.other]}, and train.objective is {recipe.train.objective}"
            problems.append(Problem(file.path, what, f"write {setting_for(seen.other)}"))
        if seen.unread and section.unread == "error":
            problems.append(unread_problem(file.path, seen.unread))
        elif seen.unread:
            head = f" of the first {ROWS:,} rows" if seen.rows == ROWS else ""
            notes.append(f"not read: {in_words(seen.unread)}{head} of {file.path}")
        notes += seen.remarks
    if problems:
        raise DataError(*problems)
    if chats and facts is not None and (note := end_note(facts, recipe.model.path)):
        notes.append(note)
    return notes


def end_note(facts: TokenFacts, model: str) -> str | None:
    """What to know where a chat ends with a token at which the model does not stop."""
    if facts.end is None or facts.end in facts.stops:
        return None
    stops = ", ".join(map(str, facts.stops)) or "none"
    return (
        f"training teaches {CHAT_END} ({facts.end}) as the end of an answer, which is not among the stop tokens of"
        f" {model} ({stops}): chat stops there, and generation_config.json of adapter and merged model will name it"
    )


def _is_large_list(path: str) -> bool:
    """Whether a file is one list of rows that takes long to read."""
    return suffix_of(path) == ".json" and Path(path).is_file() and Path(path).stat().st_size > LARGE_LIST_BYTES


class _Seen:
    """What the head of a file holds."""

    def __init__(self, file: DataFile, section: DataSection, facts: TokenFacts | None, kind: RowKind) -> None:
        template = template_of(file, section, kind)
        self.unread: dict[str, int] = {}
        self.good, self.other = 0, None
        self.remarks: list[str] = []
        self.rows, self.chats = 0, isinstance(template, (MessagesTemplate, TurnsTemplate))
        if not (Path(file.path).exists() or is_pattern(file.path)) or _is_large_list(file.path):
            return
        chat_template = facts.chat_template if facts is not None else None
        try:
            head = file.model_copy(update={"limit": min(file.limit or ROWS, ROWS)})
            for row in read_rows(head, BadRows(), self.remarks.append):
                self.rows += 1
                try:
                    found = _interpreted(row.fields, template)
                except BadRow:
                    self.other = self.other or other_kind(row.fields, kind)
                    continue
                self.good += 1
                self.chats |= isinstance(found, Conversation)
                if kind == "prompt":
                    continue  # every column is kept
                for name in unread_columns(row.fields, found, template, chat_template):
                    self.unread[name] = self.unread.get(name, 0) + 1
        except DataError:
            return


def _interpreted(fields: dict[str, Any], template: DataTemplate) -> Conversation | Passage:
    """What a row holds; of one with feedback, a chat of it."""
    if not isinstance(template, FeedbackTemplate):
        return interpret(fields, template)
    found = read_feedback(fields, template)
    chats = [each for each in (*found.completions, found.prompt) if isinstance(each, Conversation)]
    return chats[0] if chats else Passage("", "")
