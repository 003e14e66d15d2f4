"""The command line: what a user sees, and how long it takes to see it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import pytest

from quire.cluster import cli, errors
from quire.cluster.client import Client, ServerError
from quire.cluster.config import ServeConfig
from quire.cluster.errors import RequestError
from quire.cluster.prefixes import Prefix
from quire.protos import generation_pb2 as pb
from quire.protos import generation_pb2_grpc as pb_grpc

COMMAND = [sys.executable, "-m", "quire.cluster.cli"]


class Server(pb_grpc.GenerationServicer):
    """Answers a word at a time with the last thing it was told."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.prefixes: list[pb.ReservePrefixRequest] = []
        self.ended = threading.Event()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        context.add_callback(self.ended.set)
        yield pb.GenerateResponse(started=pb.Started(request_id="r"))
        said = request.text or request.conversation.messages[-1].content
        if said == "fail":
            status = errors.to_status(RequestError(grpc.StatusCode.INVALID_ARGUMENT, "n is too large", "sampling.n"))
            context.set_trailing_metadata(((errors.DETAILS_KEY, status.SerializeToString()),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "n is too large")
        for index in range(request.sampling.n or 1):
            for seq, word in enumerate(said.split(" ")):
                message = pb.Output(index=index, seq=seq, token_ids=[seq], text=f"{word} ")
                if request.sampling.HasField("logprobs"):
                    message.logprobs.add(sampled_rank=1).candidates.add(token_id=seq, logprob=-0.5, token=word)
                yield pb.GenerateResponse(output=message)
        while said == "hang" and context.is_active():
            time.sleep(0.01)
        for index in range(request.sampling.n or 1):
            yield pb.GenerateResponse(finished=pb.Finished(index=index, seq=2, text="."))

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=[len(request.text), int(request.add_special_tokens)])

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=str(list(request.token_ids)))

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such request")

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        return pb.ModelInfo(model="tiny")

    def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.Load:
        return pb.Load(
            num_running=3, blocks_total=200, blocks_free=50, blocks_cached=30, blocks_used=120,
            blocks_reserved_prefix=10, slots_filled=1900, slots_reserved=20, slots_shared=640, block_size=16,
            block_bytes=1 << 20, num_preemptions=7, num_swap_preemptions=5, recomputed_tokens=99,
            swap_blocks_total=100, swap_blocks_used=40, prefix_query_tokens=1000, prefix_hit_tokens=374,
        )  # fmt: skip

    def ReservePrefix(self, request: pb.ReservePrefixRequest, context: Any) -> pb.ReservedPrefix:
        self.prefixes.append(request)
        return pb.ReservedPrefix(name=request.name, num_tokens=33)

    def ReleasePrefix(self, request: pb.ReleasePrefixRequest, context: Any) -> pb.ReleasePrefixResponse:
        if request.name != "kept":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no prefix {request.name!r} is reserved")
        return pb.ReleasePrefixResponse()

    def ListPrefixes(self, request: pb.ListPrefixesRequest, context: Any) -> pb.ListPrefixesResponse:
        kept = pb.ReservedPrefix(name="kept", num_tokens=33, num_blocks=3, num_hits=4, is_ready=True)
        return pb.ListPrefixesResponse(prefixes=[kept, pb.ReservedPrefix(name="new", num_tokens=5)])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    running = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_GenerationServicer_to_server(made, running)
    made.url = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    running.start()
    yield made
    running.stop(None).wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which is one line on stderr and nothing elsewhere."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("quire: ")
    return err


# -- generate


