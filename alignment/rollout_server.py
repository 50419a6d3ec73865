"""Whether the vLLM server of a recipe can be used, asked before anything loads."""

from __future__ import annotations

from importlib.util import find_spec

from alignment.distributed import is_main_process, on_cpu
from alignment.inputs import InputError
from alignment.recipe import PpoRecipe, StageRecipe
from reward.endpoint import Endpoint, NoAnswer
from reward.wire import parse_json, shorten

SERVER_INFO = "/server_info?config_format=json"
"""Of vLLM: its settings. It has them only where it takes weights, too."""
MAX_SERVER_INFO = 2**24
"""Bytes."""


def check_rollout_server(recipe: StageRecipe) -> None:
    """Refuse a recipe whose vLLM server is not up or takes no weights, or where what sends the weights is absent.

    The main process alone asks, since it alone will talk to the server.
    """
    if not isinstance(recipe, PpoRecipe) or recipe.vllm is None or not is_main_process():
        return
    if find_spec("vllm") is None:
        raise InputError(
            "vllm: its package sends the weights here, too, and is not installed; install sara-align[vllm]"
        )
    if on_cpu():
        raise InputError(
            "vllm: the weights go to the server over NCCL, for which the main process needs a CUDA device; start it on "
            "a GPU, or leave vllm out"
        )
    url, seconds = recipe.vllm.base_url.rstrip("/"), recipe.vllm.timeout_seconds
    server = Endpoint(url=url, timeout=seconds, deadline=seconds, retries=0)
    try:
        answer = server.ask("GET", SERVER_INFO, None, limit=MAX_SERVER_INFO, read=parse_json)
    except NoAnswer as error:
        if error.status == 404:
            problem = "has no /server_info, so it takes no weights; start it by `trl vllm-serve`"
        else:
            problem = f"does not answer ({error.reason}); start `trl vllm-serve` first"
        raise InputError(shorten(f"vllm.base_url: {url} {problem}")) from error
    config = answer.get("vllm_config") if isinstance(answer, dict) else None
    if not isinstance(config, dict) or config.get("weight_transfer_config") is None:
        raise InputError(f"vllm.base_url: {url} takes no weights; start it by `trl vllm-serve`")
