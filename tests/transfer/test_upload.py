from __future__ import annotations

import numpy as np
import torch

from rayllm.transfer.upload import Upload


def test_arrays_come_with_their_shapes_and_types_and_without_a_copy_on_a_cpu() -> None:
    upload = Upload(torch.device("cpu"))
    ids, numbers = np.arange(6, dtype=np.int32).reshape(2, 3), np.array([0.5, 2.0])
    sent = [upload.add(ids), upload.add(numbers), upload.add(np.empty((0, 4), np.uint8))]
    upload.send()
    tensors = [each.tensor for each in sent]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors] == [
        (torch.int32, (2, 3)),
        (torch.float64, (2,)),
        (torch.uint8, (0, 4)),
    ]
    assert tensors[0].tolist() == ids.tolist()
    assert tensors[0].data_ptr() == ids.ctypes.data
    assert [each.offset for each in sent] == [0, 32, 48], "aligned to 16 bytes"
