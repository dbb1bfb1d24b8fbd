from __future__ import annotations

import torch

from rayllm.transfer.download import Download


def test_results_are_read_in_their_shapes_and_types() -> None:
    download = Download(torch.device("cpu"))
    ids, values = torch.tensor([3, 4]), torch.tensor([[0.5], [1.5]])
    read = [download.add(ids), download.add(values)]
    download.start()
    assert read[0].array.tolist() == [3, 4]
    assert read[1].array.tolist() == [[0.5], [1.5]]
