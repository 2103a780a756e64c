"""What torchrun starts: MODEL OUTPUT OVERRIDE..., a run of tests.training.runs in each process."""

import sys
from pathlib import Path

from finetune.training import compiled
from finetune.training.processes import end_process_group
from tests.training.runs import run_of

if __name__ == "__main__":
    compiled.BACKEND = "aot_eager"  # what is asked is whether layers compile under DDP, not inductor's code
    run_of(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    end_process_group()
