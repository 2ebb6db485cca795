"""The Space as an attacker meets it: raw requests in impolite forms to every endpoint, for files of the server."""

import base64
import http.server
import io
import itertools
import json
import os
import re
import threading
import urllib.parse
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from space_demo import space_app

pytest.importorskip("gradio", reason="the Space needs gradio")

SECRET = (17, 203, 99)
META = {"_type": "gradio.FileData"}
SESSIONS = itertools.count()


@pytest.fixture(scope="module")
def blocks(small_space):
    blocks = space_app().launch(small_space, prevent_thread_lock=True, quiet=True)
    yield blocks
    blocks.close()


@pytest.fixture(scope="module")
def web(blocks):
    with httpx.Client(base_url=blocks.local_url, timeout=30) as client:
        yield client


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret.png"
    Image.new("RGB", (64, 48), SECRET).save(path)
    return path


@pytest.fixture(scope="module")
def uploads() -> Path:
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def upload(web: httpx.Client, content: bytes, name: str = "mine.png") -> str:
    """Return where the server keeps a file that a visitor sent."""
    return web.post("gradio_api/upload", files={"files": (name, content)}).raise_for_status().json()[0]


def picture_bytes(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return buffer.getvalue()


def told_by_queue(web: httpx.Client, index: int, values: list, event: object = None) -> str:
    """Run a function by its number, public or not, as the page does, and return all that is said about it."""
    session = f"attacker{next(SESSIONS)}"
    body = {"fn_index": index, "data": values, "session_hash": session, "event_data": event, "trigger_id": 1}
    joined = web.post("gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    said = []
    with web.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            said.append(line)
            if '"close_stream"' in line:
                break
    return "\n".join(said)


def told_by_call(web: httpx.Client, name: str, body: dict, route: str = "call") -> str:
    joined = web.post(f"gradio_api/{route}/{name}", json=body)
    if joined.status_code != 200:
        return joined.text
    return web.get(f"gradio_api/call/{name}/{joined.json()['event_id']}").text


def told_at_once(web: httpx.Client, name: str, values: list, route: str = "run", **body) -> str:
    return web.post(f"gradio_api/{route}/{name}", json={"data": values, **body}).text


def without_numbers_of_the_call(told: str) -> str:
    """Leave out what differs between any two requests: ids, times and places in the queue."""
    lines = [line for line in told.splitlines() if '"estimation"' not in line and '"heartbeat"' not in line]
    names = "event_id|duration|average_duration|rank_eta|queue_size|rank|eta|time_limit"
    return re.sub(rf'"({names})":\s*("[^"]*"|[\d.e-]+|null)', "", "\n".join(lines))


def shows(told: str, colour: tuple[int, int, int] = SECRET) -> bool:
    """Whether an answer holds a picture of a colour, as bytes or by an address of the server."""
    for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", told):
        image = Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB")
        if (np.abs(np.asarray(image, int) - colour).max(axis=-1) < 12).mean() > 0.2:
            return True
    return False


def forms_of(path: str, uploads: Path) -> dict[str, object]:
    """Return what an attacker may send for a picture in order to have a file of the server read."""
    dots = os.path.relpath(path, uploads)
    inline = "data:image/png;base64," + base64.b64encode(b"x" * 20).decode()
    return {
        "no meta": {"path": path},
        "meta": {"path": path, "meta": META},
        "empty meta": {"path": path, "meta": {}},
        "null meta": {"path": path, "meta": None},
        "other meta": {"path": path, "meta": {"_type": "other"}},
        "a stream": {"path": path, "meta": META, "is_stream": True},
        "text": path,
        "list": [path],
        "list of files": [{"path": path, "meta": META}],
        "nested": {"path": {"path": path, "meta": META}, "meta": META},
        "inside": {"image": {"path": path, "meta": META}},
        "value": {"value": {"path": path}, "path": path},
        "url": {"path": path, "url": f"file://{path}"},
        "url alone": {"url": f"file://{path}", "meta": META},
        "file address": {"path": f"file://{path}"},
        "file address with meta": {"path": f"file://{path}", "meta": META},
        "orig_name": {"path": inline, "orig_name": path},
        "inline": {"path": inline, "meta": META, "url": path},
        "dots": {"path": f"{uploads}/{dots}"},
        "dots with meta": {"path": f"{uploads}/{dots}", "meta": META},
        "dots after a folder": {"path": f"{uploads}/x/../{dots}", "meta": META},
        "relative": {"path": os.path.relpath(path)},
        "relative with meta": {"path": os.path.relpath(path), "meta": META},
        "slashes": {"path": f"//{path}", "meta": META},
        "a slash after it": {"path": f"{path}/", "meta": META},
        "percent": {"path": urllib.parse.quote(path, safe=""), "meta": META},
        "null byte": {"path": f"{path}\0.png"},
        "served": {"path": f"/gradio_api/file={path}", "meta": META},
    }


FORMS = sorted(forms_of("/x", Path("/y")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["explain", "retrieve"])
def test_no_form_of_a_picture_reads_a_file_of_the_server(web, secret, uploads, name, form):
    def values(path: str) -> list:
        picture = forms_of(path, uploads)[form]
        return [picture, "", "5"] if name == "explain" else [picture, "", "", "clip_img", "clip_img"]

    missing = str(secret.with_name("nobody.png"))
    for ask in (
        lambda path: told_by_call(web, name, {"data": values(path)}),
        lambda path: told_at_once(web, name, values(path)),
        lambda path: told_at_once(web, name, values(path), "api"),
    ):
        told = ask(str(secret))
        assert not shows(told)
        assert "choose the image again" in told.lower()
        # What is there and what is not get the same answer, which names no place of this machine.
        assert without_numbers_of_the_call(told) == without_numbers_of_the_call(ask(missing))
        assert str(secret) not in told
        assert os.getcwd() not in told


def named_parameters(name: str, values: list) -> dict:
    names = {
        "explain": ["picture", "caption", "target"],
        "retrieve": ["picture", "caption", "sample", "source", "target"],
    }[name]
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_named_parameters_are_no_way_around(web, secret, uploads, form):
    body = named_parameters("retrieve", [forms_of(str(secret), uploads)[form], "", "", "clip_img", "clip_img"])
    told = told_by_call(web, "retrieve", body, "call/v2")
    assert not shows(told)
    assert "choose the image again" in told.lower()


def test_every_function_refuses_a_file_in_every_place(web, blocks, secret):
    asked = 0
    for index, function in blocks.fns.items():
        if function.fn is None:
            continue
        for place in range(len(function.inputs)):
            for sent in ({"path": str(secret)}, {"path": str(secret), "meta": META}, [{"path": str(secret)}]):
                values: list = [None] * len(function.inputs)
                values[place] = sent
                told = told_by_queue(web, index, values, {"row": 1, "latent": 5})
                assert not shows(told)
                assert '"success": true' not in told.replace('"success":true', '"success": true')
                assert str(secret) not in told
                asked += 1
    assert asked > 30


def test_what_is_clicked_names_no_file(web, blocks, secret):
    for index, function in blocks.fns.items():
        if function.fn is None:
            continue
        values: list = [None] * len(function.inputs)
        for event in ({"path": str(secret), "meta": META}, {"row": {"path": str(secret)}}, {"row": str(secret)}):
            told = told_by_queue(web, index, values, event)
            assert not shows(told)


def test_a_link_in_the_upload_folder_leads_nowhere(web, secret, uploads):
    link = uploads / f"link-{os.getpid()}.png"
    link.symlink_to(secret)
    folder = uploads / f"folder-{os.getpid()}"
    folder.symlink_to(secret.parent)
    try:
        for path in (link, folder / "secret.png"):
            for picture in ({"path": str(path)}, {"path": str(path), "meta": META}):
                told = told_at_once(web, "retrieve", [picture, "", "", "clip_img", "clip_img"])
                assert not shows(told)
                assert "choose the image again" in told.lower()
    finally:
        link.unlink()
        folder.unlink()


def test_folders_beside_the_upload_folder_are_not_in_it(web, uploads):
    beside = uploads.with_name(uploads.name + f"-{os.getpid()}")
    beside.mkdir()
    try:
        Image.new("RGB", (64, 48), SECRET).save(beside / "secret.png")
        for picture in ({"path": str(beside / "secret.png")}, {"path": str(beside / "secret.png"), "meta": META}):
            told = told_at_once(web, "retrieve", [picture, "", "", "clip_img", "clip_img"])
            assert not shows(told)
            assert "choose the image again" in told.lower()
    finally:
        (beside / "secret.png").unlink()
        beside.rmdir()


def test_the_server_fetches_nothing(web, tmp_path):
    """Addresses of this machine and of its network are the way to services that visitors cannot reach themselves."""
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture_bytes(SECRET))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/secret.png"
        for picture in (
            {"path": address},
            {"path": address, "meta": META},
            {"path": "x", "url": address, "meta": META},
            {"path": address.replace("127.0.0.1", "localhost"), "meta": META},
            {"path": f"/gradio_api/proxy={address}", "meta": META},
            address,
        ):
            told = told_at_once(web, "retrieve", [picture, "", "", "clip_img", "clip_img"])
            assert not shows(told)
            assert "choose the image again" in told.lower()
        for route in ("file=", "proxy=", "file/"):
            assert web.get(f"gradio_api/{route}{address}").status_code in (403, 404)
        assert asked == []
    finally:
        server.shutdown()


def test_public_addresses_are_not_fetched_either(web, monkeypatch):
    """A Space is no proxy, neither for a picture nor for a file."""
    import safehttpx

    asked = []

    async def validated(host, *_, **__):
        asked.append(host)
        raise ValueError("not in this test")

    monkeypatch.setattr(safehttpx, "async_validate_url", validated)
    address = "https://example.com/secret.png"
    for picture in ({"path": address, "meta": META}, {"path": "x", "url": address, "meta": META}):
        told = told_at_once(web, "retrieve", [picture, "", "", "clip_img", "clip_img"])
        assert "choose the image again" in told.lower()
    told = told_at_once(web, "latent", [{"path": address, "meta": META}])
    assert "data" not in json.loads(told)
    for method in ("GET", "HEAD"):
        assert web.request(method, f"gradio_api/file={address}").status_code == 403
    assert asked == []


def test_files_are_served_from_the_upload_folder_only(web, secret):
    assert web.get(f"gradio_api/file={upload(web, picture_bytes())}").status_code == 200
    inside = [ROOT / "README.md", ROOT / "spaces_app" / "app.py", secret, Path(__file__), Path("/etc/passwd")]
    for path in [*inside, *(os.path.relpath(one) for one in inside)]:
        for route in ("file=", "file/", "file=/gradio_api/file=", "proxy=", "static/"):
            for sent in (str(path), urllib.parse.quote(str(path), safe=""), f"./{path}", f"file://{path}"):
                answer = web.get(f"gradio_api/{route}{sent}")
                assert answer.status_code in (403, 404, 405), (route, sent)
                assert b"sparc" not in answer.content.replace(str(path).encode(), b"").replace(sent.encode(), b"")


def test_a_visitors_own_file_is_read(web):
    path = upload(web, picture_bytes((200, 30, 30)))
    for picture in ({"path": path, "meta": META}, {"path": path, "meta": META, "url": "http://127.0.0.1:1/x.png"}):
        told = told_at_once(web, "retrieve", [picture, "", "", "clip_img", "clip_img"])
        assert shows(told, (200, 30, 30))
        alike = told_at_once(web, "explain", [picture, "a red scene", "similarity of image and caption"])
        assert 'class="heat"' in json.loads(alike)["data"][0]


def test_a_file_that_has_gone_is_told_like_any_other(web):
    path = upload(web, picture_bytes((1, 2, 3)))
    Path(path).unlink()
    gone = told_at_once(web, "explain", [{"path": path, "meta": META}, "", "5"])
    elsewhere = told_at_once(web, "explain", [{"path": "/etc/passwd", "meta": META}, "", "5"])
    assert gone == elsewhere
