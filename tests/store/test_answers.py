"""A table is read back as it was written, whatever its texts hold."""

import io

import pandas as pd
import pytest

from dfkt.errors import ConfigError
from dfkt.store.answers import ENDINGS, table_bytes

FRAME = pd.DataFrame({"path": ['a, "b".png', "ü\nx.png"], "class": ["1", "cat"], "probability": [0.1, 1 / 3]})


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_is_read_back_as_it_was_written(ending: str) -> None:
    stream = io.BytesIO(table_bytes(FRAME, ending))
    found = pd.read_parquet(stream) if ending == ".parquet" else pd.read_csv(stream, dtype={"class": str})
    pd.testing.assert_frame_equal(found, FRAME, check_dtype=False)
    assert found["probability"].tolist() == FRAME["probability"].tolist()


def test_other_kinds_of_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="ending"):
        table_bytes(FRAME, ".xlsx")