def test_generate_prints_the_text(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ["--max-tokens", "5", "--temperature", "0", "--stop", "a", "--stop", "b"]
    assert cli.run(["generate", "one two", "--url", server.url, *sampled]) == 0
    assert capsys.readouterr() == ("one two .\n", "")
    sampling = server.requests[0].sampling
    assert (sampling.max_tokens, list(sampling.stop)) == (5, ["a", "b"])
    assert sampling.HasField("temperature") and not sampling.HasField("top_p") and not sampling.HasField("n")


def test_generate_several_samples_whole_text_and_logprobs(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "one two", "--url", server.url, "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0] one two .\n[1] one two .\n"
    assert cli.run(["generate", "one", "--url", server.url, "--no-stream", "--logprobs", "0"]) == 0
    assert capsys.readouterr() == ("one .\n", "[0] 'one' -0.5000 (rank 1)\n")


def test_generate_asks_for_ranked_answers(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    beams = ["--beam-width", "4", "--length-penalty", "0.6", "--early-stopping", "never", "--n", "2"]
    assert cli.run(["generate", "one", "--url", server.url, *beams, "--cache-salt", "tenant"]) == 0
    assert cli.run(["generate", "one", "--url", server.url, "--best-of", "3", "--early-stopping", "true"]) == 0
    assert capsys.readouterr().out == "[0] one .\n[1] one .\none .\n"
    first, second = server.requests
    assert first.cache_salt == "tenant" and second.cache_salt == ""
    expected = pb.SamplingParams(n=2, beam_width=4, length_penalty=0.6, early_stopping=pb.EARLY_STOPPING_NEVER)
    assert first.sampling == expected
    assert second.sampling == pb.SamplingParams(best_of=3, early_stopping=pb.EARLY_STOPPING_TRUE)


def test_url_comes_from_the_environment(server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("QUIRE_URL", server.url)
    assert cli.run(["generate", "hi"]) == 0
    assert capsys.readouterr().out == "hi .\n"


def test_generate_prints_the_servers_sentence(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "fail", "--url", server.url]) == 1
    assert one_line(capsys) == "quire: n is too large\n"


def test_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert cli.run(["generate", "hi", "--url", f"127.0.0.1:{port}"]) == 1
    assert f"no server answers at 127.0.0.1:{port}: start one with `quire serve`" in one_line(capsys)


def test_time_limit(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "hang", "--url", server.url, "--timeout", "0.2"]) == 1
    out, err = capsys.readouterr()
    assert out == "hang " and err.startswith("quire: the time limit was over") and err.count("\n") == 1


def test_values_that_the_wire_cannot_carry(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "hi", "--url", server.url, "--top-k", str(2**40)]) == 2
    assert "this cannot be sent" in one_line(capsys)
    assert cli.run(["generate", "\udcff", "--url", server.url]) == 2
    assert "this cannot be sent" in one_line(capsys)
    done = subprocess.run([*COMMAND, "generate", "-", "--url", server.url], input=b"a\xff", capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"quire: this cannot be sent") and done.stderr.count(b"\n") == 1


def test_a_real_process_streams_quickly_and_imports_little(server: Any) -> None:
    code = (
        "import sys; from quire.cluster import cli; code = cli.run(sys.argv[1:]);"
        "assert not {'ray', 'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "-", "--url", server.url],
        input="héllo",
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("héllo .\n", "", 0)
    assert time.monotonic() - started < 5  # a fifth of a second where nothing else runs


def test_interrupt_ends_the_process_and_the_request(server: Any) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "hang", "--url", server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"hang"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip() == b""
    assert server.ended.wait(2)


def test_a_reader_that_has_seen_enough(server: Any) -> None:
    # In small writes, so that the pipe is found closed while text still comes.
    process = subprocess.Popen(
        [*COMMAND, "generate", "x " * 2000, "--url", server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(10) in (0, 1)
    assert process.stderr.read() == b""
    process.stderr.close()


# -- chat


def test_chat_from_a_pipe_keeps_the_history(server: Any) -> None:
    lines = "first\n\nsecond\n/reset\nthird\n/exit\nnever\n"
    done = subprocess.run(
        [*COMMAND, "chat", "--url", server.url, "--system", "be kind"], input=lines, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("first .\nsecond .\nthird .\n", "", 0)
    said = [[(m.role, m.content) for m in request.conversation.messages] for request in server.requests]
    system = ("system", "be kind")
    assert said == [
        [system, ("user", "first")],
        [system, ("user", "first"), ("assistant", "first ."), ("user", "second")],
        [system, ("user", "third")],
    ]


def test_chat_from_a_pipe_ends_at_the_first_failure(server: Any) -> None:
    done = subprocess.run([*COMMAND, "chat", "--url", server.url], input="fail\nx\n", capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "quire: n is too large\n", 1)


def test_chat_at_a_terminal_goes_on_after_a_failure(server: Any) -> None:
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        [*COMMAND, "chat", "--url", server.url],
        stdin=child,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(child)
    os.write(parent, b"fail\nhello\n\x04")
    out, err = process.communicate(timeout=20)
    os.close(parent)
    assert process.returncode == 0
    assert b"hello ." in out
    assert err == b"quire: n is too large\n"
    assert [m.content for m in server.requests[-1].conversation.messages] == ["hello"]


# -- load and prefixes


def test_load_tells_where_every_block_is(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["load", "--url", server.url]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:7] == [
        "KV pool of 200 blocks, 200.0 MiB on each rank, 16 tokens a block:",
        "in tables 120 blocks 120.0 MiB 60.0%",
        "of reserved prefixes 10 blocks 10.0 MiB 5.0%",
        "cached, evictable 30 blocks 30.0 MiB 15.0%",
        "free 50 blocks 50.0 MiB 25.0%",
        "token slots in tables: 1,900 filled, 20 reserved and empty (99.0% filled); 640 more without sharing",
    ]
    assert "swap space of 100 blocks, 100.0 MiB, of which 40 blocks are used" in lines
    assert "prefix cache: 374 of 1,000 tokens found (37.4%)" in lines
    assert "preemptions: 5 by swap, 2 by recompute (99 tokens)" in lines


def test_prefixes_are_reserved_released_and_listed(
    server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "system.txt").write_text("Be kind.\n")
    (tmp_path / "ids.json").write_text('{"token_ids": [1, 2], "cache_salt": "s"}')
    url = ["--url", server.url]
    assert cli.run(["prefix", "reserve", str(tmp_path / "system.txt"), *url]) == 0
    assert cli.run(["prefix", "reserve", str(tmp_path / "ids.json"), *url, "--name", "n", "--cache-salt", "t"]) == 0
    assert capsys.readouterr().out == "system: 33 tokens\nn: 33 tokens\n"
    text, ids = server.prefixes
    assert (text.name, text.text, text.cache_salt) == ("system", "Be kind.", "")
    assert (ids.name, list(ids.token_ids.ids), ids.cache_salt) == ("n", [1, 2], "t")
    assert cli.run(["prefix", "list", *url]) == 0
    assert capsys.readouterr().out == "kept: 33 tokens, 3 blocks, 4 hits\nnew: 5 tokens, on its way\n"
    assert cli.run(["prefix", "release", "kept", *url]) == 0
    assert cli.run(["prefix", "release", "other", *url]) == 1
    assert one_line(capsys) == "quire: no prefix 'other' is reserved\n"
    assert cli.run(["prefix", "reserve", str(tmp_path / "absent"), *url]) == 1
    assert "cannot be read" in one_line(capsys)


# -- usage


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "--max-modle-len", "5"], 2, "Did you mean '--max-model-len'?"),
        (["serv"], 2, "Did you mean 'serve'?"),
        (["generate"], 2, "Missing argument 'PROMPT'"),
        (["generate", "a", "b"], 2, "unexpected extra argument"),
        (["serve", "-tp", "two"], 2, "'two' is not a valid integer"),
        (["serve", "--max-model-len", "8q"], 2, "'8q' is not a whole number"),
        (["serve", "--kv-cache-memory-bytes", "2Gibberish"], 2, "such as 512M, 2GiB"),
        (["serve", "--device", "tpu"], 2, "'tpu' is not one of"),
        (["serve", "--trust-remote-code"], 2, "is never run"),
        (["serve", "--grpc-port", "70000"], 1, "--grpc-port must be"),
        (["serve", "/no/such/model"], 1, "there is no folder '/no/such/model'"),
        (["serve", "org/model"], 1, "hf download org/model"),
        (["serve", "--block-size", "12"], 1, "power of two"),
        (["serve", "--gpu-memory-utilization", "nan"], 1, "above 0 and at most 1"),
        (["plan", "/no/such/model"], 1, "there is no folder"),
        (["serve", "--reserve-prefix", "/no/such/file"], 1, "the prefix '/no/such/file' cannot be read"),
        (["serve", "--preemption-mode", "drop"], 2, "'drop' is not one of"),
        (["serve", "--swap-space", "nan"], 1, "--swap-space must be"),
        (["generate", "x", "--early-stopping", "maybe"], 2, "'maybe' is not one of"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cli.run(arguments) == code
    assert message in one_line(capsys)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quire ")
    for arguments in (["--help"], ["serve", "-h"], ["generate", "--help"]):
        assert cli.run(arguments) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("Usage: quire")
        assert "trust-remote-code" not in shown
    assert cli.run([]) == 2
    assert "serve" in capsys.readouterr().out


# -- serve and plan


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """What `serve` hands over, in place of starting it."""
    configs: list[ServeConfig] = []
    launch = types.ModuleType("quire.cluster.launch")

    class LaunchError(RuntimeError):
        pass

    def start(config: ServeConfig) -> int:
        configs.append(config)
        if config.address is not None:
            raise LaunchError("no such cluster")
        return 3

    launch.serve, launch.LaunchError = start, LaunchError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quire.cluster.launch", launch)
    monkeypatch.setattr("quire.cluster.launch", launch, raising=False)
    monkeypatch.setattr("quire.cluster.fate.in_own_session", lambda run: run())
    return configs


def test_serve_hands_over_what_was_asked_for(launched: list[ServeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "8")
    monkeypatch.setenv("QUIRE_TENSOR_PARALLEL_SIZE", "4")
    arguments = [
        "serve", "-tp", "2", "--dtype", "bfloat16", "--max-model-len", "1K",
        "--kv-cache-memory-bytes", "512M", "--device", "cpu",
        "--served-model-name", "a", "--served-model-name", "b", "--grpc-port", "0", "--step-timeout", "2.5",
    ]  # fmt: skip
    assert cli.run(arguments) == 3
    (config,) = launched
    assert (config.engine.tensor_parallel_size, config.engine.max_num_seqs) == (2, 8)
    assert (config.engine.max_model_len, config.engine.kv_cache_memory_bytes) == (1024, 2**29)
    assert (config.engine.model, config.engine.dtype, config.engine.device) == (None, "bfloat16", "cpu")
    assert (config.served_model_names, config.grpc_port, config.step_timeout) == (("a", "b"), 0, 2.5)
    assert (config.host, config.address, config.drain_timeout) == ("127.0.0.1", None, 60.0)


def test_serve_hands_over_how_memory_is_shared(launched: list[ServeConfig], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text of {name}")
    arguments = [
        "serve", "--device", "cpu", "--swap-space", "0.5", "--preemption-mode", "swap", "--no-enable-prefix-caching",
        "--reserve-prefix", str(tmp_path / "a"), "--reserve-prefix", str(tmp_path / "b"), "--no-enable-admin",
    ]  # fmt: skip
    assert cli.run(arguments) == 3
    (config,) = launched
    engine = config.engine
    assert (engine.swap_space, engine.preemption_mode, engine.enable_prefix_caching) == (0.5, "swap", False)
    assert config.reserved_prefixes == (Prefix("a", "text of a"), Prefix("b", "text of b"))
    assert config.enable_admin is False


def test_defaults_of_the_command_are_those_of_the_config(launched: list[ServeConfig]) -> None:
    assert cli.run(["serve"]) == 3
    assert launched == [ServeConfig()]


def test_a_start_that_fails_is_one_line(launched: list[ServeConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--device", "cpu", "--address", "10.0.0.1:6379"]) == 1
    assert one_line(capsys) == "quire: no such cluster\n"


def test_plan_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--gpu-memory", "80GiB", "--max-model-len", "1k"]) == 0
    out = capsys.readouterr().out
    assert "cuda" in out and "request(s) of max_model_len 1,000 fit at once" in out
    assert cli.run(["plan", "--kv-cache-memory-bytes", "1M", "--device", "cpu"]) == 1
    assert "lower --max-model-len to" in capsys.readouterr().out


def test_every_option_has_its_own_environment_variable() -> None:
    for command in cli.cli.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.envvar is not None:
                long = max(parameter.opts, key=len)
                first = parameter.envvar[0] if isinstance(parameter.envvar, list) else parameter.envvar
                assert first == "QUIRE_" + long.removeprefix("--").replace("-", "_").upper()


# -- the client by itself


def test_client_calls(server: Any) -> None:
    with Client(server.url) as client:
        assert client.wait_ready(5).model == "tiny"
        assert client.load().num_running == 3
        assert client.tokenize("abc", add_special_tokens=True) == [3, 1]
        assert client.detokenize([1, 2]) == "[1, 2]"
        assert client.complete("a b") == "a b ."
        assert "".join(client.chat([{"role": "user", "content": "a b"}])) == "a b ."
        assert client.reserve_prefix("p", [1, 2]).num_tokens == 33
        assert [kept.name for kept in client.prefixes()] == ["kept", "new"]
        client.release_prefix("kept")
        with pytest.raises(ServerError, match="no such request") as caught:
            client.abort("x")
        assert caught.value.code == grpc.StatusCode.NOT_FOUND
        with pytest.raises(ServerError) as caught:
            client.complete("fail")
        assert (caught.value.field, caught.value.reason) == ("sampling.n", "INVALID_ARGUMENT")
        with pytest.raises(ServerError) as caught:
            client.complete("hang", timeout=0.2)
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_token_ids_and_the_empty_prompt_go_as_ids(server: Any) -> None:
    with Client(server.url) as client, pytest.raises(ServerError):
        list(client.generate([1, 2]))
    with Client(server.url) as client, pytest.raises(ServerError):
        list(client.generate([]))
    assert [r.WhichOneof("prompt") for r in server.requests] == ["token_ids", "token_ids"]
    assert list(server.requests[0].token_ids.ids) == [1, 2]


def test_dropping_the_iterator_ends_the_request(server: Any) -> None:
    with Client(server.url) as client:
        responses = client.generate("hang")
        next(responses)
        responses.close()  # type: ignore[attr-defined]
        assert server.ended.wait(2)


def test_wait_ready_waits_for_a_server_and_gives_up() -> None:
    port = free_port()
    with Client(f"127.0.0.1:{port}") as client:
        started = time.monotonic()
        with pytest.raises(ServerError, match="no server answers"):
            client.wait_ready(0.3)
        assert time.monotonic() - started < 3
        late = grpc.server(ThreadPoolExecutor(1))
        pb_grpc.add_GenerationServicer_to_server(Server(), late)
        timer = threading.Timer(0.3, lambda: (late.add_insecure_port(f"127.0.0.1:{port}"), late.start()))
        timer.start()
        assert client.wait_ready(20).model == "tiny"
        timer.join()
        late.stop(None).wait()
