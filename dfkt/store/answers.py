"""A table for other programs, as one file: Parquet or CSV by its ending."""

from __future__ import annotations

import io

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from dfkt.config import check_choice

ENDINGS = (".parquet", ".csv")


def table_bytes(frame: pd.DataFrame, ending: str) -> bytes:
    """Return a table as the bytes of a file.

    Args:
        frame: Its columns; the index is left out.
        ending: One of :data:`ENDINGS`.

    Raises:
        ConfigError: If it is another.

    Example:
        >>> table_bytes(pd.DataFrame({"path": ["a.png"], "probability": [0.5]}), ".csv")
        b'"path","probability"\\n"a.png",0.5\\n'
    """
    check_choice("ending", ending, ENDINGS)
    table, stream = pa.Table.from_pandas(frame, preserve_index=False), io.BytesIO()
    (pq.write_table if ending == ".parquet" else csv.write_csv)(table, stream)
    return stream.getvalue()
