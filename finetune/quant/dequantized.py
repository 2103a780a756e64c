"""The weights that a run on a packed model computed with, made again from the checkpoint it was packed from."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config.packed_folder import CODES
from finetune.config.schema import QuantizeSection
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from finetune.quant import nf4
from finetune.quant.weight_plan import pack_matrix, packed_sources

_THREAD = threading.local()


@dataclass(frozen=True, kw_only=True)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint that reads each weight as its packed form decodes; what was not packed reads as it is stored.

    stored: the checkpoint itself.  section: how a run packed it; decoded to bfloat16 where that does not say.
    """

    stored: Checkpoint
    section: QuantizeSection

    @classmethod
    def of(cls, checkpoint: Checkpoint, section: QuantizeSection) -> DequantizedCheckpoint:
        """`checkpoint` as a run with this section computed with it."""
        stored = checkpoint.stored if isinstance(checkpoint, DequantizedCheckpoint) else checkpoint
        return cls(**vars(stored), stored=stored, section=section)

    def packs(self, name: str) -> bool:
        """Whether a weight differs from what is stored. FP8 blocks that a run kept do not."""
        kept = self.section.scheme == "fp8" and self.fp8_block == (self.section.block_size,) * 2
        return not (kept and self.scales_of(name)) and bool(packed_sources(name, self.section))

    def read(self, name: str, rows: slice | None = None, *, scratch: Tensor | None = None) -> Tensor:
        """As `Checkpoint.read`; float32 for a packed weight."""
        return self.read_float(name, rows) if self.packs(name) else super().read(name, rows, scratch=scratch)

    def read_float(self, name: str, rows: slice | None = None) -> Tensor:
        """As `Checkpoint.read_float`."""
        if not self.packs(name):
            return super().read_float(name, rows)
        return self._decoded(name)[rows or slice(None)].clone()

    def _decoded(self, name: str) -> Tensor:
        """The weight (out, in); this thread keeps the last ones, because pieces of one are asked for in a row."""
        sources = packed_sources(name, self.section)
        held: tuple[Checkpoint, dict[str, Tensor]] | None = getattr(_THREAD, "held", None)
        if held is None or held[0] is not self or name not in held[1]:
            held = _THREAD.held = self, dict(zip(sources, self._decode(sources), strict=True))
        return held[1][name]

    def _decode(self, sources: tuple[str, ...]) -> list[Tensor]:
        """Weights that were packed together, each (out, in)."""
        shapes = [self.tensors[source].shape for source in sources]
        dtype, block = getattr(torch, self.section.compute_dtype or "bfloat16"), self.section.block_size
        fields = pack_matrix(self.stored, sources, self.section)
        if self.section.scheme == "nf4":
            shape = (sum(height for height, _ in shapes), shapes[0][1])
            doubles = fields.get("scale_scales"), fields.get("offset")
            packed = nf4.Packed(fields[CODES], fields["scales"], *doubles, shape, block)
            return list(nf4.decode(packed, dtype).float().split([height for height, _ in shapes]))
        values = fields[CODES].view(torch.float8_e4m3fn).split([height * width for height, width in shapes])
        grids = [fp8.scales_shape(shape, (block, block)) for shape in shapes]
        scales = fields["scales"].split([height * width for height, width in grids])
        return [
            fp8.dequantize(value.view(shape), scale.view(grid), (block, block)).to(dtype).float()
            for value, scale, shape, grid in zip(values, scales, shapes, grids, strict=True)
        ]
