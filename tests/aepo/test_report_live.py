"""`aepo report --live`: a page that follows the run directory, asked over HTTP as the browser does."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from report_toys import hand_made_tree, make_run, page_data, save_trees

from aepo.report.live import make_server

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def ask(run) -> Iterator[Ask]:
    """ask(path, **headers) -> status, text, tag."""
    with make_server([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def get(path: str = "/", **headers: str) -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            text, tag = answer.read().decode(), answer.getheader("ETag", "")
            connection.close()
            return answer.status, text, tag

        yield get
        server.shutdown()
        thread.join()


def test_the_page_is_made_anew_when_a_file_changes_and_only_then(run, ask):
    status, page, tag = ask()
    assert status == 200
    assert page_data(page)["runs"][0]["series"]["reward.mean"]["steps"] == [1, 2]
    assert f'data-tag="{tag}"'.replace('"', "") in page.replace("&#34;", "").replace('"', "")
    assert "connect-src" in page  # it may ask its server
    assert ask(If_None_Match=tag) == (304, "", "")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "reward.mean": 0.9}) + "\n")
    status, page, newer = ask(If_None_Match=tag)
    assert status == 200
    assert newer != tag
    assert page_data(page)["runs"][0]["series"]["reward.mean"]["steps"] == [1, 2, 3]
    save_trees(run, 3, hand_made_tree("new"))
    status, page, _ = ask(If_None_Match=newer)
    assert [tree["question"]["id"] for tree in page_data(page)["trees"]] == ["q7", "new"]


def test_a_run_that_is_gone_is_said_and_one_that_comes_back_is_shown(run, ask):
    run.rename(run.with_name("away"))
    status, text, _ = ask()
    assert status == 503
    assert "no such run directory" in text
    run.with_name("away").rename(run)
    assert ask()[0] == 200


def test_only_the_page_is_served_and_only_to_this_machine(ask):
    assert ask("/../run.json")[0] == ask("/run.json")[0] == 404
    status, text, _ = ask(Host="evil.example:80")
    assert status == 403
    assert "expected" in text


def test_a_run_that_has_just_begun_is_waited_for(run):
    records = {name: (run / name).read_text() for name in ("metrics.jsonl", "evals.jsonl")}
    for name in records:
        (run / name).write_text("")
    from aepo.report.live import LiveReport

    live = LiveReport([run])
    assert b"Nothing to report yet" in live.page()[1]
    (run / "metrics.jsonl").write_text(records["metrics.jsonl"])
    assert b'id="charts"' in live.page()[1]


def test_what_cannot_be_served_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no such run directory"):
        make_server([tmp_path / "absent"], 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port = {port}: expected a free port"):
            make_server([run], port)
    with pytest.raises(ValueError, match="port = 70000: expected"):
        make_server([run], 70000)
