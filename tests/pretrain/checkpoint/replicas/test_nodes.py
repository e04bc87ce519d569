"""Who keeps whose copies, and who copies what back."""

from __future__ import annotations

from amfm.pretrain.checkpoint.replicas.memory import Nodes, find_holders, share_out


def test_each_node_keeps_the_copies_of_the_one_before() -> None:
    nodes = Nodes.of(["a", "a", "b", "b", "c", "c"])
    assert nodes.members == ((0, 1), (2, 3), (4, 5)) and nodes.hosts == ("a", "b", "c")
    assert nodes.keepers == (2, 3, 4, 5, 0, 1)
    assert nodes.kept_by(0) == [4] and nodes.node_of(5) == 2
    assert nodes.bytes_of_node(1, [1, 2, 10, 20, 100, 200]) == 33


def test_ranks_of_unequal_or_mixed_nodes_share_the_copies_in_turns() -> None:
    nodes = Nodes.of(["a", "b", "a", "a"])
    assert nodes.members == ((0, 2, 3), (1,)) and nodes.keepers == (1, 0, 1, 1)
    assert nodes.kept_by(1) == [0, 2, 3] and nodes.kept_by(0) == [1] and nodes.kept_by(2) == []


def test_one_node_keeps_no_second_copies() -> None:
    nodes = Nodes.of(["a", "a"])
    assert nodes.keepers == () and nodes.kept_by(0) == [] and nodes.bytes_of_node(0, [3, 4]) == 7


def test_any_lost_node_leaves_a_whole_set_and_two_neighbours_do_not() -> None:
    nodes = Nodes.of(["a", "b", "c", "d"])
    held = {node: [node, (node - 1) % 4] for node in range(4)}
    for lost in range(4):
        left = {node: files for node, files in held.items() if node != lost}
        holders = find_holders(4, left)
        assert all(holders.values())
        chosen = share_out(holders, nodes)
        assert sorted(chosen) == [0, 1, 2, 3] and all(node != lost for node, _ in chosen.values())
    assert find_holders(4, {2: held[2], 3: held[3]})[0] == []
    assert all(find_holders(4, {1: held[1], 3: held[3]}).values()), "two that are not neighbours may go"


def test_holders_and_their_ranks_take_turns() -> None:
    nodes = Nodes.of(["a", "a", "b", "b"])
    chosen = share_out({file: [0, 1] for file in range(4)}, nodes)
    assert sorted(rank for _, rank in chosen.values()) == [0, 1, 2, 3]
