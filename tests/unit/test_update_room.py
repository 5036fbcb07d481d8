"""How much memory a second version of the weights takes, and how much is missing."""

from cluster.control.update_room import Need, rooms


def test_members_that_share_a_memory_need_room_together_and_what_is_missing_is_exact() -> None:
    needs = [
        Need(member="shard-0", memory="n1", num_bytes=500),
        Need(member="shard-1", memory="n2", num_bytes=500),
        Need(member="router-1", memory="n1", num_bytes=402),
    ]
    tight, roomy = rooms(needs, {"n1": 1000, "n2": 1000})
    assert (tight.memory, tight.members, tight.needed_bytes) == ("n1", ("shard-0", "router-1"), 902)
    assert (tight.missing_bytes, roomy.missing_bytes) == (2, 0)
    assert str(tight) == (
        "2 bytes are missing on n1: shard-0, router-1 need 902, 1000 are free, of which 90% may be used"
    )
    assert tight.to_dict()["missing_bytes"] == 2


def test_what_just_fits_is_not_missing() -> None:
    [room] = rooms([Need(member="shard-0", memory="n1", num_bytes=900)], {"n1": 1000})
    assert room.missing_bytes == 0
