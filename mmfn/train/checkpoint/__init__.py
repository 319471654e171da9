"""Training checkpoints: the state of a run in slices, written by all ranks and read again on any mesh.

    state/
      iter_0000100/                       a whole checkpoint: it has this name only when all of it is durable
        manifest.msgpack                  what the run needs to go on, how leaves were cut (`format`)
        rank_00000.safetensors            the slices that rank 0 wrote, and the digests of their blocks (`write`)
        ...
      latest_checkpointed_iteration.txt   "100", for people and scripts; what counts are the folders (`read`)
      .iter_0000200.writing-5f1c...       a save under way, or one that was killed

Nothing is ever unpickled. A run saves through a `Saver`, in a thread beside its steps, and begins with `newest` and
`fill_`.
"""

from mmfn.train.checkpoint.format import Facts, Manifest
from mmfn.train.checkpoint.read import Checkpoint, DamagedError, Search, fill_, newest, open_checkpoint, verify
from mmfn.train.checkpoint.retention import Retention, remove_old
from mmfn.train.checkpoint.saver import Saver
from mmfn.train.checkpoint.write import save

__all__ = [
    "Checkpoint",
    "DamagedError",
    "Facts",
    "Manifest",
    "Retention",
    "Saver",
    "Search",
    "fill_",
    "newest",
    "open_checkpoint",
    "remove_old",
    "save",
    "verify",
]
