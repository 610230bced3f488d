"""Parquet files, as a hub hands out its sets: written once as Arrow files, of which any record is read at once.

A parquet file is read by groups of rows, so that one record costs a group of up to hundreds of megabytes. The copy is
in the cache of this machine (`data.cache`), as large as the set is unpacked.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from data import arrow
from data.cache import made_from
from data.names import printable
from data.source import Source
from data.split import select
from data.stored import files_by_split, find_path, options_of

SAID_FROM = 64 * 2**20  # bytes, of which a copy takes a moment


def open_parquet(argument: str, split: str, directory: str | None = None) -> Source:
    """`parquet:PATH`: a parquet file, or a folder of them whose names or folders say the split.

    `parquet:PATH,image=COLUMN,label=COLUMN` says which columns are the image and the label.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: a file is damaged, or there is no such split or column.
        OSError: no room for the copy.
    """
    path, renamed = options_of("parquet", argument, ("image", "label", "mask"))
    place = find_path("parquet", path, directory)
    name = f"parquet:{printable(str(place))}"
    files = files_by_split("parquet", place, ".parquet")
    rows = {key: arrow.Rows([_as_arrow(file) for file in some], names=some) for key, some in files.items()}
    fields = arrow.fields_of(rows, renamed, name)
    sizes = {key: len(one) for key, one in rows.items()}
    return select(split, sizes, lambda key: arrow.ArrowRecords(rows[key], fields, name, key, sizes))


def _as_arrow(file: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(place: Path) -> None:
        with pq.ParquetFile(file) as parquet:
            size = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            if shutil.disk_usage(place.parent).free < size:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size} bytes for {file}", str(place.parent))
            if size > SAID_FROM:
                said = f"{printable(str(file))}: writing {size / 2**20:.0f} MB to {place.parent}, once"
                print(said, file=sys.stderr, flush=True)
            with pa.OSFile(str(place), "wb") as out, pa.ipc.new_stream(out, parquet.schema_arrow) as stream:
                for batch in parquet.iter_batches(batch_size=1000):
                    stream.write_batch(batch.replace_schema_metadata(parquet.schema_arrow.metadata))

    try:
        return made_from(file, "parquet", ".arrow", write)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{printable(str(file))} is damaged, or no parquet file: {reason}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{printable(str(file))} is damaged: {reason}") from error
