"""Whether the weights of a hub checkpoint are those that its config.json calls for, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.architecture.names import in_layer, is_matrix
from finetune.architecture.shape import ModelShape
from finetune.errors import ModelError, Problem, first_of
from finetune.models.tensor_file import TensorInfo

_HINT = "config.json and weights do not belong together: download or copy the checkpoint again, all of it"
_MOST_PROBLEMS = 8


def check_shapes(shape: ModelShape, tensors: Mapping[str, TensorInfo], path: str) -> None:
    """Raises ModelError unless every matrix in attention, MLPs and experts, and the embedding, has its shape."""
    found = [name for name in tensors if in_layer(name) and is_matrix(name.removesuffix(".weight"))]
    if len(found) != shape.num_linears:
        what = f"config.json calls for {shape.num_linears:,} matrices in attention, MLPs and experts"
        raise ModelError(Problem(path, what, _HINT, len(found)))
    wanted = shape.linears() | {f"{shape.text_module}.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    problems = [
        Problem(f"{path}: {name}", f"is not {list(size)}, as config.json calls for", _HINT, held and list(held.shape))
        for name, size in wanted.items()
        if (held := tensors.get(name)) is None or held.shape != size
    ]
    if problems:
        raise ModelError(*first_of(problems, _MOST_PROBLEMS, path))
