from __future__ import annotations

import pytest
from fakes import fake_config

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, NoRoomError
from rayllm.executor.placement import Node, _holders, create_placement_group, plan_placement, plan_rank


def _config(ranks: int, device: str = "cpu") -> ResolvedConfig:
    return fake_config(engine={"tensor_parallel_size": ranks, "name": "mine"}, device=device)


def _node(cpus: float, free_cpus: float | None = None, gpus: float = 0, free_gpus: float | None = None) -> Node:
    free = {"CPU": cpus if free_cpus is None else free_cpus, "GPU": gpus if free_gpus is None else free_gpus}
    return Node("node", {"CPU": cpus, "GPU": gpus}, free)


def test_a_roomy_machine_gives_every_process_a_cpu() -> None:
    placement = plan_placement(_config(2), [_node(8)])
    assert placement.bundles == [{"CPU": 1.0}] * 3
    assert placement.strategy == "STRICT_PACK"


def test_two_ranks_fit_a_two_core_machine_that_also_serves() -> None:
    placement = plan_placement(_config(2), [_node(2, free_cpus=1)])
    assert placement.bundles == [{"CPU": 0.01}] * 3


def test_a_rank_gets_a_whole_gpu() -> None:
    placement = plan_placement(_config(2, "cuda"), [_node(16, gpus=4)])
    assert placement.bundles == [{"CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}]


def test_an_engine_that_fits_no_single_node_is_packed_on_several() -> None:
    placement = plan_placement(_config(4, "cuda"), [_node(16, gpus=2), _node(16, gpus=2)])
    assert placement.strategy == "PACK"
    assert placement.bundles[1:] == [{"GPU": 1.0, "CPU": 1.0}] * 4


def test_one_node_with_room_is_enough_for_strict_packing() -> None:
    assert plan_placement(_config(2, "cuda"), [_node(4, gpus=1), _node(8, gpus=2)]).strategy == "STRICT_PACK"


@pytest.mark.parametrize(
    ("device", "node", "message"),
    [
        ("cpu", _node(2), r"tensor_parallel_size=3 requires 3 CPUs.*has 2: set tensor_parallel_size to 2 or"),
        (
            "cuda",
            _node(8, gpus=2),
            r"tensor_parallel_size=3 requires 3 GPUs.*has 2: set tensor_parallel_size to 2 or",
        ),
        ("cuda", _node(8), r"requires 3 GPUs.*has 0.*device='cpu'"),
    ],
)
def test_more_ranks_than_the_cluster_has_devices_are_refused(device: str, node: Node, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_placement(_config(3, device), [node])


def test_devices_held_by_others_are_named_with_their_holder() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_placement(_config(2, "cuda"), [_node(8, gpus=2, free_gpus=1)], ["rayllm:other (1 GPU)"])
    message = str(refusal.value)
    for part in ("'mine'", "2 GPUs", "1 of 2 GPUs", "8 of 8 CPUs", "rayllm:other (1 GPU)"):
        assert part in message


def test_a_machine_with_no_free_cpu_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 of 2 CPUs; held by other Ray actors"):
        plan_placement(_config(1), [_node(2, free_cpus=0)])


def test_lost_nodes_are_named_where_the_others_have_no_room() -> None:
    lost = {"0123456789": "nothing listens at its raylet's address h:1"}
    with pytest.raises(NoRoomError, match=r"0 of 2 CPUs \(node 01234567 is lost: nothing listens .* h:1\); held by"):
        plan_placement(_config(1), [_node(2, free_cpus=0)], lost=lost)
    with pytest.raises(NoRoomError, match=r"requires 2 CPUs, one per worker, but the cluster has 1 \(node 01234567 is"):
        plan_placement(_config(2), [_node(1)], lost=lost)


def test_a_rank_that_moves_asks_for_what_it_had_or_for_a_small_share_of_a_cpu() -> None:
    gpu = {"GPU": 1.0, "CPU": 1.0}
    assert plan_rank(_config(2, "cuda"), gpu, [_node(8, gpus=1, free_gpus=0), _node(8, gpus=1)]) == gpu
    assert plan_rank(_config(2), {"CPU": 1.0}, [_node(2, free_cpus=0.5)]) == {"CPU": 0.01}
    with pytest.raises(
        NoRoomError, match=r"requires at least 1 GPU and 0\.01 CPUs on one node, but .* free 0 of 1 GPUs"
    ):
        plan_rank(_config(2, "cuda"), gpu, [_node(8, gpus=1, free_gpus=0)])


@pytest.mark.cluster
def test_the_next_engine_of_a_name_has_its_place_though_the_former_one_is_not_gone(ray_cluster: None) -> None:
    from ray.util.placement_group import remove_placement_group

    groups = [create_placement_group(_config(1)) for _ in range(2)]
    assert sorted(holder for holder in _holders() if "mine" in holder) == ["rayllm:mine (2 CPU)"] * 2
    for group in groups:
        remove_placement_group(group)
