"""replace_outputs on a GPU: one launch, as ``dense`` but for where the columns go.

How many rows of a weight an adapter replaces is known on the device alone. So a fixed number of
programs share the tiles of a segment and target, whatever there are; W is read from memory once for
each segment, and y only written.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..gpu.corrections import Correction, Site
from ..gpu.launch import Launch
from ..gpu.tuning import Key
from .gpu_kernels import output_rows_kernel
from .op import Cell


class Config(NamedTuple):
    """How the launch is cut into tiles.

    Attributes:
        rows: Of a tile; 1 means vector units, else at least 16.
        block_out: Replaced columns of a tile.
        block_in: Inputs at once.
        programs: At most so many share the tiles of a segment and target.
    """

    rows: int
    block_out: int
    block_in: int
    programs: int


CONFIGS = (
    Config(1, 8, 512, 16),
    Config(1, 16, 256, 32),
    Config(16, 16, 128, 16),
    Config(16, 32, 128, 32),
    Config(64, 64, 64, 32),
)


def choose_config(key: Key) -> int:
    """The index of a configuration that is good everywhere, until a device was measured."""
    if key.rows == 1:
        return 0
    return 2 if key.rows <= 16 else 4


def launches(site: Site, config: int) -> Sequence[Launch]:
    """One."""
    chosen = CONFIGS[config]
    programs = min(chosen.programs, site.num_programs(chosen.rows, chosen.block_out))
    starts = {name: at for name, at in site.columns.items() if name.startswith("out_start")}
    return (
        Launch(
            output_rows_kernel,
            (site.num_segments, site.num_targets, programs),
            {
                "y": site.y,
                "x": site.x,
                "indices": site.indices,
                **site.segments,
                **starts,
                **site.strides,
                "in_size": site.x.shape[1],
            },
            {
                "FIELDS": len(Cell._fields),
                "BLOCK_ROWS": chosen.rows,
                "BLOCK_OUT": chosen.block_out,
                "BLOCK_IN": chosen.block_in,
            },
            matrix=chosen.rows > 1,
        ),
    )


REPLACE_OUTPUTS = Correction("replace_outputs", launches, choose_config, len(CONFIGS))
