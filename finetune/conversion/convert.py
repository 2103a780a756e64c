"""A file of another tool as a recipe: every setting is mapped, dropped with a reason, or named as unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.config.load import parse_recipe
from finetune.config.other_tools import ABSENT, FIELDS
from finetune.config.recipe_document import RECIPE
from finetune.conversion.keys import DEFAULTS, LORA_ONLY, MODEL_KEYS, OF_TOOL, SILENT, WAYS
from finetune.conversion.model_names import Model, families
from finetune.conversion.notebook import LORA, Computed
from finetune.conversion.outcome import Conversion, Dropped, DroppedError, Mapped, RefusedError
from finetune.conversion.rows import KEYS, rows_of
from finetune.conversion.settings import Settings, read_settings
from finetune.conversion.targets import TARGETS, targets
from finetune.conversion.values import Fields, Other, Way, drops, sets
from finetune.conversion.written import written
from finetune.errors import Problem, RecipeError

OFF: tuple[Any, ...] = (None, False, "", "none", "no", [], {})
"""Values with which a setting asks for nothing."""
_FILES = "data.train", "data.eval"
_LEAST: dict[str, dict[str, Any]] = {"model": {"path": "x"}, "data": {"train": ["x"]}, "output": {"dir": "x"}}
_LINEAR = "linear attention would carry its state from row to row of a block: data.packing: false"


def convert(path: str | Path, model: str | None = None) -> Conversion:
    """What a file of another tool is as a recipe; nothing is written. Raises UserError for one that is of no tool.

    model: in place of the file's.
    """
    settings = read_settings(Path(path))
    if model is not None:
        key = next((key for key in MODEL_KEYS if key in settings.values), "model_name")
        settings.values[key] = model
    made = _Converter(settings)
    made.run()
    done = made.done
    if done.refused:
        return done
    done.recipe = written(settings, made.fields, made.from_key)
    try:
        parse_recipe(done.recipe, "recipe", check_files=True)
    except RecipeError as error:
        done.to_fix = list(error.problems)
    return done


class _Converter:
    """Fills fields from settings. from_key: where each comes from."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.tool, self.other = settings, settings.tool, settings.values
        self.done = Conversion(settings.tool, str(settings.path))
        self.fields: Fields = dict(DEFAULTS[settings.tool])
        self.from_key: dict[str, str] = {}
        homes = [tuple(map(str, path)) for path, _ in RECIPE.all_fields() if len(path) == 2]
        names = [name for _, name in homes]
        self.own_names = {name: f"{section}.{name}" for section, name in homes if names.count(name) == 1}

    def run(self) -> None:
        for key, reason in self.settings.unread.items():
            self._drop(key, None, reason)
        self._whole_weights()
        self._rows()
        for key, value in self.other.items():
            if key not in (*TARGETS, *KEYS, *SILENT) and value not in (None, "", [], {}):
                self._one(key, value)
        self._model()
        self._settle()

    def _one(self, key: str, value: Any) -> None:
        way = OF_TOOL[self.tool].get(key) or WAYS.get(key)
        if isinstance(value, Computed):
            self._drop(key, value, "is computed: write its value into the recipe")
        elif way is not None:
            self._apply(key, value, way)
        elif key in FIELDS:
            field = FIELDS[key].split(" ")[0].rstrip(",")
            self._apply(key, value, drops(f"see {FIELDS[key]}") if field in _FILES else sets(field))
        elif key in ABSENT and value not in OFF:
            self._drop(key, value, ABSENT[key])
        elif key in self.own_names:
            self._apply(key, value, sets(self.own_names[key]))
        elif value in OFF:
            self.done.same.append(key)
        else:
            self.done.unknown.append(key)

    def _apply(self, key: str, value: Any, way: Way) -> None:
        try:
            found = way(value, self.other)
            if not found:
                self.done.same.append(key)
            for field, ours in found.items():
                self._set(key, value, field, ours)
        except DroppedError as dropped:
            self._drop(key, value, str(dropped))
        except RefusedError as refused:
            self._refuse(key, *refused.args, got=value)

    def _set(self, key: str, value: Any, field: str, ours: Any) -> None:
        """Take a value if the field takes it."""
        section, _, name = field.partition(".")
        whole, kind = RECIPE.kind_at((section,)), RECIPE.kind_at((section, name))
        assert whole is not None
        assert whole.section is not None
        assert kind is not None
        if isinstance(ours, float) and ours.is_integer() and not kind.takes(float):
            ours = int(ours)
        elif type(ours) is int and kind.takes(float) and abs(ours) < 2**53:
            ours = float(ours)
        elif isinstance(ours, str) and kind.takes(float):
            ours = _number(ours)
        try:
            whole.section.model_validate({**_LEAST.get(section, {}), name: ours})
        except ValidationError as error:
            self._drop(key, value, f"{field} does not take it: {error.errors()[0]['msg'].lower()}")
            return
        self.fields[field] = ours
        self.from_key[field] = key
        self.done.mapped.append(Mapped(key, value, field, ours))

    def _drop(self, key: str, value: Any, reason: str) -> None:
        self.done.dropped.append(Dropped(key, value, reason))

    def _refuse(self, key: str, what: str, hint: str, **got: Any) -> None:
        self.done.refused.append(Problem(f"{self.settings.path}: {key}", what, hint, **got))

    def _whole_weights(self) -> None:
        """Files in which no LoRA is asked for; `use_peft: false` says it itself."""
        key, asked = {
            "Axolotl": ("adapter", bool(self.other.get("adapter"))),
            "LLaMA-Factory": ("peft_config", "model" not in self.other or "peft_config" in self.other),
            "TRL": ("use_peft", "use_peft" in self.other),
            "Unsloth": (LORA, LORA in self.other),
        }[self.tool]
        if not asked:
            self._refuse(key, "is missing: such a run trains all weights", LORA_ONLY)

    def _rows(self) -> None:
        try:
            rows = rows_of(self.settings, self._drop)
        except RefusedError as refused:
            self._refuse("data", *refused.args)
            return
        if not rows.train:
            hint = "name them in the file, or write the recipe with finetune init"
            self._refuse("data", "names no rows that can be found without running it", hint)
            return
        key = next((key for key in KEYS if self.other.get(key)), "data")
        for name, files in (("train", rows.train), ("eval", rows.eval)):
            if files:
                self.fields[f"data.{name}"] = files
                self.from_key[f"data.{name}"] = key
                self.done.mapped.append(
                    Mapped(key, self.other.get(key), f"data.{name}", [dict(file) for file in files])
                )
        if (limit := self.other.get("max_samples")) and any("limit" in file for file in rows.train):
            self.done.mapped.append(Mapped("max_samples", limit, "data.train[].limit", limit))
        if any(file.get("template") == "text" for file in rows.train):
            self.fields["data.over_long"] = "split"
        if not all("template" in file for file in rows.train):
            shape = "the file does not tell the shape of the rows: see data.template and finetune prepare"
            self.done.notes.append(shape)

    def _model(self) -> None:
        """Targets, by what the model has."""
        path = self.fields.get("model.path")
        if path is None:
            if not self.done.refused:
                self._refuse("model", "is missing", "name it in the file")
            return
        model, rank = Model.of(path), int(self.fields["adapter.rank"])
        if not model.is_known:
            self.done.notes.append(f"its name does not tell the family of {path}: supported are {families()}")
        given = [(key, self.other[key]) for key in TARGETS if self.other.get(key) not in OFF]
        if not given and self.tool in ("Unsloth", "LLaMA-Factory"):
            given = [("lora_target", "all")]
        for key, value in given:
            if isinstance(value, Computed):
                self._drop(key, value, "is computed: name projections in adapter")
                continue

            def way(named: Any, _: Other, key: str = key) -> Fields:
                return targets(key, named, model, rank)

            self._apply(key, value, way)
        if model.is_linear:
            if self.fields.get("data.packing") is True:
                self._take_back("data.packing", _LINEAR)
            self.fields["data.packing"] = False

    def _take_back(self, field: str, reason: str) -> None:
        """Drop a field that was mapped."""
        if field in self.from_key:
            self.done.mapped = [each for each in self.done.mapped if each.field != field]
            self._drop(self.from_key.pop(field), self.fields[field], reason)
        self.fields.pop(field, None)

    def _settle(self) -> None:
        """Fields that decide over others."""
        fields, kinds = self.fields, ("attention", "linear_attention", "shared_expert", "experts", "mlp")
        if any(f"adapter.{kind}" in fields for kind in kinds):
            fields.setdefault("adapter.attention", [])
        if "train.steps" in fields:
            fields.pop("train.epochs", None)
        if self.tool == "LLaMA-Factory":
            fields.setdefault("adapter.alpha", 2.0 * fields["adapter.rank"])
        if self.tool == "Unsloth" and self.other.get("load_in_4bit") is False:
            fields.pop("quantize.scheme", None)
        if "data.eval" in fields:
            fields.pop("data.eval_fraction", None)
        if not (fields.get("data.eval") or fields.get("data.eval_fraction")):
            self._take_back("train.eval_every", "there is nothing to evaluate on: data.eval, or data.eval_fraction")
        if "train.eval_every" not in fields:
            for name in ("train.keep_best", "train.patience"):
                self._take_back(name, "evaluation is at the end only: train.eval_every")
        elif "train.patience" in fields:
            fields.setdefault("train.keep_best", "loss")
        fields.setdefault("output.dir", "runs/converted")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
