"""Data templates: YAML files that say which fields of a row are read and what they become.

For supervised rows, `messages`: the row holds a list of chat messages; `turns`: a chat is made from fields of the row;
`completion`: a prompt and what follows it; `text`: plain text. For other objectives, `preference`: two completions,
the better one named; `labeled`: a completion that is good or bad; `prompt`: a prompt alone. Those that come with the
package are known by name; any other is named by its path.
"""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, model_validator
from typing_extensions import Self

from finetune.config.objectives import RowKind
from finetune.config.package_files import template_file, template_names
from finetune.config.schema import RowRole
from finetune.diagnostics.advice import did_you_mean
from finetune.diagnostics.document import read_document
from finetune.diagnostics.findings import Finding, Places
from finetune.diagnostics.section import Section
from finetune.diagnostics.values import Name
from finetune.errors import DataError, Problem
from finetune.models.template_budget import check_template, template_budget

JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)

KINDS = ("messages", "turns", "completion", "text", "preference", "labeled", "prompt")
HINT = "compare with what `finetune template new chat` prints"


def undeclared(text: str, where: str) -> set[str]:
    """Names that a Jinja string reads. Raises TemplateError or SyntaxError, and DataError for one without bounds."""
    check_template(text, where)
    with template_budget(where):
        JINJA.from_string(text)
        return meta.find_undeclared_variables(JINJA.parse(text))


Names = tuple[Name, ...]
Strings = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that the reasoning before an answer goes by."""
ROLES: dict[str, RowRole] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "tool_result"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), "tool_call"),
}
"""Roles by the names they usually have, whatever their case."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
COMPANIONS = ("system", "tools", "functions", "history", "documents", "chat_template_kwargs", "enable_thinking")
"""Columns that are read beside a chat, whether or not its template names them."""


class Template(Section):
    """What all kinds share."""

    example: Strings = Field(description="a row that fits")
    control_tokens: Literal["refuse", "allow"] = Field(
        "refuse", description="whether texts may hold tokens that steer the model, such as <|im_start|>"
    )
    _name: str = PrivateAttr("")
    _columns: dict[str, str] = PrivateAttr(default_factory=dict)

    def renamed(self, columns: dict[str, str], changed: Strings) -> Self:
        """The same template with other columns, and other values of its own fields."""
        made = self.model_copy(update=changed)
        for cached in ("companions", "columns"):
            made.__dict__.pop(cached, None)
        made._name, made._columns = self._name, dict(columns)
        return made

    @property
    def rows(self) -> RowKind:
        """The kind of row it reads."""
        return "supervised"

    @property
    def name(self) -> str:
        """How recipes name it."""
        return self._name

    @property
    def renamed_columns(self) -> dict[str, str]:
        """Fields whose columns have other names."""
        return dict(self._columns)

    def column(self, name: str) -> str:
        """The column of a row that a field of the template is read from."""
        return self._columns.get(name, name)

    def companion(self, name: str) -> str | None:
        """The column of something that may stand beside the chat; None where the template itself reads it."""
        return None if name in (*self.needs, *self.knows) else self.column(name)

    @cached_property
    def companions(self) -> dict[str, str]:
        """What may stand beside the chat -> its column."""
        return {name: column for name in COMPANIONS if (column := self.companion(name))}

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that the template itself reads."""
        return frozenset(self.column(name) for name in (*self.needs, *self.knows))

    @property
    def needs(self) -> Names:
        """Fields a row must have."""
        raise NotImplementedError

    @property
    def knows(self) -> Names:
        """Fields that are read when a row has them."""
        return ()


class MessagesTemplate(Template):
    """A row that holds a list of chat messages."""

    kind: Literal["messages"]
    messages: Name = Field(description="field with the list of messages")
    role: Name = Field(description="key of a message with its role")
    content: Name = Field(description="key of a message with its text")
    roles: dict[str, RowRole] = Field(min_length=1, description="role names in the rows -> roles of a chat")
    reasoning: Names = Field((), description="keys that may hold the reasoning before an answer; the first one found")
    tool_calls: Name | None = Field(None, description="key with the tools an answer calls")
    weight: Name | None = Field(None, description="key that is 0 where an answer carries no loss")
    system: Name | None = Field(None, description="field with the system prompt")
    tools: Name | None = Field(None, description="field with the tools on offer, as JSON schemas")

    @property
    def needs(self) -> Names:
        """The list of messages."""
        return (self.messages,)

    def column(self, name: str) -> str:
        """A name that the template says itself is the column."""
        return name if name in self.needs else super().column(name)

    def companion(self, name: str) -> str | None:
        """As the template says, or by its usual name."""
        named = {"system": self.system, "tools": self.tools}.get(name)
        return named or super().companion(name)

    def role_of(self, named: str) -> str | None:
        """The role of a chat that a name in the rows stands for."""
        return self.roles.get(named) or ROLES.get(named.strip().lower())

    def role_key(self, raw: Strings) -> str:
        """The key of a message that holds its role: the template's, or a usual one."""
        return self.role if self.role in raw else next((key for key in ROLE_KEYS if key in raw), self.role)

    def content_key(self, raw: Strings) -> str:
        """The key of a message that holds its text."""
        return self.content if self.content in raw else next((key for key in CONTENT_KEYS if key in raw), self.content)

    def message_keys(self, raw: Strings) -> set[str]:
        """Keys of a message that are read here, and not left to the model's chat template."""
        named = {self.role_key(raw), self.content_key(raw), self.tool_calls, self.weight}
        return {name for name in (*named, *self.reasoning, *REASONING, "tool_calls", "function_call") if name}


