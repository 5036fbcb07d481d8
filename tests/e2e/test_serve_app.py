from conftest import RunApp


def test_experts_can_live_in_the_router(run_app: RunApp) -> None:
    with run_app("alone", shards=0) as service, service.client() as client:
        pieces = list(client.generate("Hello", seed=1))
        print(pieces)
        print(service.view())
    assert sum(len(piece.token_ids) for piece in pieces) == 16
