import pytest

from tests.reliability.forks import Server
from tests.runs import write_inputs


def serve():
    server = Server()
    server.run(["verify", "nowhere"])  # it has imported everything
    yield server
    server.close()


server, other = (pytest.fixture(scope="session", name=name)(serve) for name in ("server", "other"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))
