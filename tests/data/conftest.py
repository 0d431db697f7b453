"""Small `.bin/.idx` pairs."""

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter


@pytest.fixture
def write_pair(tmp_path):
    """Write documents as `<tmp_path>/<name>`; returns the prefix."""

    def write(documents, name="text", dtype=np.int32, tokenizer=None, side_file=True):
        prefix = tmp_path / name
        with IndexedDatasetWriter(prefix, dtype, tokenizer=tokenizer) as writer:
            for document in documents:
                writer.add_document(document)
        if not side_file:
            (tmp_path / f"{name}.meta.json").unlink()
        return str(prefix)

    return write
