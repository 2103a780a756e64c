"""Decoder layers compiled one by one: layers of one kind share their code, whatever the length of a block.

The casts of adapters to the type of the products lie inside the compiled layer. There they cost one read of 4 bytes and
one write of 2 per parameter and micro-step, which is small beside the layer's weights, and nothing has to be kept in
step with the optimizer; casts of an input to 32 bit and back fall away.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch._dynamo import exc
from torch._inductor.exc import InductorError

from finetune.models.live import decoder_layers, outside_experts
from finetune.models.text_model import text_config
from finetune.training.checkpointing import Mode, checkpoint_layers_, checkpoint_options, checkpointed

logger = logging.getLogger(__name__)

BACKEND = "inductor"
FAULTS = (exc.TorchDynamoException, InductorError)


class CompiledLayers:
    """Calls decoder layers by compiled code; by their own, with a warning, once one turned out not to compile."""

    def __init__(self, checkpointing: dict[str, Any] | None) -> None:
        self._options = checkpointing
        self._compiled = torch.compile(partial(_call, checkpointing), backend=BACKEND, dynamic=True, fullgraph=True)
        self.fault: str | None = None
        """Why layers run uncompiled; None while they do not."""

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """What `layer(*args, **kwargs)` returns."""
        if self.fault is None:
            try:
                return self._compiled(layer, *args, **kwargs)
            except FAULTS as error:
                self.fault = " ".join(str(error).split())[:300]
                logger.warning("decoder layers run uncompiled (train.compile: off asks for that): %s", self.fault)
        return _call(self._options, layer, *args, **kwargs)


def _call(options: dict[str, Any] | None, layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs) if options is None else checkpointed(layer, options, *args, **kwargs)


def _not_of_checkpointing(record: logging.LogRecord) -> bool:
    """Torch warns of in-place operators in layers that are checkpointed selectively: no kept output is written to."""
    return "context_fn is passed" not in record.getMessage()


def compile_layers_(base: Any, checkpointing: Mode, *, whole: bool = True) -> CompiledLayers:
    """Let the decoder layers of `base` run compiled, checkpointed in training as `checkpointing` says.

    whole: False leaves the experts and their router as they are, for hooks that hand out what happens there.

    Names of modules and parameters stay what they are. Inside `torch.compiler.set_stance("force_eager")` layers run
    uncompiled.
    """
    base.enable_input_require_grads()  # or the first layer, whose input is a constant, would need code of its own
    if whole:
        options = None if checkpointing == "off" else checkpoint_options(text_config(base), checkpointing)
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_of_checkpointing)
        compiled, modules = CompiledLayers(options), decoder_layers(base)
    else:
        logger.info("the router's losses read its logits, so attention and norms are compiled, experts and router not")
        checkpoint_layers_(base, checkpointing)
        compiled = CompiledLayers(None)
        modules = [part for layer in decoder_layers(base) for part in outside_experts(layer)]
    for module in modules:
        module._compiled_call_impl = partial(compiled, module)
    return compiled