class Turn(Section):
    """One turn of a chat that is made from fields."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(description="Jinja over the row's fields")
    reasoning: str | None = Field(None, description="Jinja over the row's fields; left out when it comes out empty")
    when: Name | None = Field(None, description="field without which the turn is left out")


class FieldsTemplate(Template):
    """A row whose text fields are put into Jinja strings."""

    required: Names = Field(min_length=1, description="fields a row must have")
    optional: Names = Field((), description="fields that are empty when a row lacks them")

    @property
    def needs(self) -> Names:
        """As the file says."""
        return self.required

    @property
    def knows(self) -> Names:
        """As the file says."""
        return self.optional

    def strings(self) -> dict[str, str]:
        """Every Jinja string, by its place in the file."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _strings_compile(self) -> FieldsTemplate:
        for place, text in self.strings().items():
            try:
                unknown = undeclared(text, place) - {*self.required, *self.optional}
            except (TemplateError, SyntaxError) as error:
                raise ValueError(f"{place} is not valid Jinja: {error}") from None
            except DataError as error:
                raise ValueError(f"{place} {error.problems[0].what}") from None
            if unknown:
                raise ValueError(f"{place} uses {', '.join(sorted(unknown))}, in neither `required` nor `optional`")
        return self


class TurnsTemplate(FieldsTemplate):
    """A chat made from fields."""

    kind: Literal["turns"]
    turns: tuple[Turn, ...] = Field(min_length=1, description="the chat, in its order")

    def strings(self) -> dict[str, str]:
        """Content and reasoning of each turn."""
        found = {f"turns[{i}].content": turn.content for i, turn in enumerate(self.turns)}
        return found | {f"turns[{i}].reasoning": turn.reasoning for i, turn in enumerate(self.turns) if turn.reasoning}

    @model_validator(mode="after")
    def _ends_with_an_answer(self) -> TurnsTemplate:
        if self.turns[-1].role != "assistant" or self.turns[-1].when:
            raise ValueError("turns: the last turn must be the assistant's, without `when`")
        if unknown := {turn.when for turn in self.turns if turn.when} - {*self.required, *self.optional}:
            raise ValueError(f"turns: `when` names {sorted(map(str, unknown))}, in neither `required` nor `optional`")
        return self


class CompletionTemplate(FieldsTemplate):
    """A prompt without loss and a completion with it."""

    kind: Literal["completion"]
    prompt: str = Field(description="Jinja over the row's fields")
    completion: str = Field(description="Jinja over the row's fields")

    def strings(self) -> dict[str, str]:
        """Prompt and completion."""
        return {"prompt": self.prompt, "completion": self.completion}


class TextTemplate(FieldsTemplate):
    """Plain text."""

    kind: Literal["text"]
    text: str = Field(description="Jinja over the row's fields")

    def strings(self) -> dict[str, str]:
        """The text."""
        return {"text": self.text}


class FeedbackTemplate(Template):
    """A prompt with completions, each a list of messages or a text."""

    prompt: Name = Field(description="field with the prompt")
    texts: Literal["plain", "chat"] = Field(
        "plain", description="what a prompt and completions that are texts become: text as it is, or turns of a chat"
    )
    _shape: MessagesTemplate | None = PrivateAttr(None)

    @property
    def shape(self) -> MessagesTemplate:
        """How messages look."""
        return self._shape or message_shape()

    def with_shape(self, shape: MessagesTemplate) -> Self:
        """The same template for messages that look like that."""
        made = self.renamed(self._columns, {})
        made._shape = shape
        return made

    @property
    def completions(self) -> Names:
        """Fields with completions."""
        raise NotImplementedError


