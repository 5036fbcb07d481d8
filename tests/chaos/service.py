"""A service of a run's own, as a user would start it, on a Ray of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from serve_process import ServeProcess

from chaos.target import Target
from cluster.checkpoints.presets import create_checkpoint
from cluster.launch.token_file import find_record

FLAGS = ("--dtype", "float32", "--stream-interval-ms", "0", "--num-kv-blocks", "1024")


@contextmanager
def running_service(flags: Sequence[str], *, folder: Path, model: Path | None) -> Iterator[Target]:
    """flags come on top of FLAGS; folder gets the service's log. Without a model: a tiny-maverick of random weights.

    Raises SystemExit with the log when the service does not start.
    """
    with TemporaryDirectory(prefix="arriero-chaos-") as temporary:
        model = model or create_checkpoint("tiny-maverick", Path(temporary, "tiny-maverick"))
        with ServeProcess("--model", str(model), *FLAGS, *flags, folder=folder.resolve()) as service:
            if not service.ready_line():
                raise SystemExit(f"the service did not start:\n{service.log.read_text()}")
            record = find_record(service.state_home / "arriero", service.address)
            target = Target(
                grpc_address=service.address,
                http_url=f"http://127.0.0.1:{service.http_port}",
                application=record.app_name,
                admin_token=record.admin_token,
            )
            yield target
            target.close()
