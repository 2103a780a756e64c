"""A data template to start one's own from, as YAML with comments."""

from __future__ import annotations

from finetune.config.package_files import template_file, template_names
from finetune.errors import Problem, UserError

HEAD = """# {name}: a data template. Save it as {name}.yaml and name it in the recipe: data.template: {name}.yaml
# Try it: finetune prepare RECIPE --show 3
"""
MESSAGES = """kind: messages              # a row holds a list of chat messages
messages: messages          # column with the list; it may be JSON text
role: role                  # key of a message with its role
content: content            # key of a message with its text
reasoning: [reasoning_content, reasoning, thinking]  # keys that may hold the reasoning; the first that is not blank
tool_calls: tool_calls      # key with the tools that an answer calls
weight: weight              # key that is 0 where an answer carries no loss; remove the line if there is none
system: system              # column with a system prompt
tools: tools                # column with the tools on offer
roles:                      # role names in the rows -> system, user, assistant, tool, tool_call; usual ones are known
  user: user
  assistant: assistant
control_tokens: refuse      # texts that hold <|im_start|> and the like are errors; allow lets them steer the model
example:                    # a row that fits
  messages:
    - {role: user, content: "What is 17 + 25?"}
    - {role: assistant, content: "42"}
"""
TURNS = """kind: turns                 # a chat is made from columns of the row
required: [question, answer]  # columns a row must have, with a text in each
optional: [context]         # columns that are empty when a row lacks them
turns:                      # the chat in its order; the last turn is the assistant's and carries the loss
  - role: system
    when: context           # the turn is left out where this column is blank
    content: "{{ context }}"
  - role: user
    content: "{{ question }}"  # Jinja over the columns named above, in a sandbox
  - role: assistant
    content: "{{ answer }}"
    # reasoning: "{{ thoughts }}"  # what goes into the think block; name the column in `optional`
control_tokens: refuse      # texts that hold <|im_start|> and the like are errors; allow lets them steer the model
example:                    # a row that fits
  question: What is 17 + 25?
  answer: "42"
"""
COMPLETION = """kind: completion            # a prompt without loss and a text with it, with no chat around them
required: [prompt, completion]  # columns a row must have; the first is the prompt's
optional: []                # columns that are empty when a row lacks them
prompt: "{{ prompt }}"      # Jinja over the columns named above, in a sandbox
completion: "{{ completion }}"
control_tokens: refuse      # texts that hold <|im_start|> and the like are errors; allow lets them steer the model
example:                    # a row that fits
  prompt: "17 + 25 = "
  completion: "42"
"""
TEXT = """kind: text                  # plain text, all of which carries loss
required: [text]            # columns a row must have
optional: []                # columns that are empty when a row lacks them
text: "{{ text }}"          # Jinja over the columns named above, in a sandbox
control_tokens: refuse      # texts that hold <|im_start|> and the like are errors; allow lets them steer the model
example:                    # a row that fits
  text: Seventeen and twenty-five make forty-two.
"""
STARTS = {"messages": MESSAGES, "turns": TURNS, "completion": COMPLETION, "text": TEXT}
FEEDBACK_STARTS = ("preference", "labeled", "prompt")
"""Kinds whose own templates are short, and have comments already."""


def new_template(name: str, kind: str | None = None) -> str:
    """The YAML of a template called `name`: of one that comes with the package its own file, where no kind is given.

    kind: messages, turns, completion, text, preference, labeled or prompt; turns when None.
    """
    name = name.removesuffix(".yaml").removesuffix(".yml")
    if kind is None and name in template_names():
        return template_file(name).read_text(encoding="utf-8")
    if kind in FEEDBACK_STARTS:
        return HEAD.format(name=name) + template_file(kind).read_text(encoding="utf-8")
    if kind is not None and kind not in STARTS:
        known = ", ".join((*STARTS, *FEEDBACK_STARTS))
        raise UserError(Problem("--kind", f"is none of {known}", "name one of them", kind))
    return HEAD.format(name=name) + STARTS[kind or "turns"]