class PreferenceTemplate(FeedbackTemplate):
    """Two completions of a prompt, the better one named; the prompt may be what both begin with."""

    kind: Literal["preference"]
    chosen: Name = Field(description="field with the better completion")
    rejected: Name = Field(description="field with the other completion")

    @property
    def rows(self) -> RowKind:
        """Preference rows."""
        return "preference"

    @property
    def needs(self) -> Names:
        """Both completions."""
        return self.completions

    @property
    def knows(self) -> Names:
        """The prompt, where it stands apart."""
        return (self.prompt,)

    @property
    def completions(self) -> Names:
        """The better one first."""
        return (self.chosen, self.rejected)


class LabeledTemplate(FeedbackTemplate):
    """A completion of a prompt that is good or bad."""

    kind: Literal["labeled"]
    completion: Name = Field(description="field with the completion")
    label: Name = Field(description="field that says whether it is good: true or false")

    @property
    def rows(self) -> RowKind:
        """Labeled rows."""
        return "labeled"

    @property
    def needs(self) -> Names:
        """The completion and its label."""
        return (self.completion, self.label)

    @property
    def knows(self) -> Names:
        """The prompt, where it stands apart."""
        return (self.prompt,)

    @property
    def completions(self) -> Names:
        """The one that is labeled."""
        return (self.completion,)


class PromptTemplate(FeedbackTemplate):
    """A prompt alone; every other column is kept for what judges the answers."""

    kind: Literal["prompt"]

    @property
    def rows(self) -> RowKind:
        """Prompts."""
        return "prompt"

    @property
    def needs(self) -> Names:
        """The prompt."""
        return (self.prompt,)

    @property
    def completions(self) -> Names:
        """None: the model writes them."""
        return ()


Feedbacks = PreferenceTemplate | LabeledTemplate | PromptTemplate
Supervised = MessagesTemplate | TurnsTemplate | CompletionTemplate | TextTemplate
DataTemplate = Supervised | Feedbacks
_ANY_TEMPLATE: TypeAdapter[DataTemplate] = TypeAdapter(Annotated[DataTemplate, Field(discriminator="kind")])


def load_template(name: str) -> DataTemplate:
    """The template of that name, or in the file at that path. DataError says what is wrong with it."""
    if name in template_names():
        return _named_template(name)
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        known = ", ".join(template_names())
        hint = did_you_mean(name, template_names()) or f"known are {known}; or give the path of a .yaml file"
        raise DataError(Problem("data.template", "is no data template", hint, name))
    if not path.is_file():
        known = ", ".join(template_names())
        raise DataError(Problem(name, "does not exist", f"check the path; known by name are {known}"))
    return parse_template(_read(path), name)


@cache
def _named_template(name: str) -> DataTemplate:
    path = template_file(name)
    return parse_template(_read(path), name)


def named_templates(rows: RowKind = "supervised") -> list[DataTemplate]:
    """The templates for rows of a kind that come with the package."""
    found = (_named_template(name) for name in template_names())
    return [template for template in found if template.rows == rows]


def message_shape() -> MessagesTemplate:
    """How messages look where a row does not say it: as those of the OpenAI API."""
    shape = _named_template("chat")
    assert isinstance(shape, MessagesTemplate)
    return shape


def parse_template(text: str, name: str) -> DataTemplate:
    """A template from its YAML; `name` names it in messages."""
    document = read_document(text)
    if isinstance(document, Finding):
        raise DataError(*Places(name, {}, {}).problems([document]))
    places = Places(name, document.key_lines, document.value_lines)
    findings = list(document.findings)
    template = None
    try:
        template = _ANY_TEMPLATE.validate_json(json.dumps(document.value))
    except ValidationError as error:
        findings += [_finding(detail) for detail in error.errors()]
    if template is None or findings:
        raise DataError(*places.problems(findings))
    template._name = name
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), f"cannot be read: {error}", "save it as UTF-8")) from None


def _finding(detail: Any) -> Finding:
    """What pydantic says about a key, without the kind that it puts before the path."""
    path = detail["loc"][1:] if detail["loc"][:1] and detail["loc"][0] in KINDS else detail["loc"]
    if detail["type"].startswith("union_tag"):
        return Finding(("kind",), f"must be one of {', '.join(KINDS)}", HINT)
    what = detail["msg"].removeprefix("Value error, ")
    return Finding(tuple(path), what[:1].lower() + what[1:], HINT)
