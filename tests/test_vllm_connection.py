"""Connecting to a vLLM server: what is found out before anything loads, and what no request takes or follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from trl.generation import vllm_client

from alignment import __main__ as entry
from alignment import rollout_server
from alignment.distributed import world_size
from alignment.recipe import PpoRecipe
from alignment.vllm_rollout import RolloutServerError
from tests import tiny_ppo, vllm_server
from tests.conftest import ROOT
from tests.http_peer import RESET, Peer, Request, http
from tests.interrupted import make_parents, ppo_words
from tests.tiny_ppo import PROMPTS
from tests.vllm_engine import InProcessEngine
from tests.vllm_server import Server, Wire, sampler_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from reward.render import Renderer

renderer = tiny_ppo.renderer  # fixture
wire = vllm_server.wire  # fixture


def test_without_the_package_the_line_says_so(tiny_model: Path, renderer: Renderer) -> None:
    if vllm_client.is_vllm_available():
        pytest.skip("vllm is installed here")
    with (
        Peer(Server(None, Wire())) as peer,
        pytest.raises(RolloutServerError, match=r"connecting: .*install trl\[vllm\]"),
    ):
        sampler_for(peer, tiny_model, renderer)


HOSTILE: dict[str, tuple[Callable[[str], Iterable[bytes | float]], str]] = {
    "silent": (lambda url: [5.0], "no answer within vllm.timeout_seconds 0.5"),
    "never ready": (lambda url: [http(b"", status="503 Service Unavailable")], "503"),
    "elsewhere": (
        lambda url: [http(b"", status="307 Temporary Redirect", Location=f"{url}/other")],
        "redirects are not followed; give the final url",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_connecting_ends_whatever_the_server_does(
    tiny_model: Path, renderer: Renderer, wire: Wire, case: str, path: str
) -> None:
    """TRL's own constructor asks for /health without a limit, and again while the status is another than 200."""
    respond, expected = HOSTILE[case]
    good = Server(None, wire)

    def answer(request: Request) -> Iterable[bytes | float]:
        return respond(peer.url) if request.line.split()[1] == path else good(request)

    with Peer(answer) as peer, pytest.raises(RolloutServerError) as caught:
        sampler_for(peer, tiny_model, renderer, seconds=0.5)
    said = str(caught.value)
    assert said.startswith(f"vllm server {peer.url}/, connecting: ")
    assert expected in said
    assert all(request.line.split()[1] != "/other" for request in peer.requests)
    assert sum(request.line.split()[1] == path for request in peer.requests) == 1


def tempt(monkeypatch: pytest.MonkeyPatch, folder: Path, proxy: str) -> None:
    """An environment that names a proxy, and credentials for 127.0.0.1."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (folder / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (folder / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))


def test_no_request_takes_a_proxy_or_credentials_of_the_environment(
    tiny_model: Path, tmp_path: Path, renderer: Renderer, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(lambda request: [http(b"{}")]) as proxy, Peer(Server(InProcessEngine(tiny_model), wire)) as peer:
        tempt(monkeypatch, tmp_path, proxy.url)
        sampler, _ = sampler_for(peer, tiny_model, renderer)
        sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
    assert proxy.requests == []
    assert len(peer.requests) == 8
    assert not any("authorization" in request.headers for request in peer.requests)


# -------------------------------------------------------------------------------------- before anything loads


def vllm_words(parents: Path, output: Path, url: str) -> list[str]:
    return ppo_words(parents, output, "--vllm", f"{{base_url: '{url}', timeout_seconds: 1.0}}")


def info(weight_transfer: Any = "nccl") -> list[bytes | float]:
    """What vLLM says of its settings."""
    return [http(json.dumps({"vllm_config": {"weight_transfer_config": weight_transfer}}).encode())]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[PpoRecipe]:
    """The stages that were begun, on a machine with vLLM and a GPU."""
    from alignment import stages

    began: list[PpoRecipe] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stages, "run_stage", began.append)
    monkeypatch.setattr(rollout_server, "find_spec", lambda name: object())
    monkeypatch.setattr(rollout_server, "on_cpu", lambda: False)
    return began


def test_a_server_that_is_not_up_or_takes_no_weights_is_named_before_anything_loads(
    tiny_model: Path,
    tmp_path: Path,
    began: list[PpoRecipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert world_size() == 1
    parents = make_parents(tmp_path / "parents", tiny_model)
    capsys.readouterr()
    respond: list[bytes | float] = []
    with Peer(lambda request: respond) as peer, Peer(lambda request: info()) as other:
        tempt(monkeypatch, tmp_path, other.url)
        words = vllm_words(parents, tmp_path / "ppo", peer.url)
        for answer, problem in (
            ([http(b"", status="503 Service Unavailable")], "does not answer (status 503"),
            ([RESET], "does not answer ("),
            ([b"gibberish"], "does not answer ("),
            ([3.0], "does not answer (no whole answer within 1 s); start `trl vllm-serve` first"),
            ([http(b"", status="307 Temporary Redirect", Location=other.url)], "redirects are not followed"),
            ([http(b"{}", status="404 Not Found")], "has no /server_info, so it takes no weights"),
            (info(None), "takes no weights; start it by `trl vllm-serve`"),
            ([http(b"[]")], "takes no weights; start it by `trl vllm-serve`"),
        ):
            respond[:] = answer
            assert entry.main(words) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: vllm.base_url: {peer.url} ")
            assert problem in said
            assert said.count("\n") == 1
        asked = len(peer.requests)
        assert entry.main([*words, "--dry-run"]) == 0, "a dry run needs no server"
        assert (len(peer.requests), began) == (asked, [])
        respond[:] = info()
        assert entry.main(words) == 0
        assert [recipe.output_dir for recipe in began] == [str(tmp_path / "ppo")]
        monkeypatch.setenv("RANK", "1")
        assert entry.main(words) == 0
        assert len(peer.requests) == asked + 1, "the main process alone asks"
        monkeypatch.delenv("RANK")
        assert other.requests == [], "neither by the proxy nor past a redirect"
        assert not any("authorization" in request.headers for request in peer.requests)
    assert entry.main(words) == 2, "nobody listens any more"
    assert not (tmp_path / "ppo").exists()


def test_without_the_package_or_a_cuda_device_nothing_is_even_asked(
    tiny_model: Path,
    tmp_path: Path,
    began: list[PpoRecipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parents = make_parents(tmp_path / "parents", tiny_model)
    capsys.readouterr()
    with Peer(lambda request: info()) as peer:
        words = vllm_words(parents, tmp_path / "ppo", peer.url)
        for name, value, problem in (
            ("find_spec", lambda name: None, "vllm: its package sends the weights here, too"),
            ("on_cpu", lambda: True, "vllm: the weights go to the server over NCCL, for which the main process needs"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(rollout_server, name, value)
                assert entry.main(words) == 2
            assert capsys.readouterr().err.startswith(f"error: {problem}")
    assert (peer.requests, began) == ([], [])
