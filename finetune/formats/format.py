"""What a format is: a frozen dataclass whose fields are the options it takes, with its plan and its serving note.

A file of formats imports nothing heavy before `plan` is called: the command line lists them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from finetune.errors import Problem
from finetune.formats.option import Option, Package, option
from finetune.formats.serving_note import Use, positions, shell
from finetune.io.dtypes import SAFETENSORS_DTYPES, StorageDtype

if TYPE_CHECKING:
    from contextlib import ExitStack

    from finetune.config.rope import RopeScaling
    from finetune.formats.factors import Factors
    from finetune.io.stream import OutputFile
    from finetune.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Planned:
    """What a format writes.

    files: the large ones. side: the small ones by name, an index last. facts: for the report.
    """

    files: tuple[OutputFile, ...]
    side: dict[str, bytes | Path]
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A way to write an adapter or a model.

    name: as `--to` has it.  about: what it is, and for which program.  resumes: whether a killed export is continued.
    package: what it needs beside the product.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    resumes: ClassVar[bool] = True
    package: ClassVar[Package | None] = None

    thinking: bool | None = option(
        None, "whether it was trained to reason before it answers, where no run wrote it down"
    )

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What it can be told, by name."""
        types = get_type_hints(cls)
        return {
            each.name: Option(each.name, types[each.name], each.default, each.metadata["help"], each.metadata["least"])
            for each in fields(cls)
        }

    def problems(self) -> list[Problem]:
        """Options whose values are of no use, and a package that is not installed."""
        found = [each.problem(getattr(self, name)) for name, each in self.options().items()]
        if self.package is not None and not self.package.is_installed:
            what = f"needs the {self.package.name} package, which is not installed"
            found.append(Problem(f"--to {self.name}", what, self.package.remedy))
        return [problem for problem in found if problem is not None]

    @property
    def stored(self) -> str:
        """How weights are stored, in a word."""
        return self.name

    def about_use(self, use: Use) -> str:
        """How to ask for what the model was trained to do, in Markdown."""
        per_request = f'`"chat_template_kwargs": {use.switch}`'
        return use.told(f"send {per_request} with every request, or set it as above")


@dataclass(frozen=True)
class ExportedAdapter:
    """What the note beside an adapter tells. base: its name. base_path: where it is here. rank: of the factors."""

    output: Path
    base: str
    base_path: Path
    rank: int
    rope_scaling: RopeScaling | None


@dataclass(frozen=True, kw_only=True)
class AdapterFormat(Format):
    """A layout of adapters. usual_dtype: of the factors, when nobody says.  tell_stops: how to, see `Use.stopping`."""

    usual_dtype: ClassVar[StorageDtype] = "fp32"
    tell_stops: ClassVar[str] = 'send `"stop_token_ids": {ids}` with every request'

    dtype: StorageDtype | None = option(None, "bf16, fp16 or fp32")

    @abstractmethod
    def plan(self, factors: Factors) -> Planned:
        """Raises AdapterError for what cannot be said in the format. facts: the rank among them."""

    @abstractmethod
    def start(self, adapter: ExportedAdapter, use: Use) -> str:
        """Markdown on how to start the program with it."""

    @property
    def stored(self) -> str:
        """The dtype."""
        return self.dtype or self.usual_dtype

    @property
    def storage(self) -> str:
        """The dtype as safetensors and ggml call it."""
        return SAFETENSORS_DTYPES[self.dtype or self.usual_dtype]

    def note(self, adapter: ExportedAdapter, use: Use) -> str:
        """The note beside it, Markdown."""
        title = f"# {adapter.output.name}: adapter for {adapter.base}, as {self.name} reads it"
        told = f"{self.about_use(use)}{use.stopping(self.tell_stops)}"
        return f"{title}\n\n{self.start(adapter, use)}{positions(adapter.rope_scaling)}\n{told}"


@dataclass(frozen=True)
class ModelSource:
    """A model to write in another form.

    linears: (out, in) of the weights that config.json calls for as linear layers.  held: removes at the end what
    planning put beside the output.
    """

    checkpoint: Checkpoint
    linears: dict[str, tuple[int, int]]
    output: Path
    held: ExitStack


@dataclass(frozen=True, kw_only=True)
class ModelFormat(Format):
    """A form of whole models. title, remarks: for the note beside it."""

    title: ClassVar[str] = ""
    remarks: ClassVar[str] = ""

    @abstractmethod
    def plan(self, model: ModelSource) -> Planned:
        """Raises ModelError or UserError for what does not fit."""

    def start(self, output: Path, use: Use) -> str:
        """Markdown on how to start a program with it."""
        return shell(f"vllm serve {output}{use.vllm}")

    def note(self, output: Path, use: Use) -> str:
        """The note beside it, Markdown."""
        title = f"# {output.name}: {self.title or self.name}"
        return f"{title}\n\n{self.start(output, use)}\n{self.remarks}{self.about_use(use)}"


@dataclass(frozen=True, kw_only=True)
class Sharded(Format):
    """A format of several files."""

    shard_gb: float = option(4.0, "size of a file at most, in 10^9 bytes", least=1e-6)

    @property
    def max_shard_bytes(self) -> int:
        """Bytes of a file at most."""
        return round(self.shard_gb * 1e9)
